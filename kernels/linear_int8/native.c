/* A linear layer over an 8-bit weight: y = (x8 · weightᵀ) · row_scale · scale + bias, with sums of integers.

Every row of x is rounded once, to signed bytes: with a scale of its own, or with one that is given, and a zero point. The
products are exact, in whichever order and on whichever processor: vnni.h has them for AVX-512 VNNI, pairs.h in 16-bit
pairs for all others. */

#include <math.h>

#include "vnni.h"

enum {
    OUTPUTS = 64,    /* rows of the weight to a task */
    ROWS = 6,        /* rows of x to a register tile */
    CHUNK = 1024,    /* inputs that are widened at once */
    ROUNDED = 16,    /* rows of x to a task that rounds them */
    LARGE = 1 << 18  /* inputs, in all rows, from which on rounding them is worth a thread */
};

typedef struct {
    const void *x;              /* (rows, inputs) */
    void *y;                    /* (rows, outputs) */
    int64_t rows, threads, dtype;
    const int8_t *weight;       /* (outputs, inputs) */
    const real *scale, *bias;   /* (outputs); bias may be null */
    const float *input_scale;   /* (), or null: each row its own */
    const int32_t *zero_point;  /* (), where there is an input_scale */
    int64_t inputs, outputs;
} Call;

typedef struct {
    Call c;
    int8_t *x8;         /* (rows, stride), zeros after the inputs */
    int16_t *x16;       /* the same in 16 bits, where pairs are multiplied */
    float *row_scale;
    int32_t *row_sum;   /* Σ x8 */
    int64_t stride;
    int32_t zero;       /* the zero point of x8 */
} Linear;

/* To the nearest integer, ties to even, for |x| < 2^22. Not fused with the product before it, which would round otherwise
on some processors than on others. */
INLINE float nearest(float x) {
#if defined(__SSE2__) && !defined(__SSE4_1__)
    return (x + 0x1.8p23f) - 0x1.8p23f; /* no processor without SSE4.1 fuses anything */
#else
    return rintf(x);
#endif
}

/* The largest magnitude, in the order of the bits: of NaN, NaN. */
static uint32_t largest_of(const Call *c, int64_t row) {
    real buffer[CHUNK];
    int32_t largest = 0;
    for (int64_t k = 0; k < c->inputs; k += CHUNK) {
        const int64_t count = least(CHUNK, c->inputs - k);
        const real *x = row_of(buffer, c->x, (int)c->dtype, row * c->inputs + k, count);
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < count; i++) {
            const float narrow = (float)x[i];
            int32_t bits;
            memcpy(&bits, &narrow, 4);
            bits &= 0x7FFFFFFF;
            largest = bits > largest ? bits : largest;
        }
    }
    return (uint32_t)largest;
}

static void round_row(Linear *l, int64_t row) {
    const Call *c = &l->c;
    int8_t *to = l->x8 + row * l->stride;
    real buffer[CHUNK];
    const float most = float_of_bits(largest_of(c, row));
    const int is_static = c->input_scale != 0, finite = most < (float)INFINITY;
    const float step = is_static ? *c->input_scale : 0, inverse = most < 0x1p-120f ? 0 : 127 / most;
    l->row_scale[row] = is_static ? (most == most ? step : NAN) : finite ? most / 127 : NAN;
    l->row_sum[row] = 0;
    memset(to, 0, (size_t)l->stride);
    if (!finite && !(is_static && most == most)) return;
    for (int64_t k = 0; k < c->inputs; k += CHUNK) {
        const int64_t count = least(CHUNK, c->inputs - k);
        const real *x = row_of(buffer, c->x, (int)c->dtype, row * c->inputs + k, count);
        int32_t sum = 0;
        if (is_static) {
            const float zero = (float)l->zero;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < count; i++) {
                float v = (float)x[i] / step;
                v = v > 512 ? 512 : v < -512 ? -512 : v;
                v = nearest(v) + zero;
                const int32_t code = (int32_t)(v > 127 ? 127 : v < -128 ? -128 : v);
                to[k + i] = (int8_t)code;
                sum += code;
            }
        } else {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < count; i++) {
                const int32_t code = (int32_t)nearest((float)x[i] * inverse);
                to[k + i] = (int8_t)code;
                sum += code;
            }
        }
        l->row_sum[row] += sum;
    }
}

static void round_task(void *context, int64_t index) {
    Linear *l = context;
    const int64_t end = least((index + 1) * ROUNDED, l->c.rows);
    for (int64_t row = index * ROUNDED; row < end; row++) {
        round_row(l, row);
        if (l->x16)
            for (int64_t i = 0; i < l->stride; i++) l->x16[row * l->stride + i] = l->x8[row * l->stride + i];
    }
}

/* y of a row from output n on: sums[i] = Σ x8 · weight; weight_sums: of the rows of the weight, where `zero` is not. */
INLINE void finish(const Linear *l, int64_t row, int64_t n, int64_t outputs, const int32_t *restrict sums, const int32_t *restrict weight_sums) {
    const Call *c = &l->c;
    const real row_scale = (real)l->row_scale[row];
    const uint32_t zero = (uint32_t)l->zero;
    real y[OUTPUTS];
#pragma omp simd
    for (int64_t i = 0; i < outputs; i++) {
        const int32_t sum = (int32_t)((uint32_t)sums[i] - zero * (uint32_t)weight_sums[i]);
        y[i] = (real)sum * (row_scale * c->scale[n + i]);
    }
    if (c->bias)
#pragma omp simd
        for (int64_t i = 0; i < outputs; i++) y[i] += c->bias[n + i];
    store_row(c->y, (int)c->dtype, row * c->outputs + n, outputs, y);
}

#include "linear_int8/pairs.h"
#include "linear_int8/tiles.h"

void EXPORT(linear_int8)(const Call *call) {
    Linear l = {.c = *call, .stride = (call->inputs + 63) / 64 * 64 + 64};
    void (*multiply)(void *, int64_t) = pairs_task;
#if defined(__AVX512BW__)
    if (has_vnni()) multiply = call->rows <= FEW ? few_task : many_task;
#endif
    l.zero = call->input_scale ? *call->zero_point - 128 : 0;
    const int64_t bytes = call->rows * l.stride, in_pairs = multiply == pairs_task;
    l.x8 = aligned(bytes + (in_pairs ? 2 * bytes : 0) + call->rows * 8 + 128);
    l.x16 = in_pairs ? (int16_t *)(l.x8 + bytes) : 0;
    l.row_scale = (float *)(l.x8 + bytes + (in_pairs ? 2 * bytes : 0));
    l.row_sum = (int32_t *)(l.row_scale + call->rows);
    expect_writes(call->y, call->rows * call->outputs * (call->dtype == BFLOAT16 || call->dtype == FLOAT16 ? 2 : REAL_BYTES));
    parallel(round_task, &l, (call->rows + ROUNDED - 1) / ROUNDED, call->rows * call->inputs < LARGE ? 1 : call->threads);
    parallel(multiply, &l, (call->outputs + OUTPUTS - 1) / OUTPUTS, call->threads);
    free(l.x8);
}
