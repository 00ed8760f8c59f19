/* The gates y = activation(gate) · up of SwiGLU and GeGLU; activation is x · p(x) with a probability p:

   silu       p = σ(x)
   gelu_tanh  p = (1 + tanh u) / 2 = σ(2u),  2u = √(8/π) · x · (1 + 0.044715 x²)
   gelu_erf   p = Φ(x), the normal distribution

Backward computes them again:  dup = dy · x · p,  dgate = dy · up · (p + x · p′).
Bound by memory: forward reads 2 elements and writes 1, backward reads 3 and writes 2. */

#include "native.h"

enum { SILU = 0, GELU_TANH = 1, GELU_ERF = 2 };

/* Elements to a task, and to a step within it, whose buffers stay in the first cache. */
enum { BLOCK = 1 << 16, STEP = 1024 };

/* What kernels/swiglu/native.py packs. Element i stands at row i / width, column i % width; rows lie a stride apart.
The results are contiguous. With `uniform` all elements of grad are its first. */
typedef struct {
    const void *gate, *up, *grad;
    void *out, *grad_gate, *grad_up;
    int64_t count, width, gate_stride, up_stride, grad_stride, uniform, dtype, activation, threads;
} Gate;

/* ---- activations ------------------------------------------------------------------------------------------------- */

/* Φ(−z) = exp(−z²/2) · t · P(1 − 8t) with t = 1 / (z + 4), for z ≥ 0: a Chebyshev fit of the scaled complementary error
function, with relative error 3e-9 before rounding in float, 1e-17 in double. */
INLINE real tail_of(real z, real gauss) {
    const real t = 1 / (z + 4), s = 1 - 8 * t;
#ifdef REAL_DOUBLE
    real p = -1.1997782031253095e-10;
    p = p * s - 1.6886576966786735e-09;
    p = p * s - 5.8736267649871908e-10;
    p = p * s + 1.60673869573294e-08;
    p = p * s + 1.7844927772981415e-08;
    p = p * s - 7.8783603426936384e-08;
    p = p * s - 1.597739614223922e-07;
    p = p * s + 2.6473372819798679e-07;
    p = p * s + 1.0247851016552774e-06;
    p = p * s - 6.2495510775651778e-07;
    p = p * s - 5.9216110459239778e-06;
    p = p * s + 7.1460215312674618e-07;
    p = p * s + 3.5145111902837653e-05;
    p = p * s - 1.907676030719098e-06;
    p = p * s - 0.00023109501736277426;
    p = p * s + 0.00013334420916014778;
    p = p * s + 0.0016308184674099085;
    p = p * s - 0.0034796923566515025;
    p = p * s - 0.0075401889673863123;
    p = p * s + 0.060396574890360918;
    p = p * s - 0.18652185795963661;
    p = p * s + 0.38713740074222658;
    p = p * s - 0.6078966419718923;
    p = p * s + 0.7552851304157514;
#else
    real p = -0.000157320566f;
    p = p * s + 0.000129325679f;
    p = p * s + 0.00156378688f;
    p = p * s - 0.0034761678f;
    p = p * s - 0.00751223136f;
    p = p * s + 0.0603952967f;
    p = p * s - 0.186526716f;
    p = p * s + 0.387137562f;
    p = p * s - 0.607896388f;
    p = p * s + 0.755285144f;
#endif
    return gauss * t * p;
}

/* p(x), and its derivative. */
INLINE real probability(int activation, real x, real *slope) {
    if (activation == GELU_ERF) {
        const real gauss = exp_of((real)-0.5 * x * x), tail = tail_of(x < 0 ? -x : x, gauss);
        *slope = gauss * (real)0.39894228040143267794; /* 1/√(2π) */
        return x < 0 ? tail : 1 - tail;
    }
    const real root = (real)1.5957691216057307118, square = x * x; /* √(8/π) */
    const real p = logistic_of(activation == SILU ? x : root * x * (1 + (real)0.044715 * square));
    /* Beyond x² = 1e4 the product p · (1 − p) is 0, which must not meet an overflown square. */
    const real bounded = square > 10000 ? 10000 : square;
    *slope = p * (1 - p) * (activation == SILU ? 1 : root * (1 + (real)0.134145 * bounded));
    return p;
}

INLINE void forward_step(int activation, const real *gate, const real *up, real *restrict out, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        real slope;
        out[i] = gate[i] * probability(activation, gate[i], &slope) * up[i];
    }
}

INLINE void backward_step(int activation, const real *grad, const real *gate, const real *up,
                          real *restrict grad_gate, real *restrict grad_up, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        real slope, p = probability(activation, gate[i], &slope);
        grad_gate[i] = grad[i] * up[i] * (p + gate[i] * slope);
        grad_up[i] = grad[i] * (gate[i] * p);
    }
}

