/* A linear layer for a handful of rows: y = x Wᵀ + bias.

Few rows are bound by reading W, which happens once, in the order in which it lies in memory: one stream is what the
processor's own prefetching does best, and it is told far enough ahead besides. The rows of x stay in the first cache. */

#include "native.h"

enum {
    FEW = 4,        /* rows of x */
    GROUP = 4,      /* rows of W whose lanes are added up together */
    OUTPUTS = 64,   /* rows of W to a task */
    AHEAD = 8192    /* bytes */
};

typedef struct {
    const real *x, *w, *bias;
    real *y;
    int64_t rows, inputs, outputs, threads;
} Product;

/* The sums of the lanes of four registers. */
INLINE void sum_lanes(real *restrict sums, const vec *restrict totals) {
#if defined(__AVX512F__) && !defined(REAL_DOUBLE)
    const __m512 a = (__m512)totals[0], b = (__m512)totals[1], c = (__m512)totals[2], d = (__m512)totals[3];
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
    for (int n = 0; n < GROUP; n++) sums[n] = sum_of(totals[n]);
#endif
}

/* totals[r] = the products of row r of x with a row of W, lane by lane, for `rows` rows, a number known when compiled. */
INLINE void multiply(const int rows, const Product *p, const real *restrict w, vec *restrict totals) {
    vec even[FEW] = {0}, odd[FEW] = {0};
    const int64_t inputs = p->inputs;
    int64_t i = 0;
    for (; i + 4 * LANES <= inputs; i += 4 * LANES) {
#pragma GCC unroll 4
        for (int part = 0; part < 4 * VECTOR_BYTES; part += 64) __builtin_prefetch((const char *)(w + i) + AHEAD + part, 0, 0);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const real *x = p->x + r * inputs + i;
            even[r] += load(x) * load(w + i);
            odd[r] += load(x + LANES) * load(w + i + LANES);
            even[r] += load(x + 2 * LANES) * load(w + i + 2 * LANES);
            odd[r] += load(x + 3 * LANES) * load(w + i + 3 * LANES);
        }
    }
    for (; i + LANES <= inputs; i += LANES)
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) even[r] += load(p->x + r * inputs + i) * load(w + i);
    for (int r = 0; r < rows; r++) {
        totals[r] = even[r] + odd[r];
        for (int64_t rest = i; rest < inputs; rest++) totals[r][rest - i] += p->x[r * inputs + rest] * w[rest];
    }
}

INLINE void multiply_group(const int rows, const Product *p, int64_t n, int64_t some) {
    vec totals[FEW][GROUP] = {0};
    for (int64_t i = 0; i < some; i++) {
        vec row[FEW];
        multiply(rows, p, p->w + (n + i) * p->inputs, row);
        for (int r = 0; r < rows; r++) totals[r][i] = row[r];
    }
    for (int r = 0; r < rows; r++) {
        real sums[GROUP];
        sum_lanes(sums, totals[r]);
        for (int64_t i = 0; i < some; i++) p->y[r * p->outputs + n + i] = sums[i] + (p->bias ? p->bias[n + i] : 0);
    }
}

static void linear_task(void *context, int64_t index) {
    const Product *p = context;
    const int64_t end = (index + 1) * OUTPUTS < p->outputs ? (index + 1) * OUTPUTS : p->outputs;
    for (int64_t n = index * OUTPUTS; n < end; n += GROUP) {
        const int64_t some = end - n < GROUP ? end - n : GROUP;
        switch (p->rows) {
        case 1: multiply_group(1, p, n, some); break;
        case 2: multiply_group(2, p, n, some); break;
        case 3: multiply_group(3, p, n, some); break;
        case 4: multiply_group(4, p, n, some); break;
        }
    }
}

/* x: (rows, inputs) with at most FEW rows, w: (outputs, inputs), bias: (outputs) or null, y: (rows, outputs). */
void EXPORT(linear_few)(const Product *product) {
    Product p = *product;
    parallel(linear_task, &p, (p.outputs + OUTPUTS - 1) / OUTPUTS, p.threads);
}
