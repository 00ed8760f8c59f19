/* What the forward and the backward pass of the selective scan in C share: the arguments, the decay, and the inputs of
some steps of a block of channels.

Channels are lanes: a tile is a register of neighbouring channels, and each of its N states another register. No sum
crosses lanes in the recurrence, and the loads of B_t and C_t serve all channels. */
#pragma once

#include <stdlib.h>

#include "selective_scan/decay.h"

/* (batch, length, …) with a contiguous last dimension; strides in elements. */
typedef struct {
    void *data;
    int64_t row, step, dtype;
} Sequence;

/* The same fields in the same order as in native.py. Optional tensors are null. */
typedef struct {
    Sequence u, delta, z, y, B, C, grad_y, grad_u, grad_delta, grad_z;
    const real *A, *D, *bias, *initial;       /* (E, N), (E), (E), (B, E, N) */
    const unsigned char *starts;              /* (B, T), nonzero where a document begins */
    real *borders, *final;                    /* (J + 1, B, N, E), states before each chunk and the last; (B, E, N) */
    const real *grad_final;                   /* (B, E, N) */
    real *grad_A, *grad_initial;              /* (B, E, N) */
    real *grad_B, *grad_C;                    /* (blocks, B, T, N), a part from each block of channels */
    real *grad_D, *grad_bias;                 /* (B, E) */
    int64_t batch, length, width, states, softplus, threads;
} Scan;

/* Steps between saved states, as in chunks.py; and channels of a task, the same in every variant, so that sums over
channels do not depend on the threads. Measured: 64 and 128 channels are equally fast, 32 are slower. States are padded
with zeros to a multiple of GROUP. */
enum { CHUNK = 32, BLOCK = 64, TILES = BLOCK / LANES, GROUP = 8 };

/* ---- a block of channels --------------------------------------------------------------------------------------------- */

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#define ALIGNED __attribute__((aligned(64)))

/* One task: the channels [first, first + width) of one row of the batch. */
typedef struct {
    const Scan *scan;
    int64_t row, first, width;
    int tiles;
    int64_t states;                   /* N, padded */
    real *rates, *state;              /* (tiles, states) registers: A · log2(e) · DECAY_SCALE, and h */
    const real *B, *C;                /* of the chunk's first step, zeros beyond N, and how far apart steps are */
    int64_t B_step, C_step;
    real *B_rows, *C_rows;            /* (CHUNK, states), for those that cannot be read in place */
    ALIGNED real fastest[BLOCK];      /* the largest magnitude of the rates over the states */
    ALIGNED real D[BLOCK], bias[BLOCK];
    /* CHUNK steps, tile by tile: the slope of softplus, delta after it, u, delta · u and C·h + D u */
    ALIGNED real slope[CHUNK * BLOCK], dt[CHUNK * BLOCK], u[CHUNK * BLOCK], du[CHUNK * BLOCK], y[CHUNK * BLOCK];
    unsigned char careful[TILES];
    int streamed; /* whether results are written past the caches */
} Block;

INLINE real *at(const real *steps, int tile, int64_t step) { return (real *)steps + (tile * CHUNK + step) * LANES; }

/* (E, N) or a row of (B, E, N) → (tiles, states) registers; zeros where there is nothing. */
static void gather_states(const Block *k, const real *from, real *to, real factor) {
    const int64_t N = k->scan->states;
    memset(to, 0, (size_t)(k->tiles * k->states * LANES) * sizeof(real));
    for (int64_t i = 0; from && i < k->width; i++)
        for (int64_t n = 0; n < N; n++)
            to[((i / LANES) * k->states + n) * LANES + i % LANES] = from[(k->first + i) * N + n] * factor;
}

static void scatter_states(const Block *k, const real *from, real *to) {
    const int64_t N = k->scan->states;
    for (int64_t i = 0; i < k->width; i++)
        for (int64_t n = 0; n < N; n++)
            to[(k->first + i) * N + n] = from[((i / LANES) * k->states + n) * LANES + i % LANES];
}

/* The registers of tile and state n, and where a border state (N, E) keeps them. */
INLINE real *registers(const Block *k, real *array, int tile, int64_t n) { return array + (tile * k->states + n) * LANES; }

INLINE real *border(const Block *k, int64_t chunk, int tile, int64_t n) {
    const Scan *s = k->scan;
    return s->borders + ((chunk * s->batch + k->row) * s->states + n) * s->width + k->first + tile * LANES;
}

/* The channels of a tile that exist. */
INLINE void copy_tile(const Block *k, int tile, real *to, const real *from) {
    const int64_t count = k->width - tile * LANES;
    if (count >= LANES) store(to, load(from));
    else memcpy(to, from, (size_t)count * sizeof(real));
}

static real *new_array(int64_t count) {
    return aligned_alloc(64, ((size_t)count * sizeof(real) + 63) / 64 * 64);
}

static Block *open_block(const Scan *s, int64_t index) {
    const int64_t blocks = (s->width + BLOCK - 1) / BLOCK;
    Block *k = aligned_alloc(64, (sizeof(Block) + 63) / 64 * 64);
    memset(k, 0, sizeof(Block));
    k->scan = s;
    k->row = index / blocks;
    k->first = index % blocks * BLOCK;
    k->width = least(BLOCK, s->width - k->first);
    k->tiles = (int)((k->width + LANES - 1) / LANES);
    k->states = (s->states + GROUP - 1) / GROUP * GROUP;
    k->rates = new_array(k->tiles * k->states * LANES);
    k->state = new_array(k->tiles * k->states * LANES);
    k->B_rows = new_array(CHUNK * k->states);
    k->C_rows = new_array(CHUNK * k->states);
    memset(k->B_rows, 0, (size_t)(CHUNK * k->states) * sizeof(real));
    memset(k->C_rows, 0, (size_t)(CHUNK * k->states) * sizeof(real));
    gather_states(k, s->A, k->rates, LOG2_E * DECAY_SCALE);
    for (int64_t i = 0; i < k->width; i++) {
        for (int64_t n = 0; n < s->states; n++) {
            real rate = registers(k, k->rates, (int)(i / LANES), n)[i % LANES];
            rate = rate < 0 ? -rate : rate;
            if (!(rate <= k->fastest[i])) k->fastest[i] = rate;
        }
        if (s->D) k->D[i] = s->D[k->first + i];
        if (s->bias) k->bias[i] = s->bias[k->first + i];
    }
    return k;
}

