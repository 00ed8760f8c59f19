/* 4-bit quantization: absmax of each block, then the number of borders below each scaled element. Some 15 operations a
vector of elements (60 without AVX-512), no branch; reads two to four bytes an element and writes half a byte. */

#include "native.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifndef REAL_DOUBLE /* float32 for every weight: the arithmetic is part of the format */

/* TASK: elements to a task, a multiple of every block size, that stay in the second cache between the passes. */
enum { BORDERS = 15, LEAST_BLOCK = 32, TASK = 1 << 14 };

typedef struct {
    const void *weight;
    const float *borders;
    const uint8_t *ascending;
    uint8_t *packed;
    float *absmax;
    int64_t count, block;
    int dtype;
} Quantize;

/* The largest magnitude. As integers, magnitudes have the order of their values, and NaN lies above infinity. */
INLINE float absmax_of(const float *x, int64_t count) {
    int32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < count; i++) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    return float_of_bits((uint32_t)largest);
}

/* packed[i] = the codes of x[2 i] and x[2 i + 1], scaled, for a multiple of 32 elements. The rank of an element is the
number of borders that it is not at or below, which is all of them for NaN. */
#ifdef __AVX512F__
INLINE void pack(uint8_t *restrict packed, const float *restrict x, int64_t count, float scale, const Quantize *q) {
    const __m512i codes_of = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)q->ascending));
    /* Four comparisons: step k looks at the border with the index rank + 2^k - 1. */
    const __m512 of_8 = _mm512_set1_ps(q->borders[7]), of_4 = _mm512_maskz_loadu_ps(0x0FFF, q->borders + 3);
    const __m512 of_2 = _mm512_maskz_loadu_ps(0x3FFF, q->borders + 1), of_1 = _mm512_maskz_loadu_ps(0x7FFF, q->borders);
    const __m512 factor = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < count; i += 16) {
        const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + i), factor);
        __m512i rank = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(scaled, of_8, _CMP_NLE_UQ), 8);
        rank = _mm512_mask_add_epi32(rank, _mm512_cmp_ps_mask(scaled, _mm512_permutexvar_ps(rank, of_4), _CMP_NLE_UQ), rank, _mm512_set1_epi32(4));
        rank = _mm512_mask_add_epi32(rank, _mm512_cmp_ps_mask(scaled, _mm512_permutexvar_ps(rank, of_2), _CMP_NLE_UQ), rank, _mm512_set1_epi32(2));
        rank = _mm512_mask_add_epi32(rank, _mm512_cmp_ps_mask(scaled, _mm512_permutexvar_ps(rank, of_1), _CMP_NLE_UQ), rank, _mm512_set1_epi32(1));
        const __m512i codes = _mm512_permutexvar_epi32(rank, codes_of);
        const __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(codes, 4), _mm512_srli_epi64(codes, 32));
        _mm_storel_epi64((__m128i *)(packed + i / 2), _mm512_cvtepi64_epi8(pairs));
    }
}
#else
INLINE void pack(uint8_t *restrict packed, const float *restrict x, int64_t count, float scale, const Quantize *q) {
    enum { STEP = 32 };
    uint8_t ranks[STEP];
    for (int64_t i = 0; i < count; i += STEP) {
#pragma omp simd
        for (int k = 0; k < STEP; k++) {
            const float scaled = x[i + k] * scale;
            int32_t not_above = 0;
            for (int border = 0; border < BORDERS; border++) not_above += scaled <= q->borders[border];
            ranks[k] = (uint8_t)(BORDERS - not_above);
        }
        for (int k = 0; k < STEP / 2; k++) packed[i / 2 + k] = (uint8_t)(q->ascending[ranks[2 * k]] << 4 | q->ascending[ranks[2 * k + 1]]);
    }
}
#endif

/* The short last block divides, keeps the clamped absmax, and fills an odd count's last byte with a zero. */
static void quantize_rest(const Quantize *q, const float *x, int64_t start, int64_t count) {
    float absmax = absmax_of(x, count);
    absmax = absmax < 1e-38f ? 1e-38f : absmax;
    q->absmax[start / q->block] = absmax;
    for (int64_t i = 0; i < count; i += LEAST_BLOCK) {
        const int64_t part = i + LEAST_BLOCK < count ? LEAST_BLOCK : count - i;
        float scaled[LEAST_BLOCK] = {0};
        uint8_t bytes[LEAST_BLOCK / 2];
        for (int64_t k = 0; k < part; k++) scaled[k] = x[i + k] / absmax;
        pack(bytes, scaled, LEAST_BLOCK, 1, q);
        memcpy(q->packed + (start + i) / 2, bytes, (size_t)(part + 1) / 2);
    }
}

static void quantize_task(void *context, int64_t index) {
    const Quantize *q = context;
    const int64_t start = index * TASK, count = start + TASK < q->count ? TASK : q->count - start;
    const int64_t blocks = count / q->block, whole = blocks * q->block;
    float buffer[TASK], inverse[TASK / LEAST_BLOCK], *absmax = q->absmax + start / q->block;
    const float *x = row_of(buffer, q->weight, q->dtype, start, count);
    /* One pass for each step, so that no block waits for the maximum or the division of the one before. */
    for (int64_t b = 0; b < blocks; b++) absmax[b] = absmax_of(x + b * q->block, q->block);
    for (int64_t b = 0; b < blocks; b++) inverse[b] = 1 / (absmax[b] < 1e-38f ? 1e-38f : absmax[b]);
    for (int64_t b = 0; b < blocks; b++) pack(q->packed + (start + b * q->block) / 2, x + b * q->block, q->block, inverse[b], q);
    if (whole < count) quantize_rest(q, x + whole, start + whole, count - whole);
}

/* weight: `count` elements of `dtype`; borders: 15; ascending: the 16 codes in the order of their values;
packed: (count + 1) / 2 bytes; absmax: one for each block. */
void EXPORT(quantize_4bit)(const void *weight, int64_t dtype, const float *borders, const uint8_t *ascending, uint8_t *packed, float *absmax,
                           int64_t count, int64_t block, int64_t threads) {
    Quantize q = {weight, borders, ascending, packed, absmax, count, block, (int)dtype};
    parallel(quantize_task, &q, (count + TASK - 1) / TASK, threads);
}

#endif
