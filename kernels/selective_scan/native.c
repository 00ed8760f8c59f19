/* The selective scan, forward: h_t = exp(Δ_t A) h_{t−1} + Δ_t u_t B_t;  y_t = (C_t·h_t + D u_t) · silu(z_t).

A task is a block of channels. It goes through time in chunks: load and prepare the chunk's inputs row by row, run the
recurrence tile by tile with GROUP states of a tile in registers, then gate and store row by row. For each state and
element that is one exponential (some 10 operations), two multiplications, two multiply-adds, and no load but B and C. */

#include "scan.h"

/* Rows are too far apart for the processor to foresee: ask for the next chunk's inputs and this one's z and y while the
recurrence computes. An address beyond the end is no error. */
INLINE void fetch(const Block *k, int tile, int64_t t) {
    const Scan *s = k->scan;
    const int64_t channel = k->first + tile * LANES;
    prefetch(&s->u, k->row, t + CHUNK, channel);
    prefetch(&s->delta, k->row, t + CHUNK, channel);
    if (s->z.data) prefetch(&s->z, k->row, t, channel);
    if (!k->streamed) prefetch(&s->y, k->row, t, channel);
}

/* `count` states of one tile through a chunk; count and careful are constants of the call. */
INLINE void recur(const int count, const int careful, const Block *k, int tile, int64_t n, int64_t t0, int64_t steps) {
    const Scan *s = k->scan;
    const real *rates = registers(k, k->rates, tile, n), *B = k->B + n, *C = k->C + n;
    const unsigned char *starts = s->starts ? s->starts + k->row * s->length + t0 : 0;
    real *state = registers(k, k->state, tile, n);
    vec h[2 * GROUP];
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) h[i] = load(state + i * LANES);
    for (int64_t t = 0; t < steps; t++, B += k->B_step, C += k->C_step) {
        const vec dt = load(at(k->dt, tile, t)), du = load(at(k->du, tile, t));
        vec y = load(at(k->y, tile, t));
        if (n == 0) fetch(k, tile, t0 + t);
        if (starts && starts[t]) {
#pragma GCC unroll 16
            for (int i = 0; i < count; i++) h[i] = (vec){0};
        }
#pragma GCC unroll 16
        for (int i = 0; i < count; i++) {
            vec x = dt * load(rates + i * LANES);
            h[i] = (careful ? decay_carefully(x) : decay(x)) * h[i] + du * B[i];
            y += h[i] * C[i];
        }
        store(at(k->y, tile, t), y);
    }
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) store(state + i * LANES, h[i]);
}

static void recur_all(const Block *k, int tile, int64_t t0, int64_t steps) {
    int64_t n = 0;
    if (k->careful[tile]) {
        for (; n < k->states; n += GROUP) recur(GROUP, 1, k, tile, n, t0, steps);
        return;
    }
#if defined(__AVX512F__)
    /* 32 registers hold twice as many states. */
    for (; n + 2 * GROUP <= k->states; n += 2 * GROUP) recur(2 * GROUP, 0, k, tile, n, t0, steps);
#endif
    for (; n < k->states; n += GROUP) recur(GROUP, 0, k, tile, n, t0, steps);
}

static void save_border(const Block *k, int64_t chunk) {
    for (int tile = 0; tile < k->tiles; tile++)
        for (int64_t n = 0; n < k->scan->states; n++)
            copy_tile(k, tile, border(k, chunk, tile, n), registers(k, k->state, tile, n));
}

static void store_steps(const Block *k, int64_t t0, int64_t steps) {
    const Scan *s = k->scan;
    real buffer[BLOCK], z_buffer[BLOCK];
    for (int64_t t = 0; t < steps; t++) {
        const real *z = s->z.data ? step_of(z_buffer, k, &s->z, t0 + t) : 0;
        real *y = place_of(buffer, k, &s->y, t0 + t);
        for (int tile = 0; tile < k->tiles; tile++) {
            vec value = load(at(k->y, tile, t));
            if (z) value *= load(z + tile * LANES) * sigmoid(load(z + tile * LANES));
            put(k->streamed, y + tile * LANES, value);
        }
        finish(y, buffer, k, &s->y, t0 + t);
    }
}

static void forward_block(void *context, int64_t index) {
    const Scan *s = context;
    Block *k = open_block(s, index);
    k->streamed = is_streamed(s, &s->y);
    const int64_t row_states = k->row * s->width * s->states;
    gather_states(k, s->initial ? s->initial + row_states : 0, k->state, 1);
    for (int64_t t0 = 0; t0 < s->length; t0 += CHUNK) {
        const int64_t steps = least(CHUNK, s->length - t0);
        if (s->borders) save_border(k, t0 / CHUNK);
        load_steps(k, t0, steps, 0);
        for (int tile = 0; tile < k->tiles; tile++) recur_all(k, tile, t0, steps);
        store_steps(k, t0, steps);
    }
    if (s->borders) save_border(k, (s->length + CHUNK - 1) / CHUNK);
    scatter_states(k, k->state, s->final + row_states);
    close_block(k);
}

void EXPORT(selective_scan_forward)(const Scan *scan) {
    const int64_t blocks = (scan->width + BLOCK - 1) / BLOCK;
    expect_result(scan, &scan->y);
    parallel(forward_block, (void *)scan, scan->batch * blocks, scan->threads);
}

/* ---- the limit ------------------------------------------------------------------------------------------------------ */

/* What no scan can beat: its exponentials alone, in registers. */
static void exponentials_block(void *context, int64_t index) {
    const int64_t count = *(const int64_t *)context, first = index << 20;
    vec x = broadcast((real)-0.5), sum = {0};
    for (int64_t i = first; i < least(first + (1 << 20), count); i += 4 * LANES) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            x -= (real)1e-6;
            sum += decay(x);
        }
    }
    /* The compiler must not see that nobody reads the sum. */
    volatile real read = sum[0];
    (void)read;
}

void EXPORT(exponentials)(int64_t count, int64_t threads) {
    parallel(exponentials_block, &count, (count + (1 << 20) - 1) >> 20, threads);
}
