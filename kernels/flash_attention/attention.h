/* What the forward and the backward pass of attention share: the call, a tile of rows, its scores against some keys.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, M = H / G, K head width, V value width.

Heads that share keys are taken together: row r of a pair (b, g) is query r / M, head g · M + r % M. A tile is ROWS of
them, held as columns: a register holds one number of LANES rows. The softmax then needs no sum across a register, and
keys and values are read where they lie, one number at a time for all rows. */
#pragma once

#include <stdlib.h>

#include "native.h"

/* Rows of a tile, and the most keys that it meets at a time. Measured: 64 or 128 rows, 64 to 192 keys differ by 5 %. */
enum { ROWS = 64, KEYS = 96 };

/* The same fields in the same order as in native.py; every one takes 8 bytes. Optional tensors are null. */
typedef struct {
    const void *q, *k, *v, *out, *grad;
    const real *slopes, *sinks;            /* (H) */
    const unsigned char *mask;             /* (B, S), 0 for a key that does not count */
    const int64_t *documents;              /* (B, S) */
    real *lse;                             /* (B · G, T · M), in units of ln 2, +inf for a row that sees no key */
    void *made, *grad_q, *grad_k, *grad_v; /* as out, q, k, v, contiguous */
    real *grad_slopes, *grad_sinks;        /* (H) */
    int64_t q_strides[3], k_strides[3], v_strides[3], grad_strides[3]; /* of batch, position, head */
    int64_t B, T, S, H, G, K, V, dtype, causal, window, threads;       /* window 0: none */
    double scale, softcap;                                             /* softcap 0: none */
} Attention;

static const real INFINITE = (real)__builtin_inf();

INLINE int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }
INLINE int64_t most(int64_t x, int64_t y) { return x > y ? x : y; }
INLINE int64_t rounded_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
INLINE int64_t sharing(const Attention *a) { return a->H / a->G; }

/* ---- exponentials ------------------------------------------------------------------------------------------------ */

/* Unsigned, because the bits of infinity and NaN overflow below, which then does not matter. */
#ifdef REAL_DOUBLE
typedef uint64_t bits_vec __attribute__((vector_size(VECTOR_BYTES)));
#else
typedef uint32_t bits_vec __attribute__((vector_size(VECTOR_BYTES)));
#endif

/* 2^x = power · (1 + returned) for |x| ≤ 126 (1022), which of NaN is NaN. Near 0 the returned part keeps its digits. */
INLINE vec exp2_parts(vec x, vec *power) {
#ifdef REAL_DOUBLE
    enum { MANTISSA = 52 };
    const vec shifted = x + 0x1.8p52, f = x - (shifted - 0x1.8p52);
    const uint64_t one = (uint64_t)1023 << MANTISSA;
    vec p = f * 1.3691488853904128881e-12 + 2.5678435993488205141e-11;
    p = p * f + 4.4455382718708114976e-10;
    p = p * f + 7.0549116208011233299e-9;
    p = p * f + 1.0178086009239699728e-7;
    p = p * f + 1.3215486790144309488e-6;
    p = p * f + 1.5252733804059840280e-5;
    p = p * f + 1.5403530393381609954e-4;
    p = p * f + 1.3333558146428443423e-3;
    p = p * f + 9.6181291076284771619e-3;
    p = p * f + 5.5504108664821579953e-2;
    p = p * f + 2.4022650695910071233e-1;
    p = p * f + 6.9314718055994530942e-1;
#else
    enum { MANTISSA = 23 };
    const vec shifted = x + 0x1.8p23f, f = x - (shifted - 0x1.8p23f);
    const uint32_t one = 127u << MANTISSA;
    vec p = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
#endif
    *power = (vec)(((bits_vec)shifted << MANTISSA) + one);
    return p * f;
}

/* 2^x for x ≤ 126, and 0 below NEGLIGIBLE: products with denormal numbers are slow, and ALiBi makes many of them. */
#ifdef REAL_DOUBLE
#define NEGLIGIBLE (-900)
#else
#define NEGLIGIBLE (-90)
#endif
INLINE vec exp2_to_zero(vec x) {
    vec power, rest = exp2_parts(x, &power);
    return choose(x < (real)NEGLIGIBLE, (vec){}, rest * power + power);
}

/* tanh(x / (2 · log2 e)) = (e − 1) / (e + 1) with e = 2^x, and its slope by the argument of tanh, 4 e / (e + 1)²: both
keep their digits near 0 and where tanh saturates. */
INLINE vec tanh_of_scaled(vec x, vec *slope) {
    const real bound = 60; /* here tanh is 1, and the square below does not overflow */
    vec power, bounded = choose(x > bound, broadcast(bound), x);
    const vec rest = exp2_parts(choose(bounded < -bound, broadcast(-bound), bounded), &power);
    const vec less_one = rest * power + (power - 1), more_one = less_one + 2;
    *slope = 4 * (rest * power + power) / (more_one * more_one);
    return less_one / more_one;
}

