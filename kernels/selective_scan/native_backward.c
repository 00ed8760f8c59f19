/* The gradients of the selective scan, chunk by chunk from the last to the first, with the formulas of backward.py.

For a tile and GROUP states the chunk is run again from its saved border, keeping each decay and each
state; then time runs backward with the states' gradients in registers. B_t and C_t are shared by all
channels: their gradients are sums over lanes, which 15 shuffled additions make of 16 registers at once. */

#include "scan.h"

/* ---- sums over lanes ------------------------------------------------------------------------------------------------ */

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* One step: lanes in blocks of 1, 2, 4 or 8, alternately of a and of b, each the sum of two blocks of its source. */
#if LANES == 16
INLINE vec merge1(vec a, vec b) {
    return SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}
INLINE vec merge2(vec a, vec b) {
    return SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
INLINE vec merge4(vec a, vec b) {
    return SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
}
INLINE vec merge8(vec a, vec b) {
    return SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
#elif LANES == 8
INLINE vec merge1(vec a, vec b) {
    return SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
}
INLINE vec merge2(vec a, vec b) {
    return SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
}
INLINE vec merge4(vec a, vec b) {
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
#elif LANES == 4
INLINE vec merge1(vec a, vec b) { return SHUFFLE(a, b, 0, 4, 2, 6) + SHUFFLE(a, b, 1, 5, 3, 7); }
INLINE vec merge2(vec a, vec b) { return SHUFFLE(a, b, 0, 1, 4, 5) + SHUFFLE(a, b, 2, 3, 6, 7); }
#else
INLINE vec merge1(vec a, vec b) { return SHUFFLE(a, b, 0, 2) + SHUFFLE(a, b, 1, 3); }
#endif

/* Lane i of the result is the sum of the lanes of v[i]. */
INLINE vec sums_over_lanes(const vec *v) {
    vec pairs[LANES / 2];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) pairs[i] = merge1(v[2 * i], v[2 * i + 1]);
#if LANES >= 4
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 4; i++) pairs[i] = merge2(pairs[2 * i], pairs[2 * i + 1]);
#endif
#if LANES >= 8
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 8; i++) pairs[i] = merge4(pairs[2 * i], pairs[2 * i + 1]);
#endif
#if LANES >= 16
    pairs[0] = merge8(pairs[0], pairs[1]);
#endif
    return pairs[0];
}

/* ---- a block of channels ---------------------------------------------------------------------------------------------- */

enum { SUMS = 2 * GROUP };

typedef struct {
    Block *block;
    real *grad_state, *grad_rates; /* (tiles, states) registers: what the later steps say of h, and the gradient of A */
    real *sums;                    /* (CHUNK, states / GROUP, 2 · GROUP): the gradients of C and B of some states */
    ALIGNED real grad_D[BLOCK], grad_bias[BLOCK];
    /* tile by tile: the gradient of C·h + D u; Σ g B and Σ g P · rate over the states */
    ALIGNED real grad[CHUNK * BLOCK], grad_gate[CHUNK * BLOCK], by_input[CHUNK * BLOCK], by_decay[CHUNK * BLOCK];
    ALIGNED real decays[CHUNK * GROUP * LANES], after[(CHUNK + 1) * GROUP * LANES]; /* of one tile and group */
    ALIGNED real zeros[GROUP * LANES];
} Backward;

/* As in native.c, against time: ask for the inputs of the chunk before, and for where this one's results go. */
INLINE void fetch(const Block *k, int tile, int64_t t) {
    const Scan *s = k->scan;
    const int64_t channel = k->first + tile * LANES;
    prefetch(&s->u, k->row, t - CHUNK, channel);
    prefetch(&s->delta, k->row, t - CHUNK, channel);
    prefetch(&s->grad_y, k->row, t - CHUNK, channel);
    if (s->z.data) prefetch(&s->z, k->row, t - CHUNK, channel);
    if (k->streamed) return;
    prefetch(&s->grad_u, k->row, t, channel);
    prefetch(&s->grad_delta, k->row, t, channel);
    if (s->z.data) prefetch(&s->grad_z, k->row, t, channel);
}

/* Written out, because memset would keep the registers in memory. */
INLINE void clear(vec *registers) {
#pragma GCC unroll 8
    for (int i = 0; i < GROUP; i++) registers[i] = (vec){0};
}

