/* One token of the selective scan: h = exp(Δ A) h + Δ u B;  y = (C·h + D u) · silu(z), the states as lanes.
Bound by the state and A: 2 reads and a write of E · N elements. */

#include "selective_scan/decay.h"

enum { BLOCK = 256 }; /* channels of a task */

typedef struct {
    const real *state, *u, *delta, *A, *B, *C, *D, *z, *bias;
    real *y, *next;
    int64_t width, states, softplus;
} Step;

/* Δ · log2(e), Δ u and silu(z) of a task's channels, whole registers of them. */
typedef struct {
    real rate[BLOCK], drive[BLOCK], gate[BLOCK];
} Channels;

static void prepare(const Step *s, int64_t row, int64_t first, int64_t count, Channels *c) {
    const int64_t from = row * s->width + first, bytes = count * (int64_t)sizeof(real);
    real u[BLOCK], delta[BLOCK], z[BLOCK], bias[BLOCK];
    const int64_t last = (count - 1) / LANES * LANES; /* of the registers: it may have lanes without a channel */
    store(u + last, (vec){0}), store(delta + last, (vec){0}), store(z + last, (vec){0}), store(bias + last, (vec){0});
    memcpy(u, s->u + from, (size_t)bytes);
    memcpy(delta, s->delta + from, (size_t)bytes);
    if (s->z) memcpy(z, s->z + from, (size_t)bytes);
    if (s->bias) memcpy(bias, s->bias + first, (size_t)bytes);
    for (int64_t i = 0; i < count; i += LANES) {
        vec dt = load(delta + i);
        if (s->bias) dt += load(bias + i);
        if (s->softplus) dt = softplus_of_fall(dt, fall(dt));
        store(c->rate + i, dt * LOG2_E);
        store(c->drive + i, dt * load(u + i));
        if (s->z) store(c->gate + i, load(z + i) * sigmoid(load(z + i)));
    }
}

/* The states of a channel after the token, and C·h. */
INLINE real advance(const real *A, const real *state, const real *B, const real *C, real *next, int64_t states, real rate, real drive) {
    int64_t n = 0;
    vec sums = {0};
    for (; n + LANES <= states; n += LANES) {
        const vec h = exponential_of_2(load(A + n) * rate) * load(state + n) + drive * load(B + n);
        store(next + n, h);
        sums += h * load(C + n);
    }
    real sum = sum_of(sums);
    for (; n < states; n++) {
        next[n] = exp2_of(rate * A[n]) * state[n] + drive * B[n];
        sum += next[n] * C[n];
    }
    return sum;
}

static void step_block(void *context, int64_t index) {
    const Step *s = context;
    const int64_t blocks = (s->width + BLOCK - 1) / BLOCK, row = index / blocks, first = index % blocks * BLOCK;
    const int64_t count = s->width - first < BLOCK ? s->width - first : BLOCK;
    const real *B = s->B + row * s->states, *C = s->C + row * s->states;
    Channels c;
    prepare(s, row, first, count, &c);
    for (int64_t e = 0; e < count; e++) {
        const int64_t i = row * s->width + first + e;
        real sum = advance(s->A + (first + e) * s->states, s->state + i * s->states, B, C, s->next + i * s->states,
                           s->states, c.rate[e], c.drive[e]);
        if (s->D) sum += s->D[first + e] * s->u[i];
        s->y[i] = s->z ? sum * c.gate[e] : sum;
    }
}

/* state, next: (rows, width, states); u, delta, z, y: (rows, width); A: (width, states); B, C: (rows, states);
D, bias: (width). D, z and bias may be null. */
void EXPORT(selective_scan_step)(const real *state, const real *u, const real *delta, const real *A, const real *B,
                                 const real *C, const real *D, const real *z, const real *bias, real *y, real *next,
                                 int64_t rows, int64_t width, int64_t states, int64_t softplus, int64_t threads) {
    Step step = {state, u, delta, A, B, C, D, z, bias, y, next, width, states, softplus};
    const int64_t tasks = rows * ((width + BLOCK - 1) / BLOCK);
    /* A thread costs some 20 µs to start, which is the time of about 30,000 elements. */
    const int64_t most = rows * width * states / 65536 + 1;
    parallel(step_block, &step, tasks, threads < most ? threads : most);
}
