/* What the forward and the backward pass of the selective scan in C share: the arguments, the decay, and the inputs of
some steps of a block of channels.

Channels are lanes: a tile is a register of neighbouring channels, and each of its N states another register. No sum
crosses lanes in the recurrence, and the loads of B_t and C_t serve all channels. */
#pragma once

#include <stdlib.h>

#include "native.h"

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

/* ---- the decay ---------------------------------------------------------------------------------------------------- */

/* decay(x) = 2^(x / DECAY_SCALE) for |x| ≤ DECAY_RANGE. The polynomials are least maximal fits with the value at 0 exact
and the slope there to 5e-9: the error of a slow decay is paid at every step of a long memory. Where a permutation looks
2^(i/16) up in a register, three terms reach 2e-9 (with 8 entries 3e-8, without a table six terms 2e-9). The entries are
bit patterns less i << 19 (i << 20), which the shifted exponent adds back.

It is the multipliers that are busy, not the adders. So x comes in the unit in which the polynomial, all of it times
2.2524…, begins with f³, and its first step is an addition; the entries hold 1 / 2.2524…, which times it is 1 to 3e-11. */
#ifdef REAL_DOUBLE
#define DECAY_SCALE 1
#define DECAY_RANGE 1021
INLINE vec decay(vec x) {
    vec shifted = x + 0x1.8p52, f = x - (shifted - 0x1.8p52);
    vec p = f * 1.3691488853904124e-12 + 2.5678435993488196e-11;
    p = p * f + 4.44553827187081e-10;
    p = p * f + 7.054911620801121e-09;
    p = p * f + 1.0178086009239696e-07;
    p = p * f + 1.3215486790144305e-06;
    p = p * f + 1.5252733804059838e-05;
    p = p * f + 1.5403530393381606e-04;
    p = p * f + 1.3333558146428441e-03;
    p = p * f + 9.618129107628477e-03;
    p = p * f + 5.5504108664821576e-02;
    p = p * f + 2.402265069591007e-01;
    p = p * f + 6.931471805599453e-01;
    p = p * f + 1;
    return (vec)((ivec)p + ((ivec)shifted << 52));
}
#elif defined(__AVX512F__)
#include <immintrin.h>
#define DECAY_SCALE 0.5f
#define DECAY_RANGE (125 * DECAY_SCALE)
INLINE vec decay(vec x) {
    const ivec table = {0x3ee34f96, 0x3ee55ff3, 0x3ee7e260, 0x3ee96df5, 0x3ee728ed, 0x3ee524d6, 0x3ee36493, 0x3ee1eb24,
                        0x3ee0bbaa, 0x3edfd96e, 0x3edf47d9, 0x3edf0a7e, 0x3edf2519, 0x3edf9b8d, 0x3ee071eb, 0x3ee1ac74};
    /* Kept apart from the product that made x: a multiply-add would take the place of an addition. */
    __asm__("" : "+v"(x));
    vec shifted = x + 0x1.8p18f, f = x - (shifted - 0x1.8p18f);
    ivec power = (ivec)_mm512_permutexvar_epi32((__m512i)shifted, (__m512i)table) + ((ivec)shifted << 19);
    return (((f + 2.164435863494873f) * f + 3.1225197315216064f) * f + 2.2524218559265137f) * (vec)power;
}
#elif defined(__AVX2__)
#include <immintrin.h>
#define DECAY_SCALE 0.5f
#define DECAY_RANGE (125 * DECAY_SCALE)
INLINE vec decay(vec x) {
    const ivec table = {0x3ee34f96, 0x3ee7e260, 0x3ee728ed, 0x3ee36493, 0x3ee0bbaa, 0x3edf47d9, 0x3edf2519, 0x3ee071eb};
    __asm__("" : "+x"(x));
    vec shifted = x + 0x1.8p19f, f = x - (shifted - 0x1.8p19f);
    ivec power = (ivec)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)shifted) + ((ivec)shifted << 20);
    return (((f + 2.1646461486816406f) * f + 3.1225197315216064f) * f + 2.2524218559265137f) * (vec)power;
}
#else
#define DECAY_SCALE 1
#define DECAY_RANGE 126
INLINE vec decay(vec x) {
    vec shifted = x + 0x1.8p23f, f = x - (shifted - 0x1.8p23f);
    vec p = f * 1.547625870e-4f + 1.340027071e-3f;
    p = p * f + 9.618004047e-3f;
    p = p * f + 5.550327787e-2f;
    p = p * f + 2.402265134e-1f;
    p = p * f + 6.931472063e-1f;
    p = p * f + 1;
    return (vec)((ivec)p + ((ivec)shifted << 23));
}
#endif

/* The same for any x: 0 below the range, infinity above it, NaN for NaN. */
INLINE vec decay_carefully(vec x) {
    real lanes[LANES];
    store(lanes, x);
#pragma omp simd
    for (int i = 0; i < LANES; i++) lanes[i] = exp2_of(lanes[i] / DECAY_SCALE);
    return load(lanes);
}

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

/* 1 / x for x that is neither 0 nor infinite nor near to either: a third of the time of the division, to one rounding
more. */
INLINE vec inverse(vec x) {
#if defined(__AVX512F__) && !defined(REAL_DOUBLE)
    const vec guess = (vec)_mm512_rcp14_ps((__m512)x);
    return guess + guess * (1 - x * guess);
#else
    return 1 / x;
#endif
}

/* e^-|x|, at least 2^-DECAY_RANGE; NaN for NaN. */
INLINE vec fall(vec x) {
    return decay(larger(broadcast(-DECAY_RANGE), magnitude(x) * -(real)(LOG2_E * DECAY_SCALE)));
}

/* 1 / (1 + e^-x), and 0 where e^x is. */
INLINE vec sigmoid(vec x) {
    const vec range = broadcast(DECAY_RANGE), scaled = x * -(real)(LOG2_E * DECAY_SCALE);
    const vec result = inverse(1 + decay(smaller(range, larger(-range, scaled))));
    return choose(scaled > range, (vec){0}, result);
}

/* The slope of softplus, 1 / (1 + e^-x), with e = fall(x). */
INLINE vec slope_of_fall(vec x, vec e) {
    const vec zero = {0};
    return choose(x < zero, e, zero + 1) * inverse(1 + e);
}

/* log(1 + e^x) = max(x, 0) + 2 artanh(t), t = e^-|x| / (2 + e^-|x|) ≤ 1/3, with e = fall(x). In float the series of
artanh(t) / t is a least maximal fit, to 4e-9. */
INLINE vec softplus_of_fall(vec x, vec e) {
    vec t = e * inverse(e + 2), q = t * t;
#ifdef REAL_DOUBLE
    vec p = broadcast(1.0 / 33);
#pragma GCC unroll 16
    for (int k = 31; k > 1; k -= 2) p = p * q + 1.0 / k;
#else
    vec p = q * 0.14005999267101288f + 0.14000901579856873f;
    p = p * q + 0.2001076340675354f;
    p = p * q + 0.3333320915699005f;
#endif
    p = p * q + 1;
    return larger(x, (vec){0}) + 2 * t * p;
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
