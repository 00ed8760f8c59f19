/* A linear layer over a 4-bit weight in float or double arithmetic: y = x Wᵀ + bias.

A handful of rows is bound by the lookups: each weight is looked up in a register, multiplied and added, and never
stored (few.h). Many rows are bound by the multiplications (tiles.h). */

#include <stdlib.h>

#include "dequantize_4bit/weight.h"

typedef real element;
typedef vec operand;
#define STEP LANES
#define TARGET
#define operand_at load
#if defined(__AVX512F__)
#define ROWS 6 /* 24 of 32 registers accumulate */
#else
#define ROWS 3 /* 12 of 16 */
#endif
#if defined(__AVX512F__) && !defined(REAL_DOUBLE)
#define GROUPED 1
#else
#define GROUPED 0
#endif

INLINE vec accumulate(vec sum, vec x, vec w) { return sum + x * w; }

#include "linear_4bit/groups.h"

#if GROUPED
INLINE __m512i table_of(const float *values) { return _mm512_loadu_si512(values); }

INLINE vec look_up_group(__m512i codes, int j, __m512i table) {
    return (vec)_mm512_permutexvar_epi32(_mm512_srli_epi32(codes, 4 * j), table);
}

INLINE void widen_groups(float *restrict to, const Weight *w, int64_t start, int64_t count, const float *restrict scales, int64_t first) {
    const Lanes lanes = lanes_of(w->block);
    const __m512i table = table_of(w->values);
    for (int64_t k = 0; k < count; k += GROUP) {
        const __m512i codes = _mm512_loadu_si512(w->packed + (start + k) / 2);
        const vec scale = (vec)scale_of(&lanes, scales + ((start + k) >> lanes.shift) - first);
#pragma GCC unroll 8
        for (int j = 0; j < LOOKUPS; j++) store(to + k + j * STEP, look_up_group(codes, j, table) * scale);
    }
}
#endif

static void widen_x(real *restrict to, const Linear *l, int64_t row, int64_t from, int64_t count) {
    const int64_t offset = row * l->inputs + from;
#if GROUPED
    if (l->grouped) {
        for (int64_t k = 0; k < count; k += GROUP) {
            float natural[GROUP];
            load_row(natural, l->x, l->dtype, offset + k, GROUP);
            spread(to + k, natural);
        }
        return;
    }
#endif
    load_row(to, l->x, l->dtype, offset, count);
    for (int64_t i = count; i % STEP; i++) to[i] = 0;
}

static void widen_weight(real *restrict to, const Linear *l, int64_t row, int64_t from, int64_t count, const float *restrict scales, int64_t first) {
    const int64_t start = row * l->inputs + from;
#if GROUPED
    if (l->grouped) {
        widen_groups(to, &l->weight, start, count, scales, first);
        return;
    }
#endif
    expand(to, &l->weight, start, count, scales + start / l->weight.block - first);
    for (int64_t i = count; i % STEP; i++) to[i] = 0;
}

#include "linear_4bit/tiles.h"
#if GROUPED
#include "linear_4bit/few.h"
#endif

/* x: (rows, inputs), y: (rows, outputs), both of `dtype`; bias: (outputs) or null; the rest is the weight. */
void EXPORT(linear_4bit)(const uint8_t *packed, const void *absmax, const float *values, const float *map, const float *nested, const float *offset, int64_t block,
                         int64_t dtype, const void *x, const real *bias, void *y, int64_t rows, int64_t inputs, int64_t outputs, int64_t threads) {
    const Weight weight = weight_of(packed, absmax, values, map, nested, offset, block, inputs * outputs);
    Linear l = {.weight = weight, .x = x, .y = y, .bias = bias, .rows = rows, .inputs = inputs, .outputs = outputs, .dtype = (int)dtype};
    l.grouped = GROUPED && inputs % GROUP == 0;
#if GROUPED
    if (suits_few(&l)) {
        multiply_few(&l, threads);
        return;
    }
#endif
    multiply_tiles(&l, threads);
}

/* The same for x, y and their sizes in front of what stays from call to call: kernels/prepared.py. */
typedef struct {
    const void *x;
    void *y;
    int64_t rows, threads, dtype;
    const uint8_t *packed;
    const void *absmax;
    const float *values, *map, *nested, *offset;
    const real *bias;
    int64_t block, inputs, outputs;
} Call;

void EXPORT(linear_4bit_prepared)(const Call *c) {
    JOIN(linear_4bit, REAL_NAME, VARIANT)(c->packed, c->absmax, c->values, c->map, c->nested, c->offset, c->block, c->dtype, c->x, c->bias, c->y, c->rows, c->inputs, c->outputs, c->threads);
}

/* 1 where this processor multiplies bfloat16, and 2 where it multiplies bytes and looks them up, in 64-byte vectors. */
void EXPORT(linear_4bit_features)(int64_t *features) {
    *features = 0;
#if GROUPED
    __builtin_cpu_init();
    *features = (__builtin_cpu_supports("avx512bf16") ? 1 : 0) + (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") ? 2 : 0);
#endif
}
