/* A linear layer over a 4-bit weight in products of bytes: y = x Wᵀ + bias, to about 1 % of the largest y.

Each 64 inputs of a row of x (in a handful of rows each 8) are rounded to 8 bits with a scale of their own; the 16 codes are rounded to unsigned bytes,
value ≈ step · (byte + zero). vpdpbusd adds up 64 products of bytes where a float vector has 16:

    y = Σ over blocks b of 64 inputs: scale_b · absmax_b · step · Σ x8 · (byte + zero)

The sum with `zero` does not depend on the weight, and is what the accumulator starts from.

A handful of rows runs along the inputs, as in few.h. For more, 16 rows of W stand side by side in a vector's lanes, so
that an accumulator is scaled once in 64 inputs: their codes are transposed, 8 codes at a time, when they are looked up. */

#include <math.h>
#include <stdlib.h>

#include "dequantize_4bit/weight.h"
#include "vnni.h"

#if defined(__AVX512BW__) && !defined(REAL_DOUBLE)

#define TARGET __attribute__((target("avx512vnni,avx512vbmi")))

enum {
    GROUP = 128,        /* codes in 64 bytes */
    EIGHT = 8,          /* codes in 4 bytes, a lane */
    BLOCK = 64,         /* inputs to a scale of x; in a handful of rows each EIGHT have one */
    FEW = 4,
    WIDE = 16,          /* rows of W side by side in a vector */
    PAIR = 2 * WIDE,    /* rows of W to a register tile, and rows of x: 12 accumulators of integers, 12 of floats */
    ROWS = 6,
    OUTPUTS = 64,       /* rows of W to a task */
    CHUNK = 512,        /* inputs that a pass takes; a tile of W is then 16 kB */
    MOST_ROWS = 128     /* rows of x that stay in the second cache */
};

typedef struct {
    Weight weight;
    const void *x;
    void *y;
    const float *bias;
    const uint8_t *bytes; /* of the codes */
    float zero, step;
    int8_t *x8;           /* (rows, inputs + 64): of 8 inputs first the even ones, or of 128 */
    float *scale;         /* of x8, times step: (rows, inputs / BLOCK), or / EIGHT */
    int32_t *start;       /* Σ x8 · zero over the inputs of a scale */
    int64_t rows, inputs, outputs;
    int dtype;
} Linear;

/* Four copies of the table: a lookup among 64 bytes reads two bits more than a code has. */
INLINE TARGET __m512i table_of(const uint8_t *bytes) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)bytes)); }
/* The first codes of the bytes, and the second ones. */
INLINE TARGET __m512i even_of(__m512i codes, __m512i table) { return _mm512_permutexvar_epi8(_mm512_srli_epi16(codes, 4), table); }
INLINE TARGET __m512i odd_of(__m512i codes, __m512i table) { return _mm512_permutexvar_epi8(codes, table); }

/* `count` inputs in 8 bits; returns their scale. NaN and infinity make the scale so, and with it the whole row of y. */
INLINE float round_block(int8_t *restrict to, const float *restrict x, const int count) {
    int32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int i = 0; i < count; i++) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    const float most = float_of_bits((uint32_t)largest), inverse = most < 0x1p-120f ? 0 : 127 / most;
#pragma omp simd
    for (int i = 0; i < count; i++) {
        /* The sum rounds to an integer, which then stands in the low bits. */
        const float shifted = x[i] * inverse + 0x1.8p23f;
        int32_t bits;
        memcpy(&bits, &shifted, 4);
        to[i] = (int8_t)bits;
    }
    return most / 127;
}

/* A row of x with a scale for each `block` inputs, in the order of the codes: in runs of `run`, even inputs first. */
INLINE void round_row(const Linear *l, int64_t row, const int block, const int run) {
    int8_t *to = l->x8 + row * (l->inputs + 64);
    for (int64_t k = 0; k < l->inputs; k += GROUP) {
        float x[GROUP];
        int8_t x8[GROUP];
        load_row(x, l->x, l->dtype, row * l->inputs + k, GROUP);
        for (int b = 0; b < GROUP; b += block) {
            const int64_t at = (row * l->inputs + k + b) / block;
            int32_t sum = 0;
            l->scale[at] = round_block(x8 + b, x + b, block) * l->step;
            for (int i = 0; i < block; i++) sum += x8[b + i];
            l->start[at] = (int32_t)lrintf((float)sum * l->zero);
        }
        for (int i = 0; i < GROUP; i++) to[k + i / run * run + (i & 1) * run / 2 + i % run / 2] = x8[i];
    }
}

static void few_row(void *context, int64_t row) { round_row(context, row, EIGHT, GROUP); }
static void many_row(void *context, int64_t row) { round_row(context, row, BLOCK, EIGHT); }

/* ---- a handful of rows ------------------------------------------------------------------------------------------- */

