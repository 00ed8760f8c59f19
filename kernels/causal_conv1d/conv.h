/* The causal depthwise convolution:  a[t] = Σ_k w[k] · x[t − (W−1) + k] + bias,  y = a or silu(a), by channel.

Backward computes a again, and with da = dy · silu′(a)

   dx[s] = Σ_j w[W−1−j] · da[s + j],  dw[k] = Σ_t da[t] · x[t − (W−1) + k],  dbias = Σ_t da[t].

Both are sums of W rows, each times its row of weights, and so is y: `convolve`. A row that does not count, because it
is of another document or outside the sequence, is a row of zeros. Rows lie in memory (B, T, E), and tiles of channels
keep the weights, turned to (W, E), in the first cache. Inputs of another type than that of the arithmetic go through a
ring of converted rows. */

#pragma once

#include <stdlib.h>

#include "native.h"

/* Channels to a tile, and rows to a group, which share the loads of the weights. */
enum { TILE = 256, GROUP = 4 };

/* What kernels/causal_conv1d/native.py packs. Strides are counted in elements; what has none is contiguous. Of the
pointers all but those to x, weight and their gradients may be null. */
typedef struct {
    const void *x, *weight, *bias, *initial, *grad_y, *grad_final;
    const int64_t *documents;
    void *y, *final, *grad_x, *grad_weight, *grad_bias, *grad_initial;
    int64_t batch, length, width, taps, block, silu, threads;
    int64_t x_batch, x_row, initial_batch, initial_row, initial_channel;
    int64_t x_dtype, weight_dtype, bias_dtype, initial_dtype, final_dtype;
    real *partial; /* (blocks, W + 1, E): the gradients of weight and bias; null in the arguments */
} Conv;

/* What a task works with in a tile of channels from `first`: rows of TILE elements. */
typedef struct {
    const Conv *c;
    int64_t first, count, batch;
    real *weights, *reversed, *sums; /* W + 1 rows, the last of them the bias, or nothing */
    real *zeros, *before, *inputs, *grads, *out, *grad_y;
} Tile;

/* ---- sums of rows ------------------------------------------------------------------------------------------------ */

/* out[r] = w[W] + Σ_k w[k] · rows[r + k] for `group` rows, and silu of it. `group` and `taps` are constants. */
INLINE void convolve_fixed(int group, int taps, int silu, const real *const *rows, const real *w, real *const *out, int64_t count) {
    const real *x[GROUP + 3];
    real *restrict y[GROUP];
    for (int r = 0; r < group + taps - 1; r++) x[r] = rows[r];
    for (int r = 0; r < group; r++) y[r] = out[r];
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        real sum[GROUP];
#pragma GCC unroll 4
        for (int r = 0; r < group; r++) sum[r] = w[taps * TILE + i];
#pragma GCC unroll 4
        for (int k = 0; k < taps; k++)
#pragma GCC unroll 4
            for (int r = 0; r < group; r++) sum[r] += x[r + k][i] * w[k * TILE + i];
#pragma GCC unroll 4
        for (int r = 0; r < group; r++) y[r][i] = silu ? sum[r] * logistic_of(sum[r]) : sum[r];
    }
}

static void convolve_any(int64_t taps, int silu, const real *const *rows, const real *w, real *restrict out, int64_t count) {
    memcpy(out, w + taps * TILE, (size_t)count * sizeof(real));
    for (int64_t k = 0; k < taps; k++) {
        const real *restrict row = rows[k];
#pragma omp simd
        for (int64_t i = 0; i < count; i++) out[i] += row[i] * w[k * TILE + i];
    }
    if (!silu) return;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) out[i] *= logistic_of(out[i]);
}

#define CONVOLVE(group, taps) \
    (silu ? convolve_fixed(group, taps, 1, rows, w, out, count) : convolve_fixed(group, taps, 0, rows, w, out, count))

static void convolve_row(int64_t taps, int silu, const real *const *rows, const real *w, real *const *out, int64_t count) {
    switch (taps) {
        case 2: CONVOLVE(1, 2); break;
        case 3: CONVOLVE(1, 3); break;
        case 4: CONVOLVE(1, 4); break;
        default: convolve_any(taps, silu, rows, w, out[0], count);
    }
}

static void convolve_group(int64_t taps, int silu, const real *const *rows, const real *w, real *const *out, int64_t count) {
    switch (taps) {
        case 2: CONVOLVE(GROUP, 2); break;
        case 3: CONVOLVE(GROUP, 3); break;
        case 4: CONVOLVE(GROUP, 4); break;
        default:
            for (int r = 0; r < GROUP; r++) convolve_any(taps, silu, rows + r, w, out[r], count);
    }
}

/* ---- rows -------------------------------------------------------------------------------------------------------- */

/* How many inputs before input t of a batch belong to its document, W − 1 at most. Those before the first are of it. */
INLINE int64_t reach_of(const Conv *c, int64_t batch, int64_t t) {
    int64_t reach = c->taps - 1;
    if (c->documents) {
        const int64_t *document = c->documents + batch * c->length;
        reach = 0;
        while (reach < c->taps - 1 && (reach >= t || document[t - reach] == document[t - reach - 1])) reach++;
    }
    return reach;
}

