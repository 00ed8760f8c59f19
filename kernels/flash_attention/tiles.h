/* A tile of rows: which keys it sees, its rows in and out of memory, and its scores against a block of keys. */
#pragma once

#include "flash_attention/attention.h"

typedef struct {
    int64_t b, g, first, rows, lanes; /* rows first … first + rows of (b, g); lanes: their number in whole registers */
    int64_t from, to;                 /* keys that some row sees */
    int64_t full_from, full_to;       /* keys that all rows see, but for the mask */
    int64_t query[ROWS], head[ROWS];
    integer low[ROWS], high[ROWS];    /* keys that each row sees */
    real position[ROWS], slope[ROWS]; /* the slope in units of ln 2 */
} Tile;

typedef integer ivec_at __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));
INLINE ivec load_integers(const integer *from) { return *(const ivec_at *)from; }

/* The keys that causal, window and documents let query t see. With `next`, `*low` and `*high` come in as those of query
t − 1, and the borders of its document need not be sought again. */
static void visible(const Attention *a, int64_t b, int64_t t, int next, int64_t *low, int64_t *high) {
    const int64_t i = t + a->S - a->T;
    int64_t earliest = a->window ? most(0, i - a->window + 1) : 0, latest = a->S;
    if (a->window) latest = least(latest, i + a->window);
    if (a->causal) latest = least(latest, i + 1);
    if (a->documents) {
        const int64_t *ids = a->documents + b * a->S;
        int64_t begin = i, end = i + 1;
        if (next && ids[i - 1] == ids[i]) {
            begin = *low;
            end = most(end, *high);
        }
        while (begin > earliest && ids[begin - 1] == ids[i]) begin--;
        while (end < latest && ids[end] == ids[i]) end++;
        earliest = most(earliest, begin);
        latest = least(latest, end);
    }
    *low = earliest;
    *high = latest;
}

static void place(const Attention *a, Tile *t, int64_t pair, int64_t first, int64_t rows) {
    const int64_t M = sharing(a);
    int64_t low = 0, high = 0, query = first / M, m = first % M;
    t->b = pair / a->G, t->g = pair % a->G, t->first = first, t->rows = rows, t->lanes = rounded_up(rows, LANES);
    t->from = t->full_to = a->S, t->to = t->full_from = 0;
    for (int64_t r = 0; r < rows; r++, m = m + 1 < M ? m + 1 : 0, query += m == 0) {
        if (r == 0 || m == 0) visible(a, t->b, query, r > 0, &low, &high);
        t->query[r] = query;
        t->head[r] = t->g * M + m;
        t->low[r] = (integer)low;
        t->high[r] = (integer)high;
        t->position[r] = (real)(query + a->S - a->T);
        t->slope[r] = a->slopes ? a->slopes[t->head[r]] * LOG2_E : 0;
        if (low < high) t->from = least(t->from, low), t->to = most(t->to, high);
        t->full_from = most(t->full_from, low);
        t->full_to = least(t->full_to, high);
    }
    for (int64_t r = rows; r < t->lanes; r++) t->low[r] = t->high[r] = 0, t->position[r] = t->slope[r] = 0;
}

/* Rows of the tile as (lanes, stride), with zeros beyond `rows` and `width`. */
static void gather(const Attention *a, const Tile *t, const void *x, const int64_t *strides, int64_t width,
                   int64_t stride, real *to) {
    for (int64_t r = 0; r < t->rows; r++) {
        const int64_t offset = t->b * strides[0] + t->query[r] * strides[1] + t->head[r] * strides[2];
        load_row(to + r * stride, x, (int)a->dtype, offset, width);
        for (int64_t i = width; i < stride; i++) to[r * stride + i] = 0;
    }
    memset(to + t->rows * stride, 0, (size_t)((t->lanes - t->rows) * stride) * sizeof(real));
}

/* Columns of the tile, times `factor`, to a contiguous (B, T, H, width), by way of `rows`. */
static void scatter(const Attention *a, const Tile *t, const real *columns, int64_t width, real factor, real *rows,
                    void *x) {
    transpose(columns, t->lanes, width, t->lanes, factor, rows, width);
    for (int64_t r = 0; r < t->rows; r++) {
        const int64_t row = (t->b * a->T + t->query[r]) * a->H + t->head[r];
        store_row(x, (int)a->dtype, row * width, width, rows + r * width);
    }
}

/* What q is multiplied with, beside the scale, to give scores in units of ln 2, or what `tanh_of_scaled` takes. */
INLINE real score_unit(const Attention *a) { return (real)(a->softcap > 0 ? 2 * LOG2_E / a->softcap : LOG2_E); }