/* The products of row n of W with `rows` rows of x, a number known when compiled. absmax: of the row's blocks. */
INLINE TARGET void multiply_few(const int rows, const Linear *l, int64_t n, const float *restrict absmax, float *restrict sums) {
    const __m512i table = table_of(l->bytes);
    const uint8_t *packed = l->weight.packed + n * l->inputs / 2, *next = packed + l->inputs / 2;
    const int shift = __builtin_ctzll((uint64_t)l->weight.block);
    const __mmask16 upper = 0xFF00; /* the lanes of a group's second half */
    __m512 totals[FEW];
    for (int r = 0; r < rows; r++) totals[r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < l->inputs; k += GROUP) {
        const __m512i codes = _mm512_loadu_si512(packed + k / 2), even = even_of(codes, table), odd = odd_of(codes, table);
        _mm_prefetch((const char *)next + k / 2, _MM_HINT_T0);
        const __m512 of_block = _mm512_mask_mov_ps(_mm512_set1_ps(absmax[k >> shift]), upper, _mm512_set1_ps(absmax[(k + BLOCK) >> shift]));
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const int8_t *x = l->x8 + r * (l->inputs + 64) + k;
            __m512i sum = _mm512_loadu_si512(l->start + (r * l->inputs + k) / EIGHT);
            sum = _mm512_dpbusd_epi32(sum, even, _mm512_loadu_si512(x));
            sum = _mm512_dpbusd_epi32(sum, odd, _mm512_loadu_si512(x + 64));
            const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(l->scale + (r * l->inputs + k) / EIGHT));
            totals[r] = _mm512_fmadd_ps(scaled, of_block, totals[r]);
        }
    }
    for (int r = 0; r < rows; r++) sums[r * OUTPUTS] = _mm512_reduce_add_ps(totals[r]);
}

static TARGET void few_task(const Linear *l, int64_t n0, int64_t outputs, const float *scales, float *sums) {
    for (int64_t n = 0; n < outputs; n++) {
        const float *absmax = scales + n * l->inputs / l->weight.block;
        switch (l->rows) {
        case 1: multiply_few(1, l, n0 + n, absmax, sums + n); break;
        case 2: multiply_few(2, l, n0 + n, absmax, sums + n); break;
        case 3: multiply_few(3, l, n0 + n, absmax, sums + n); break;
        case 4: multiply_few(4, l, n0 + n, absmax, sums + n); break;
        }
    }
}

/* ---- many rows --------------------------------------------------------------------------------------------------- */

/* The bytes of PAIR rows of W from row n on (the last one stands for those that are not there), and their absmax:
tile (count / 8, even and odd, PAIR · 4 bytes), absmax (count / BLOCK, PAIR). scales: from block `first` on. */
static TARGET void fill_tile(uint8_t *restrict tile, float *restrict absmax, const Linear *l, int64_t n, int64_t from, int64_t count, const float *restrict scales, int64_t first) {
    const __m512i table = table_of(l->bytes);
    for (int half = 0; half < PAIR; half += WIDE) {
        int64_t at[WIDE];
        for (int i = 0; i < WIDE; i++) at[i] = least(n + half + i, l->outputs - 1) * l->inputs + from;
        for (int64_t k = 0; k < count; k += GROUP) {
            __m512i rows[WIDE];
            for (int i = 0; i < WIDE; i++) rows[i] = _mm512_loadu_si512(l->weight.packed + (at[i] + k) / 2);
            transpose(rows);
            for (int i = 0; i < WIDE; i++) {
                uint8_t *to = tile + ((k / 8 + i) * 2 * PAIR + half) * 4;
                _mm512_store_si512(to, even_of(rows[i], table));
                _mm512_store_si512(to + PAIR * 4, odd_of(rows[i], table));
            }
        }
        for (int64_t b = 0; b < count / BLOCK; b++)
            for (int i = 0; i < WIDE; i++) absmax[b * PAIR + half + i] = scales[(at[i] + b * BLOCK) / l->weight.block - first];
    }
}

/* sums[r][lane] += x[r] · w[lane] over `count` inputs from `from` on, for `rows` rows of x from m on. */
INLINE TARGET void multiply_tile(const int rows, const Linear *l, int64_t m, int64_t from, int64_t count, const uint8_t *restrict tile, const float *restrict absmax, float *restrict sums) {
    __m512 totals[ROWS][2];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2; v++) totals[r][v] = _mm512_load_ps(sums + r * OUTPUTS + v * WIDE);
    const int64_t stride = l->inputs + 64, blocks = l->inputs / BLOCK;
    const int8_t *x = l->x8 + m * stride + from;
    const int32_t *start = l->start + m * blocks + from / BLOCK;
    const float *scale = l->scale + m * blocks + from / BLOCK;
    for (int64_t b = 0; b < count / BLOCK; b++, x += BLOCK, start++, scale++) {
        __m512i parts[ROWS][2];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < 2; v++) parts[r][v] = _mm512_set1_epi32(start[r * blocks]);
        for (int i = 0; i < BLOCK; i += 4, tile += PAIR * 4) {
            const __m512i w0 = _mm512_load_si512(tile), w1 = _mm512_load_si512(tile + 64);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, x + r * stride + i, 4);
                const __m512i x4 = _mm512_set1_epi32(four);
                parts[r][0] = _mm512_dpbusd_epi32(parts[r][0], w0, x4);
                parts[r][1] = _mm512_dpbusd_epi32(parts[r][1], w1, x4);
            }
        }
        const __m512 a0 = _mm512_load_ps(absmax + b * PAIR), a1 = _mm512_load_ps(absmax + b * PAIR + WIDE);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            const __m512 s = _mm512_set1_ps(scale[r * blocks]);
            totals[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(parts[r][0]), _mm512_mul_ps(a0, s), totals[r][0]);
            totals[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(parts[r][1]), _mm512_mul_ps(a1, s), totals[r][1]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2; v++) _mm512_store_ps(sums + r * OUTPUTS + v * WIDE, totals[r][v]);
}