/* Elements first … first + count of row `row` of the initial state, or zeros where there is none. */
static void load_initial(const Conv *c, int64_t batch, int64_t row, int64_t first, int64_t count, real *to) {
    const int64_t step = c->initial_channel, offset = batch * c->initial_batch + row * c->initial_row + first * step;
    if (!c->initial)
        memset(to, 0, (size_t)count * sizeof(real));
    else if (step == 1)
        load_row(to, c->initial, (int)c->initial_dtype, offset, count);
    else
        for (int64_t i = 0; i < count; i++) load_row(to + i, c->initial, (int)c->initial_dtype, offset + i * step, 1);
}

/* Input t ≥ 0 of the tile, of which the ring holds the last W − 1 + GROUP that were loaded. */
INLINE real *slot_of(const Tile *k, real *ring, int64_t t) {
    return ring + (t + k->c->taps - 1) % (k->c->taps - 1 + GROUP) * TILE;
}

INLINE const real *input_row(const Tile *k, int64_t t) {
    if (t < 0) return k->c->initial ? k->before + (t + k->c->taps - 1) * TILE : k->zeros;
    if (k->c->x_dtype != REAL) return slot_of(k, k->inputs, t);
    return (const real *)k->c->x + k->batch * k->c->x_batch + t * k->c->x_row + k->first;
}

INLINE void load_input(const Tile *k, int64_t t) {
    const Conv *c = k->c;
    if (t < 0 && c->initial)
        load_initial(c, k->batch, t + c->taps - 1, k->first, k->count, k->before + (t + c->taps - 1) * TILE);
    else if (t >= 0 && c->x_dtype != REAL)
        load_row(slot_of(k, k->inputs, t), c->x, (int)c->x_dtype, k->batch * c->x_batch + t * c->x_row + k->first, k->count);
}

INLINE void turn(real *restrict to, const real *restrict weight, int64_t taps, int64_t count) {
    for (int64_t j = 0; j < taps; j++)
#pragma omp simd
        for (int64_t i = 0; i < count; i++) to[j * TILE + i] = weight[i * taps + j];
}

/* The weights of a tile, turned, and the bias below them. */
static void load_weights(const Tile *k) {
    const Conv *c = k->c;
    /* The rows from `before` on, which are more than W, are not in use yet. */
    const real *weight = row_of(k->before, c->weight, (int)c->weight_dtype, k->first * c->taps, k->count * c->taps);
    if (c->taps == 4)
        turn(k->weights, weight, 4, k->count);
    else
        turn(k->weights, weight, c->taps, k->count);
    if (c->bias)
        load_row(k->weights + c->taps * TILE, c->bias, (int)c->bias_dtype, k->first, k->count);
    else
        memset(k->weights + c->taps * TILE, 0, TILE * sizeof(real));
}

/* Memory for a tile. */
static real *make_tile(Tile *k, const Conv *c, int backward) {
    const int64_t taps = c->taps, ring = taps - 1 + GROUP;
    const int64_t rows = 1 + (taps + 1) + (taps - 1) + ring + GROUP + (backward ? 2 * (taps + 1) + ring + 1 : 0);
    real *memory = aligned_alloc(64, (size_t)rows * TILE * sizeof(real)), *next = memory;
    k->c = c;
    k->zeros = next, next += TILE;
    k->weights = next, next += (taps + 1) * TILE;
    k->before = next, next += (taps - 1) * TILE;
    k->inputs = next, next += ring * TILE;
    k->out = next, next += GROUP * TILE;
    memset(k->zeros, 0, TILE * sizeof(real));
    if (backward) {
        k->reversed = next, next += (taps + 1) * TILE;
        k->sums = next, next += (taps + 1) * TILE;
        k->grads = next, next += ring * TILE;
        k->grad_y = next;
    }
    return memory;
}

/* Loads `group` inputs from t on, before which W − 1 have been loaded: all of them are `rows`. */
static void load_group(const Tile *k, int64_t t, int64_t group, const real **rows) {
    for (int64_t r = 0; r < group; r++) load_input(k, t + r);
    for (int64_t j = 0; j < k->c->taps - 1 + group; j++) rows[j] = input_row(k, t - (k->c->taps - 1) + j);
}

/* a[t] or y[t] for `group` rows from t on, each into out[r], of inputs that begin with `rows`. */
static void activate(const Tile *k, int64_t t, int64_t group, int silu, const real *const *rows, real *const *out) {
    const int64_t taps = k->c->taps;
    int whole = group == GROUP;
    for (int64_t r = 0; k->c->documents && r < group; r++) whole &= reach_of(k->c, k->batch, t + r) == taps - 1;
    if (whole) {
        convolve_group(taps, silu, rows, k->weights, out, k->count);
        return;
    }
    for (int64_t r = 0; r < group; r++) {
        const real *seen[taps];
        const int64_t reach = reach_of(k->c, k->batch, t + r);
        for (int64_t j = 0; j < taps; j++) seen[j] = taps - 1 - j <= reach ? rows[r + j] : k->zeros;
        convolve_row(taps, silu, seen, k->weights, out + r, k->count);
    }
}

INLINE int64_t bytes_of_x(const Conv *c) {
    const int64_t size = c->x_dtype == REAL ? (int64_t)sizeof(real) : c->x_dtype == FLOAT32 ? 4 : 2;
    return c->batch * c->length * c->width * size;
}