static void close_block(Block *k) {
    end_stream();
    free(k->rates);
    free(k->state);
    free(k->B_rows);
    free(k->C_rows);
    free(k);
}

/* Where step t of a sequence can be read as whole registers: in place, or in `buffer`, widened and padded with zeros. */
INLINE const real *step_of(real *buffer, const Block *k, const Sequence *x, int64_t t) {
    const int64_t offset = k->row * x->row + t * x->step + k->first;
    if (x->dtype == REAL && k->width % LANES == 0) return (const real *)x->data + offset;
    store(buffer + (k->tiles - 1) * LANES, (vec){0});
    load_row(buffer, x->data, (int)x->dtype, offset, k->width);
    return buffer;
}

INLINE int element_size(const Sequence *x) { return x->dtype == REAL ? sizeof(real) : x->dtype == FLOAT32 ? 4 : 2; }

/* A result (B, T, E) that is about to be written. */
static void expect_result(const Scan *s, const Sequence *x) {
    expect_writes(x->data, s->batch * s->length * s->width * element_size(x));
}

/* Whether a result is written past the caches: whole registers of one too large for them. */
static int is_streamed(const Scan *s, const Sequence *x) {
    const int64_t rows = ((uintptr_t)x->data / sizeof(real)) | (uint64_t)x->row | (uint64_t)x->step | (uint64_t)s->width;
    return x->dtype == REAL && rows % LANES == 0 && s->batch * s->length * s->width * (int64_t)sizeof(real) >= STREAM_FROM;
}

/* Where a step of a result is made: in place, or in `buffer`, from which `finish` stores it. */
INLINE real *place_of(real *buffer, const Block *k, const Sequence *x, int64_t t) {
    if (x->dtype != REAL || k->width % LANES) return buffer;
    return (real *)x->data + k->row * x->row + t * x->step + k->first;
}

INLINE void put(int streamed, real *to, vec value) {
    if (streamed) stream(to, value);
    else store(to, value);
}

INLINE void finish(const real *place, const real *buffer, const Block *k, const Sequence *x, int64_t t) {
    if (place == buffer) store_row(x->data, (int)x->dtype, k->row * x->row + t * x->step + k->first, k->width, buffer);
}

INLINE void prefetch(const Sequence *x, int64_t row, int64_t t, int64_t channel) {
    __builtin_prefetch((const char *)x->data + (row * x->row + t * x->step + channel) * element_size(x));
}

/* The chunk's rows of B or C: where the first one is, and how far apart they are. */
INLINE const real *rows_of(real *buffer, const Block *k, const Sequence *x, int64_t t0, int64_t steps, int64_t *step) {
    const Scan *s = k->scan;
    *step = k->states;
    if (x->dtype == REAL && s->states == k->states) {
        *step = x->step;
        return (const real *)x->data + k->row * x->row + t0 * x->step;
    }
    for (int64_t t = 0; t < steps; t++)
        load_row(buffer + t * k->states, x->data, (int)x->dtype, k->row * x->row + (t0 + t) * x->step, s->states);
    return buffer;
}

/* Load steps t0 … t0 + steps, and make what the recurrence needs of them; `keep` also what the backward pass does. */
INLINE void load_steps(Block *k, int64_t t0, int64_t steps, const int keep) {
    const Scan *s = k->scan;
    real u_buffer[BLOCK], delta_buffer[BLOCK];
    ivec inside[TILES];
    for (int tile = 0; tile < k->tiles; tile++) inside[tile] = (ivec){0} - 1;
    k->B = rows_of(k->B_rows, k, &s->B, t0, steps, &k->B_step);
    k->C = rows_of(k->C_rows, k, &s->C, t0, steps, &k->C_step);
    for (int64_t t = 0; t < steps; t++) {
        const real *u_step = step_of(u_buffer, k, &s->u, t0 + t), *delta = step_of(delta_buffer, k, &s->delta, t0 + t);
        for (int tile = 0; tile < k->tiles; tile++) {
            const int i = tile * LANES;
            vec u = load(u_step + i), raw = load(delta + i) + load(k->bias + i), dt = raw, slope = broadcast(1);
            if (s->softplus) {
                const vec e = fall(raw);
                dt = softplus_of_fall(raw, e);
                if (keep) slope = slope_of_fall(raw, e);
            }
            inside[tile] &= magnitude(dt) * load(k->fastest + i) <= DECAY_RANGE;
            store(at(k->dt, tile, t), dt);
            store(at(k->du, tile, t), dt * u);
            store(at(k->y, tile, t), u * load(k->D + i));
            if (keep) store(at(k->slope, tile, t), slope);
            if (keep) store(at(k->u, tile, t), u);
        }
    }
    for (int tile = 0; tile < k->tiles; tile++) {
        k->careful[tile] = 0;
        for (int i = 0; i < LANES; i++) k->careful[tile] |= !inside[tile][i];
    }
}