static TARGET void many_task(const Linear *l, int64_t n0, int64_t outputs, int64_t m0, int64_t rows, const float *scales, int64_t first, float *sums) {
    uint8_t *tile = aligned(CHUNK * PAIR);
    float *absmax = aligned(CHUNK / BLOCK * PAIR * (int64_t)sizeof(float));
    for (int64_t from = 0; from < l->inputs; from += CHUNK)
        for (int64_t n = 0; n < outputs; n += PAIR) {
            const int64_t count = least(CHUNK, l->inputs - from);
            fill_tile(tile, absmax, l, n0 + n, from, count, scales, first);
            int64_t m = 0;
            for (; m + ROWS <= rows; m += ROWS) multiply_tile(ROWS, l, m0 + m, from, count, tile, absmax, sums + m * OUTPUTS + n);
            float *last = sums + m * OUTPUTS + n;
            switch (rows - m) {
            case 5: multiply_tile(5, l, m0 + m, from, count, tile, absmax, last); break;
            case 4: multiply_tile(4, l, m0 + m, from, count, tile, absmax, last); break;
            case 3: multiply_tile(3, l, m0 + m, from, count, tile, absmax, last); break;
            case 2: multiply_tile(2, l, m0 + m, from, count, tile, absmax, last); break;
            case 1: multiply_tile(1, l, m0 + m, from, count, tile, absmax, last); break;
            }
        }
    free(absmax);
    free(tile);
}

static TARGET void outputs_task(void *context, int64_t index) {
    const Linear *l = context;
    const int64_t n0 = index * OUTPUTS, outputs = least(OUTPUTS, l->outputs - n0), block = l->weight.block;
    const int64_t first = n0 * l->inputs / block, blocks = ((n0 + outputs) * l->inputs + block - 1) / block - first;
    float *decoded = l->weight.nested ? malloc((size_t)blocks * sizeof(float)) : 0;
    const float *scales = scales_of(&l->weight, first, blocks, decoded);
    float *sums = aligned(MOST_ROWS * OUTPUTS * (int64_t)sizeof(float));
    for (int64_t m0 = 0; m0 < l->rows; m0 += MOST_ROWS) {
        const int64_t rows = least(MOST_ROWS, l->rows - m0);
        memset(sums, 0, (size_t)(rows * OUTPUTS) * sizeof(float));
        if (l->rows <= FEW)
            few_task(l, n0, outputs, scales, sums);
        else
            many_task(l, n0, outputs, m0, rows, scales, first, sums);
        for (int64_t m = 0; m < rows; m++) {
            if (l->bias)
                for (int64_t n = 0; n < outputs; n++) sums[m * OUTPUTS + n] += l->bias[n0 + n];
            store_row(l->y, l->dtype, (m0 + m) * l->outputs + n0, outputs, sums + m * OUTPUTS);
        }
    }
    free(sums);
    free(decoded);
}

/* As `linear_4bit` of native.c, for inputs in whole groups and rows of W in whole blocks of 64 or more. bytes: of the 16
codes, value ≈ step · (byte + zero). */
void EXPORT(linear_4bit_int8)(const uint8_t *packed, const void *absmax, const float *values, const float *map, const float *nested, const float *offset, int64_t block,
                              const uint8_t *bytes, double step, double zero, int64_t dtype, const void *x, const float *bias, void *y,
                              int64_t rows, int64_t inputs, int64_t outputs, int64_t threads) {
    const Weight weight = weight_of(packed, absmax, values, map, nested, offset, block, inputs * outputs);
    Linear l = {.weight = weight, .x = x, .y = y, .bias = bias, .bytes = bytes, .zero = (float)zero, .step = (float)step, .rows = rows, .inputs = inputs, .outputs = outputs, .dtype = (int)dtype};
    const int few = rows <= FEW;
    l.x8 = aligned(rows * (inputs + 64));
    l.scale = aligned(rows * inputs / (few ? EIGHT : BLOCK) * (int64_t)sizeof(float));
    l.start = aligned(rows * inputs / (few ? EIGHT : BLOCK) * (int64_t)sizeof(int32_t));
    parallel(few ? few_row : many_row, &l, rows, few ? 1 : threads);
    parallel(outputs_task, &l, (outputs + OUTPUTS - 1) / OUTPUTS, threads);
    free(l.start);
    free(l.scale);
    free(l.x8);
}

#endif