/* ---- products ---------------------------------------------------------------------------------------------------- */

/* to[o][l] (+)= Σ_i factor(o, i) · from[i][l] for l over lanes, with factor(o, i) = factors[o · outer + i · inner]. */
typedef struct {
    real *to;
    const real *factors, *from;
    int64_t to_stride, outer, inner, from_stride, outs, lanes, terms;
    int add;
} Product;

/* Sums of a product that are held in registers: DEEP outs by ACROSS registers of lanes. */
#ifdef __AVX512F__
enum { ACROSS = 4, DEEP = 4 };
#else
enum { ACROSS = 2, DEEP = 4 };
#endif

INLINE void product_tile(const Product *p, int64_t out, int64_t lane, const int deep, const int across) {
    real *to = p->to + out * p->to_stride + lane;
    const real *factors = p->factors + out * p->outer, *from = p->from + lane;
    const int64_t outer = p->outer, inner = p->inner, to_stride = p->to_stride, from_stride = p->from_stride;
    vec sum[DEEP][ACROSS];
#pragma GCC unroll 8
    for (int o = 0; o < deep; o++)
#pragma GCC unroll 8
        for (int l = 0; l < across; l++) sum[o][l] = p->add ? load(to + o * to_stride + l * LANES) : (vec){};
    for (int64_t i = p->terms; i > 0; i--, factors += inner, from += from_stride) {
        vec x[ACROSS];
#pragma GCC unroll 8
        for (int l = 0; l < across; l++) x[l] = load(from + l * LANES);
#pragma GCC unroll 8
        for (int o = 0; o < deep; o++) {
            const vec factor = broadcast(factors[o * outer]);
#pragma GCC unroll 8
            for (int l = 0; l < across; l++) sum[o][l] += factor * x[l];
        }
    }
#pragma GCC unroll 8
    for (int o = 0; o < deep; o++)
#pragma GCC unroll 8
        for (int l = 0; l < across; l++) store(to + o * to_stride + l * LANES, sum[o][l]);
}

static __attribute__((noinline)) void product(Product p) {
    int64_t lane = 0, out;
    for (; lane + ACROSS * LANES <= p.lanes; lane += ACROSS * LANES) {
        for (out = 0; out + DEEP <= p.outs; out += DEEP) product_tile(&p, out, lane, DEEP, ACROSS);
        for (; out < p.outs; out++) product_tile(&p, out, lane, 1, ACROSS);
    }
    for (; lane < p.lanes; lane += LANES) {
        for (out = 0; out + DEEP <= p.outs; out += DEEP) product_tile(&p, out, lane, DEEP, 1);
        for (; out < p.outs; out++) product_tile(&p, out, lane, 1, 1);
    }
}

/* Four numbers, in whatever registers there are. */
typedef real quad __attribute__((vector_size(4 * REAL_BYTES)));
typedef real quad_at __attribute__((vector_size(4 * REAL_BYTES), aligned(1), may_alias));
#ifdef __clang__
#define PICK(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
typedef integer quad_index __attribute__((vector_size(4 * REAL_BYTES)));
#define PICK(x, y, ...) __builtin_shuffle(x, y, (quad_index){__VA_ARGS__})
#endif

/* to[i][r] = factor · from[r][i], in squares of four where they fit. */
static void transpose(const real *restrict from, int64_t from_stride, int64_t rows, int64_t width, real factor,
                      real *restrict to, int64_t to_stride) {
    const int64_t squares = width - width % 4, in_squares = rows - rows % 4;
    for (int64_t r = 0; r < in_squares; r += 4)
        for (int64_t i = 0; i < squares; i += 4) {
            const real *at = from + r * from_stride + i;
            const quad a = *(const quad_at *)at, b = *(const quad_at *)(at + from_stride);
            const quad c = *(const quad_at *)(at + 2 * from_stride), d = *(const quad_at *)(at + 3 * from_stride);
            const quad low_ab = PICK(a, b, 0, 4, 1, 5), low_cd = PICK(c, d, 0, 4, 1, 5);
            const quad high_ab = PICK(a, b, 2, 6, 3, 7), high_cd = PICK(c, d, 2, 6, 3, 7);
            real *out = to + i * to_stride + r;
            *(quad_at *)out = PICK(low_ab, low_cd, 0, 1, 4, 5) * factor;
            *(quad_at *)(out + to_stride) = PICK(low_ab, low_cd, 2, 3, 6, 7) * factor;
            *(quad_at *)(out + 2 * to_stride) = PICK(high_ab, high_cd, 0, 1, 4, 5) * factor;
            *(quad_at *)(out + 3 * to_stride) = PICK(high_ab, high_cd, 2, 3, 6, 7) * factor;
        }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = r < in_squares ? squares : 0; i < width; i++)
            to[i * to_stride + r] = factor * from[r * from_stride + i];
}