/* ---- tasks ------------------------------------------------------------------------------------------------------- */

INLINE int64_t offset_of(const Gate *g, int64_t element, int64_t stride) {
    return g->width == g->count ? element : element / g->width * stride + element % g->width;
}

/* The elements from `element` on that one step takes: of one row, and of one task. */
INLINE int64_t step_from(const Gate *g, int64_t element, int64_t end) {
    int64_t row = g->width == g->count ? STEP : g->width - element % g->width;
    int64_t count = end - element < STEP ? end - element : STEP;
    return row < count ? row : count;
}

/* Whether a step's result is computed where it belongs, and need not be put there. */
INLINE int in_place(const Gate *g, const void *result) {
    const int streams = g->count * (int64_t)sizeof(real) >= STREAM_FROM && g->width == g->count && !((uintptr_t)result & 63);
    return g->dtype == REAL && !streams;
}

INLINE void put(const Gate *g, void *to, int64_t offset, int64_t count, const real *from) {
    if (g->dtype == REAL)
        stream_row((real *)to + offset, from, count);
    else
        store_row(to, (int)g->dtype, offset, count, from);
}

static void forward_task(void *context, int64_t index) {
    const Gate *g = context;
    const int dtype = (int)g->dtype, direct = in_place(g, g->out);
    real buffers[3][STEP] __attribute__((aligned(64)));
    const int64_t begin = index * BLOCK, end = begin + BLOCK < g->count ? begin + BLOCK : g->count;
    for (int64_t i = begin, count; i < end; i += count) {
        count = step_from(g, i, end);
        const real *gate = row_of(buffers[0], g->gate, dtype, offset_of(g, i, g->gate_stride), count);
        const real *up = row_of(buffers[1], g->up, dtype, offset_of(g, i, g->up_stride), count);
        real *out = direct ? (real *)g->out + i : buffers[2];
        switch (g->activation) {
            case SILU: forward_step(SILU, gate, up, out, count); break;
            case GELU_TANH: forward_step(GELU_TANH, gate, up, out, count); break;
            default: forward_step(GELU_ERF, gate, up, out, count);
        }
        if (!direct) put(g, g->out, i, count, out);
    }
    end_stream();
}

static void backward_task(void *context, int64_t index) {
    const Gate *g = context;
    const int dtype = (int)g->dtype, direct = in_place(g, g->grad_gate) || in_place(g, g->grad_up);
    real buffers[5][STEP] __attribute__((aligned(64)));
    const int64_t begin = index * BLOCK, end = begin + BLOCK < g->count ? begin + BLOCK : g->count;
    if (g->uniform) {
        load_row(buffers[0], g->grad, dtype, 0, 1);
        for (int i = 1; i < STEP; i++) buffers[0][i] = buffers[0][0];
    }
    for (int64_t i = begin, count; i < end; i += count) {
        count = step_from(g, i, end);
        const real *grad = buffers[0];
        if (!g->uniform) grad = row_of(buffers[0], g->grad, dtype, offset_of(g, i, g->grad_stride), count);
        const real *gate = row_of(buffers[1], g->gate, dtype, offset_of(g, i, g->gate_stride), count);
        const real *up = row_of(buffers[2], g->up, dtype, offset_of(g, i, g->up_stride), count);
        real *grad_gate = direct ? (real *)g->grad_gate + i : buffers[3];
        real *grad_up = direct ? (real *)g->grad_up + i : buffers[4];
        switch (g->activation) {
            case SILU: backward_step(SILU, grad, gate, up, grad_gate, grad_up, count); break;
            case GELU_TANH: backward_step(GELU_TANH, grad, gate, up, grad_gate, grad_up, count); break;
            default: backward_step(GELU_ERF, grad, gate, up, grad_gate, grad_up, count);
        }
        if (direct) continue;
        put(g, g->grad_gate, i, count, grad_gate);
        put(g, g->grad_up, i, count, grad_up);
    }
    end_stream();
}

INLINE int64_t bytes_of(const Gate *g) { return g->dtype == REAL ? (int64_t)sizeof(real) : 2; }

void EXPORT(gate_forward)(const Gate *gate) {
    expect_writes(gate->out, gate->count * bytes_of(gate));
    parallel(forward_task, (void *)gate, (gate->count + BLOCK - 1) / BLOCK, gate->threads);
}

void EXPORT(gate_backward)(const Gate *gate) {
    expect_writes(gate->grad_gate, gate->count * bytes_of(gate));
    expect_writes(gate->grad_up, gate->count * bytes_of(gate));
    parallel(backward_task, (void *)gate, (gate->count + BLOCK - 1) / BLOCK, gate->threads);
}