/* The chunk again, for the states n … n + GROUP of one tile. */
INLINE void recompute(const int careful, Backward *w, int tile, int64_t n, int64_t t0, int64_t steps, const unsigned char *starts) {
    const Block *k = w->block;
    const real *rates = registers(k, k->rates, tile, n), *state = registers(k, k->state, tile, n);
    const real *B = k->B + n, *C = k->C + n;
    vec h[GROUP], rate[GROUP];
#pragma GCC unroll 8
    for (int i = 0; i < GROUP; i++) {
        h[i] = load(state + i * LANES), rate[i] = load(rates + i * LANES);
        store(w->after + i * LANES, h[i]);
    }
    for (int64_t t = 0; t < steps; t++, B += k->B_step, C += k->C_step) {
        const vec dt = load(at(k->dt, tile, t)), du = load(at(k->du, tile, t));
        vec y = load(at(k->y, tile, t));
        if (n == 0) fetch(k, tile, t0 + t);
        if (starts && starts[t]) clear(h);
#pragma GCC unroll 8
        for (int i = 0; i < GROUP; i++) {
            vec x = dt * rate[i], e = careful ? decay_carefully(x) : decay(x);
            store(w->decays + (t * GROUP + i) * LANES, e);
            h[i] = e * h[i] + du * B[i];
            store(w->after + ((t + 1) * GROUP + i) * LANES, h[i]);
            y += h[i] * C[i];
        }
        store(at(k->y, tile, t), y);
    }
}

INLINE void reverse(Backward *w, int tile, int64_t n, int64_t steps, const unsigned char *starts) {
    const Block *k = w->block;
    const real *rates = registers(k, k->rates, tile, n);
    real *carried = registers(k, w->grad_state, tile, n), *grad_rates = registers(k, w->grad_rates, tile, n);
    vec carry[GROUP], grad_rate[GROUP];
#pragma GCC unroll 8
    for (int i = 0; i < GROUP; i++) carry[i] = load(carried + i * LANES), grad_rate[i] = (vec){0};
    for (int64_t t = steps - 1; t >= 0; t--) {
        const vec dt = load(at(k->dt, tile, t)), du = load(at(k->du, tile, t)), grad = load(at(w->grad, tile, t));
        const real *B = k->B + t * k->B_step + n, *C = k->C + t * k->C_step + n;
        const real *before = starts && starts[t] ? w->zeros : w->after + t * GROUP * LANES;
        const real *after = w->after + (t + 1) * GROUP * LANES, *decays = w->decays + t * GROUP * LANES;
        vec by_input = load(at(w->by_input, tile, t)), by_decay = load(at(w->by_decay, tile, t)), parts[SUMS];
#pragma GCC unroll 8
        for (int i = 0; i < GROUP; i++) {
            const vec g = carry[i] + grad * C[i];
            carry[i] = load(decays + i * LANES) * g;
            const vec through = carry[i] * load(before + i * LANES);
            parts[i] = grad * load(after + i * LANES);
            parts[GROUP + i] = g * du;
            by_input += g * B[i];
            by_decay += through * load(rates + i * LANES);
            grad_rate[i] += through * dt;
        }
        if (starts && starts[t]) clear(carry);
        store(at(w->by_input, tile, t), by_input);
        store(at(w->by_decay, tile, t), by_decay);
        real *sums = w->sums + (t * k->states + n) * 2;
#pragma GCC unroll 8
        for (int i = 0; i < SUMS; i += LANES) store(sums + i, load(sums + i) + sums_over_lanes(parts + i));
    }
#pragma GCC unroll 8
    for (int i = 0; i < GROUP; i++) {
        store(carried + i * LANES, carry[i]);
        store(grad_rates + i * LANES, load(grad_rates + i * LANES) + grad_rate[i]);
    }
}

/* The gradient of C·h + D u, from that of y. */
static void load_grad(Backward *w, int64_t t0, int64_t steps) {
    const Block *k = w->block;
    const Scan *s = k->scan;
    real buffer[BLOCK], z_buffer[BLOCK];
    for (int64_t t = 0; t < steps; t++) {
        const real *grad_y = step_of(buffer, k, &s->grad_y, t0 + t);
        const real *z = s->z.data ? step_of(z_buffer, k, &s->z, t0 + t) : 0;
        for (int tile = 0; tile < k->tiles; tile++) {
            vec grad = load(grad_y + tile * LANES);
            if (z) {
                const vec z_tile = load(z + tile * LANES), gate = sigmoid(z_tile);
                /* of z times that of y: the product with y is the gradient of z */
                store(at(w->grad_gate, tile, t), grad * (gate + z_tile * (gate * (1 - gate))));
                grad *= z_tile * gate;
            }
            store(at(w->grad, tile, t), grad);
        }
    }
}

