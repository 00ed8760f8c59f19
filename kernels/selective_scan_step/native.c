/* One token of the selective scan: h = exp(Δ A) h + Δ u B;  y = (C·h + D u) · silu(z), the states as lanes.
Bound by the state and A: 2 reads and a write of E · N elements. */

#include <stdlib.h>

#include "native.h"

typedef struct {
    const real *state, *u, *delta, *A, *B, *C, *D, *z, *bias;
    real *y, *next;
    int64_t width, states, softplus, block;
} Step;

INLINE real softplus_of(real x) {
    /* log1p of libm: one scalar for N exponentials. */
#ifdef REAL_DOUBLE
    return (x > 0 ? x : x == x ? 0 : x) + __builtin_log1p(__builtin_exp(x > 0 ? -x : x));
#else
    return (x > 0 ? x : x == x ? 0 : x) + __builtin_log1pf(__builtin_expf(x > 0 ? -x : x));
#endif
}

static void step_block(void *context, int64_t index) {
    const Step *s = context;
    const int64_t blocks = (s->width + s->block - 1) / s->block, row = index / blocks, first = index % blocks * s->block;
    const int64_t last = first + s->block < s->width ? first + s->block : s->width;
    const real *B = s->B + row * s->states, *C = s->C + row * s->states;
    for (int64_t e = first; e < last; e++) {
        const int64_t i = row * s->width + e;
        const real *A = s->A + e * s->states, *state = s->state + i * s->states;
        real *next = s->next + i * s->states, x = s->delta[i] + (s->bias ? s->bias[e] : 0);
        const real dt = s->softplus ? softplus_of(x) : x, rate = dt * LOG2_E, drive = dt * s->u[i];
        real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t n = 0; n < s->states; n++) {
            real h = exp2_of(rate * A[n]) * state[n] + drive * B[n];
            next[n] = h;
            sum += h * C[n];
        }
        if (s->D) sum += s->D[e] * s->u[i];
        s->y[i] = s->z ? sum * (s->z[i] * sigmoid_of(s->z[i])) : sum;
    }
}

/* state, next: (rows, width, states); u, delta, z, y: (rows, width); A: (width, states); B, C: (rows, states);
D, bias: (width). D, z and bias may be null. */
void EXPORT(selective_scan_step)(const real *state, const real *u, const real *delta, const real *A, const real *B,
                                 const real *C, const real *D, const real *z, const real *bias, real *y, real *next,
                                 int64_t rows, int64_t width, int64_t states, int64_t softplus, int64_t threads) {
    Step step = {state, u, delta, A, B, C, D, z, bias, y, next, width, states, softplus, 256};
    const int64_t tasks = rows * ((width + 255) / 256);
    /* A thread costs some 20 µs to start, which is the time of about 30,000 elements. */
    const int64_t most = rows * width * states / 65536 + 1;
    parallel(step_block, &step, tasks, threads < most ? threads : most);
}