/* ---- blocks of keys ---------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t from, count;
    const real *k, *v;
    int64_t k_stride, v_stride;
    int hides; /* whether the mask hides some of the keys */
} Block;

/* Where keys or values can be read as `real`: in place, or widened into `buffer`. */
static const real *read_keys(const Attention *a, const Tile *t, const void *x, const int64_t *strides, int64_t width,
                             const Block *block, real *buffer, int64_t *stride) {
    const int64_t offset = t->b * strides[0] + block->from * strides[1] + t->g * strides[2];
    *stride = a->dtype == REAL ? strides[1] : width;
    if (a->dtype == REAL) return (const real *)x + offset;
    for (int64_t j = 0; j < block->count; j++)
        load_row(buffer + j * width, x, (int)a->dtype, offset + j * strides[1], width);
    return buffer;
}

/* The keys from `from` on that the tile meets next; false where the mask hides all of them. `buffer` takes KEYS keys
and values. */
static int open_block(const Attention *a, const Tile *t, int64_t from, real *buffer, Block *block) {
    /* All blocks of a tile are equally long, so that none is a small rest. */
    const int64_t keys = t->to - t->from, blocks = (keys + KEYS - 1) / KEYS;
    const int64_t count = least(rounded_up((keys + blocks - 1) / blocks, DEEP), t->to - from);
    int64_t counting = count;
    if (a->mask) {
        counting = 0;
        for (int64_t j = from; j < from + count; j++) counting += a->mask[t->b * a->S + j] != 0;
    }
    *block = (Block){.from = from, .count = count, .hides = counting < count};
    if (counting == 0) return 0;
    block->k = read_keys(a, t, a->k, a->k_strides, a->K, block, buffer, &block->k_stride);
    block->v = read_keys(a, t, a->v, a->v_strides, a->V, block, buffer + KEYS * a->K, &block->v_stride);
    return 1;
}

/* softcap · tanh(…) in units of ln 2, and its slope where there is room for it. */
static void cap(const Attention *a, int64_t count, real *score, real *cap_slopes) {
    for (int64_t i = 0; i < count; i += LANES) {
        vec slope;
        store(score + i, tanh_of_scaled(load(score + i), &slope) * (real)(a->softcap * LOG2_E));
        if (cap_slopes) store(cap_slopes + i, slope);
    }
}

static void subtract_distances(const Tile *t, const Block *block, real *score) {
    for (int64_t j = 0; j < block->count; j++)
        for (int64_t r = 0; r < t->lanes; r += LANES) {
            const vec distance = magnitude(load(t->position + r) - (real)(block->from + j));
            real *at = score + j * t->lanes + r;
            store(at, load(at) - load(t->slope + r) * distance);
        }
}

/* −inf for the keys that rows do not see. */
static void hide(const Attention *a, const Tile *t, const Block *block, real *score) {
    const vec hidden = broadcast(-INFINITE);
    const int ragged = block->from < t->full_from || block->from + block->count > t->full_to;
    for (int64_t j = 0; j < block->count; j++) {
        const integer key = (integer)(block->from + j);
        const int counts = !block->hides || a->mask[t->b * a->S + key];
        if (counts && !ragged) continue;
        for (int64_t r = 0; r < t->lanes; r += LANES) {
            const ivec sees = (load_integers(t->low + r) <= key) & (load_integers(t->high + r) > key);
            real *at = score + j * t->lanes + r;
            store(at, counts ? choose(sees, load(at), hidden) : hidden);
        }
    }
}

/* Products of queries and keys become scores. */
static void finish_scores(const Attention *a, const Tile *t, const Block *block, real *score, real *cap_slopes) {
    if (a->softcap > 0) cap(a, block->count * t->lanes, score, cap_slopes);
    if (a->slopes) subtract_distances(t, block, score);
    if (block->hides || block->from < t->full_from || block->from + block->count > t->full_to) hide(a, t, block, score);
}

/* score[j][r] of key j of the block and row r, in units of ln 2, −inf where hidden. `q` are columns of the tile times
scale · score_unit. */
static void compute_scores(const Attention *a, const Tile *t, const Block *block, const real *q, real *score,
                           real *cap_slopes) {
    product((Product){.to = score, .factors = block->k, .from = q, .to_stride = t->lanes, .outer = block->k_stride,
                      .inner = 1, .from_stride = t->lanes, .outs = block->count, .lanes = t->lanes, .terms = a->K});
    finish_scores(a, t, block, score, cap_slopes);
}