/* The gradients of the inputs of each step. */
static void store_grads(Backward *w, int64_t t0, int64_t steps) {
    const Block *k = w->block;
    const Scan *s = k->scan;
    real u_buffer[BLOCK], delta_buffer[BLOCK], z_buffer[BLOCK];
    for (int64_t t = 0; t < steps; t++) {
        real *grad_u = place_of(u_buffer, k, &s->grad_u, t0 + t), *grad_z = z_buffer;
        real *grad_delta = place_of(delta_buffer, k, &s->grad_delta, t0 + t);
        if (s->z.data) grad_z = place_of(z_buffer, k, &s->grad_z, t0 + t);
        for (int tile = 0; tile < k->tiles; tile++) {
            const int i = tile * LANES;
            const vec grad = load(at(w->grad, tile, t)), u = load(at(k->u, tile, t));
            const vec by_input = load(at(w->by_input, tile, t));
            vec delta = load(at(w->by_decay, tile, t)) * (real)(1 / (LOG2_E * DECAY_SCALE)) + u * by_input;
            delta *= load(at(k->slope, tile, t));
            put(k->streamed, grad_u + i, load(at(k->dt, tile, t)) * by_input + load(k->D + i) * grad);
            put(k->streamed, grad_delta + i, delta);
            store(w->grad_bias + i, load(w->grad_bias + i) + delta);
            store(w->grad_D + i, load(w->grad_D + i) + grad * u);
            if (s->z.data) put(k->streamed, grad_z + i, load(at(w->grad_gate, tile, t)) * load(at(k->y, tile, t)));
        }
        finish(grad_u, u_buffer, k, &s->grad_u, t0 + t);
        finish(grad_delta, delta_buffer, k, &s->grad_delta, t0 + t);
        if (s->z.data) finish(grad_z, z_buffer, k, &s->grad_z, t0 + t);
    }
}

/* This block's part of the gradients of B and C. */
static void store_sums(const Backward *w, int64_t t0, int64_t steps) {
    const Block *k = w->block;
    const Scan *s = k->scan;
    for (int64_t t = 0; t < steps; t++) {
        const int64_t to = ((k->first / BLOCK * s->batch + k->row) * s->length + t0 + t) * s->states;
        for (int64_t n = 0; n < s->states; n++) {
            const real *sums = w->sums + (t * k->states + n / GROUP * GROUP) * 2 + n % GROUP;
            s->grad_C[to + n] = sums[0];
            s->grad_B[to + n] = sums[GROUP];
        }
    }
}

static void backward_block(void *context, int64_t index) {
    const Scan *s = context;
    Block *k = open_block(s, index);
    k->streamed = is_streamed(s, &s->grad_u) && is_streamed(s, &s->grad_delta);
    if (s->z.data) k->streamed = k->streamed && is_streamed(s, &s->grad_z);
    Backward *w = aligned_alloc(64, (sizeof(Backward) + 63) / 64 * 64);
    memset(w, 0, sizeof *w);
    w->block = k;
    w->grad_state = new_array(k->tiles * k->states * LANES);
    w->grad_rates = new_array(k->tiles * k->states * LANES);
    w->sums = new_array(CHUNK * k->states * 2);
    const int64_t row_states = k->row * s->width * s->states;
    gather_states(k, 0, w->grad_rates, 1);
    gather_states(k, 0, k->state, 1);
    gather_states(k, s->grad_final ? s->grad_final + row_states : 0, w->grad_state, 1);
    for (int64_t chunk = (s->length + CHUNK - 1) / CHUNK - 1; chunk >= 0; chunk--) {
        const int64_t t0 = chunk * CHUNK, steps = least(CHUNK, s->length - t0);
        const unsigned char *starts = s->starts ? s->starts + k->row * s->length + t0 : 0;
        for (int tile = 0; tile < k->tiles; tile++)
            for (int64_t n = 0; n < s->states; n++)
                copy_tile(k, tile, registers(k, k->state, tile, n), border(k, chunk, tile, n));
        memset(w->by_input, 0, sizeof w->by_input);
        memset(w->by_decay, 0, sizeof w->by_decay);
        memset(w->sums, 0, (size_t)(CHUNK * k->states * 2) * sizeof(real));
        load_steps(k, t0, steps, 1);
        load_grad(w, t0, steps);
        for (int tile = 0; tile < k->tiles; tile++)
            for (int64_t n = 0; n < k->states; n += GROUP) {
                if (k->careful[tile]) recompute(1, w, tile, n, t0, steps, starts);
                else recompute(0, w, tile, n, t0, steps, starts);
                reverse(w, tile, n, steps, starts);
            }
        store_grads(w, t0, steps);
        store_sums(w, t0, steps);
    }
    scatter_states(k, w->grad_rates, s->grad_A + row_states);
    if (s->grad_initial) scatter_states(k, w->grad_state, s->grad_initial + row_states);
    const size_t bytes = (size_t)k->width * sizeof(real);
    memcpy(s->grad_D + k->row * s->width + k->first, w->grad_D, bytes);
    memcpy(s->grad_bias + k->row * s->width + k->first, w->grad_bias, bytes);
    free(w->grad_state);
    free(w->grad_rates);
    free(w->sums);
    free(w);
    close_block(k);
}

void EXPORT(selective_scan_backward)(const Scan *scan) {
    const int64_t blocks = (scan->width + BLOCK - 1) / BLOCK;
    expect_result(scan, &scan->grad_u);
    expect_result(scan, &scan->grad_delta);
    expect_result(scan, &scan->grad_z);
    parallel(backward_block, (void *)scan, scan->batch * blocks, scan->threads);
}
