/* A 4-bit weight as the C kernels read it: the layout of four_bit.py. */
#pragma once

#include "native.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

enum { NESTED_BLOCK = 256, MOST_BLOCK = 4096 };

/* The 16 values of the codes; blocks of `block` elements, a power of two of at least 32; and the absmax: float32, or,
where `nested` is not null, codes of it for the 256 values of `map`. */
typedef struct {
    const uint8_t *packed;
    const void *absmax;
    const float *values, *map, *nested;
    float offset;
    int64_t block, count;
} Weight;

INLINE Weight weight_of(const uint8_t *packed, const void *absmax, const float *values, const float *map, const float *nested, const float *offset, int64_t block, int64_t count) {
    return (Weight){packed, absmax, values, map, nested, nested ? *offset : 0, block, count};
}

/* The absmax of `count` blocks from `first` on; `buffer` where they have to be decoded. */
static __attribute__((unused)) const float *scales_of(const Weight *w, int64_t first, int64_t count, float *restrict buffer) {
    if (!w->nested) return (const float *)w->absmax + first;
    const uint8_t *codes = (const uint8_t *)w->absmax + first;
    for (int64_t i = 0; i < count; i++) buffer[i] = w->map[codes[i]] * w->nested[(first + i) / NESTED_BLOCK];
    /* A loop of its own, so that no fused multiply-add gives other bits than torch and bitsandbytes have. */
    for (int64_t i = 0; i < count; i++) buffer[i] += w->offset;
    return buffer;
}

INLINE int code_of(const uint8_t *packed, int64_t i) { return i & 1 ? packed[i / 2] & 15 : packed[i / 2] >> 4; }

/* to[i] = value of the code · scale, for `count` codes from an even index on, all of one block. */
INLINE void look_up(real *restrict to, const uint8_t *restrict packed, const float *restrict values, float scale, int64_t count) {
    int64_t i = 0;
#if defined(__AVX512BW__) && !defined(REAL_DOUBLE)
    const __m512 table = _mm512_mul_ps(_mm512_loadu_ps(values), _mm512_set1_ps(scale));
    /* Lane j of 16 takes byte j / 2, the even ones its high half; the lookup reads the low 4 bits of a lane. */
    const __m512i spread = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i shift = _mm512_set1_epi64(4);
    for (; i + 16 <= count; i += 16) {
        int64_t bytes;
        memcpy(&bytes, packed + i / 2, 8);
        const __m512i codes = _mm512_srlv_epi32(_mm512_shuffle_epi8(_mm512_set1_epi64(bytes), spread), shift);
        _mm512_storeu_ps(to + i, _mm512_permutexvar_ps(codes, table));
    }
#elif defined(__AVX2__) && !defined(REAL_DOUBLE)
    const __m256 low = _mm256_mul_ps(_mm256_loadu_ps(values), _mm256_set1_ps(scale));
    const __m256 high = _mm256_mul_ps(_mm256_loadu_ps(values + 8), _mm256_set1_ps(scale));
    const __m256i spread = _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0), shift = _mm256_set1_epi64x(4);
    for (; i + 8 <= count; i += 8) {
        int32_t bytes;
        memcpy(&bytes, packed + i / 2, 4);
        const __m256i codes = _mm256_srlv_epi32(_mm256_shuffle_epi8(_mm256_set1_epi32(bytes), spread), shift);
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
        _mm256_storeu_ps(to + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), upper));
    }
#else
    if (count >= 16) {
        real table[16];
        for (int k = 0; k < 16; k++) table[k] = (real)values[k] * (real)scale;
        for (; i + 2 <= count; i += 2) {
            to[i] = table[packed[i / 2] >> 4];
            to[i + 1] = table[packed[i / 2] & 15];
        }
    }
#endif
    for (; i < count; i++) to[i] = (real)values[code_of(packed, i)] * (real)scale;
}

/* The `count` weights from `start` on, in order. `scales` are the absmax of the blocks from that of `start` on. */
static __attribute__((unused)) void expand(real *restrict to, const Weight *w, int64_t start, int64_t count, const float *restrict scales) {
    const int64_t end = start + count, shift = __builtin_ctzll((uint64_t)w->block);
    for (int64_t border; start < end; start = border, scales++) {
        border = ((start >> shift) + 1) << shift;
        border = border < end ? border : end;
        if (start & 1) *to++ = (real)w->values[code_of(w->packed, start++)] * (real)*scales;
        look_up(to, w->packed + start / 2, w->values, *scales, border - start);
        to += border - start;
    }
}
