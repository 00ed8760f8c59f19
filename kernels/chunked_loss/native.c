/* Losses of output logits for a chunk of C tokens: the products with the weight and the passes over the logits between.

Logits stand with the vocabulary first, S (V, C) = W Hᵀ, so that every product is of one kind, `tile`: a few rows of a
matrix read in place, one element of each at a time, times a panel that lies packed in the cache.

    logits   S  = W Hᵀ   rows of W      times panels of Hᵀ   (tokens side by side)
    weight   dW = G H    rows of G      times panels of H    (columns of the width side by side)
    hidden   dH = Gᵀ W   columns of G   times panels of W

A block of the vocabulary goes through product and statistics, or through gradient and product, while it lies in the
second-level cache. A product is bound by its arithmetic, 2 V C D operations: two loads and one broadcast for each row
feed two multiply-adds for each row, in as many accumulators as there are registers. The passes between cost a few in a
hundred of that. Each sum runs in one order, whatever the number of threads. */

#include <stdlib.h>

#include "native.h"

#if defined(__AVX512F__) || defined(__aarch64__)
enum { ROWS = 12 };
#else
enum { ROWS = 6 };
#endif
#define COLUMNS (2 * LANES)
/* Vocabulary of a block, a multiple of ROWS; the longest sum in one go; the vocabulary of a sum in dH. */
enum { BLOCK = 96, DEPTH = 1024, SPAN = 96 };

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t whole(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

/* ---- products ---------------------------------------------------------------------------------------------------- */

/* out (ROWS, COLUMNS) of row stride `stride`, += if `add`: Σ over k < depth of a[i · row + k · step] · panel[k][…]. */
INLINE void full_tile(const real *a, int64_t row, int64_t step, const real *panel, int64_t depth, real *out, int64_t stride, int add) {
    vec sum[ROWS][2];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
        sum[i][0] = sum[i][1] = (vec){};
        /* Fetched while the sum is made. */
        __builtin_prefetch(out + i * stride, 1);
        __builtin_prefetch(out + i * stride + COLUMNS - 1, 1);
    }
    for (int64_t k = 0; k < depth; k++, a += step, panel += COLUMNS) {
        vec left = load(panel), right = load(panel + LANES);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            vec x = broadcast(a[i * row]);
            sum[i][0] += x * left;
            sum[i][1] += x * right;
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
        real *to = out + i * stride;
        store(to, add ? load(to) + sum[i][0] : sum[i][0]);
        store(to + LANES, add ? load(to + LANES) + sum[i][1] : sum[i][1]);
    }
}

/* The same where only the first `rows` and `columns` of `out` are there. All of `a` and `panel` must be. */
static void tile(const real *a, int64_t row, int64_t step, const real *panel, int64_t depth, real *out, int64_t stride, int add, int64_t rows, int64_t columns) {
    if (rows >= ROWS && columns >= COLUMNS) {
        full_tile(a, row, step, panel, depth, out, stride, add);
        return;
    }
    real edge[ROWS * COLUMNS];
    full_tile(a, row, step, panel, depth, edge, COLUMNS, 0);
    for (int64_t i = 0; i < least(rows, ROWS); i++)
        for (int64_t j = 0; j < least(columns, COLUMNS); j++)
            out[i * stride + j] = (add ? out[i * stride + j] : 0) + edge[i * COLUMNS + j];
}

/* ---- a chunk ----------------------------------------------------------------------------------------------------- */

/* One product of hidden states and weight. A null gradient is not wanted. */
typedef struct {
    const void *weight;      /* (vocabulary, width) of `dtype` */
    const real *hidden;      /* (tokens, width) */
    real *logits;            /* (vocabulary + ROWS, stride); their gradient after the second pass */
    real *grad_weight;       /* (vocabulary, width) */
    real *grad_hidden;       /* (tokens, width) */
    int64_t width, dtype, add; /* add: to grad_weight, which holds the chunks before */
} Head;

enum { CROSS_ENTROPY, FORWARD_KL };
/* Statistics of a block of logits, one of each for each token: the maximum of the (student's) logits s and Σ exp(s − it);
Σ s for cross-entropy, the same two of the teacher's t and Σ exp(t − max t) (t − s) for the divergence. */
enum { MAX_S, SUM_S, LINEAR, MAX_T = LINEAR, SUM_T, DIFFERENCE, STATISTICS };

typedef struct {
    Head heads[2];
    int64_t count, formula, vocabulary, tokens, threads;
    int64_t stride;          /* padded tokens: of a row of logits and statistics, a multiple of COLUMNS */
    real *statistics;        /* (blocks, STATISTICS, stride) */
    const real *rows;        /* (STATISTICS, stride), of all blocks: the sums inverted, times the token's share */
    const int64_t *target;   /* (tokens), for cross-entropy */
    double floor, peak;      /* its gradient is softmax · share − floor, less `peak` at the target */
} Chunk;

typedef struct {
    const Chunk *chunk;
    const Head *head;
    const real *panels[2];
    int64_t groups;
} Phase;

/* Columns k … k + count of `rows` of the weight from row v on, as reals of row stride `stride`. */
INLINE void copy_weight(const Head *head, int64_t v, int64_t rows, int64_t k, int64_t count, real *to, int64_t stride) {
    for (int64_t i = 0; i < rows; i++) load_row(to + i * stride, head->weight, (int)head->dtype, (v + i) * head->width + k, count);
}

/* Rows of the weight in a copy, with a stride that does not fall on the same lines of the cache again and again. */
enum { TILE_STRIDE = DEPTH + 16 };

static void logits_block(const Chunk *chunk, const Head *head, const real *panels, int64_t v0, int64_t v1, real *buffer) {
    int64_t width = head->width, stride = chunk->stride;
    for (int64_t k = 0; k == 0 || k < width; k += DEPTH) {
        int64_t depth = least(DEPTH, width - k);
        for (int64_t v = v0; v < v1; v += ROWS) {
            int64_t rows = least(ROWS, v1 - v);
            copy_weight(head, v, rows, k, depth, buffer, TILE_STRIDE);
            memset(buffer + rows * TILE_STRIDE, 0, (size_t)((ROWS - rows) * TILE_STRIDE) * sizeof(real));
            for (int64_t c = 0; c < stride; c += COLUMNS)
                full_tile(buffer, TILE_STRIDE, 1, panels + c * width + k * COLUMNS, depth, head->logits + v * stride + c, stride, k > 0);
        }
    }
}

/* ---- cross-entropy and divergence -------------------------------------------------------------------------------- */

/* The maximum over the block, and what to subtract before an exponential: 0 where the maximum is −∞. */
static void greatest(const real *restrict logits, int64_t rows, int64_t stride, real *restrict max, real *restrict shift) {
    for (int64_t c = 0; c < stride; c++) max[c] = -__builtin_inf();
    for (int64_t v = 0; v < rows; v++)
#pragma omp simd
        for (int64_t c = 0; c < stride; c++) max[c] = logits[v * stride + c] > max[c] ? logits[v * stride + c] : max[c];
    for (int64_t c = 0; c < stride; c++) shift[c] = max[c] == -__builtin_inf() ? 0 : max[c];
}

static void statistics_block(const Chunk *chunk, int64_t v0, int64_t v1, real *restrict out, real *restrict shifts) {
    int64_t stride = chunk->stride, rows = v1 - v0;
    const real *restrict s = chunk->heads[0].logits + v0 * stride;
    memset(out, 0, (size_t)(STATISTICS * stride) * sizeof(real));
    real *restrict sum = out + SUM_S * stride, *restrict linear = out + LINEAR * stride;
    greatest(s, rows, stride, out + MAX_S * stride, shifts);
    for (int64_t v = 0; v < rows; v++)
#pragma omp simd
        for (int64_t c = 0; c < stride; c++) sum[c] += exp_of(s[v * stride + c] - shifts[c]);
    if (chunk->formula == CROSS_ENTROPY) {
        for (int64_t v = 0; v < (chunk->floor != 0 ? rows : 0); v++)
#pragma omp simd
            for (int64_t c = 0; c < stride; c++) linear[c] += s[v * stride + c];
        return;
    }
    const real *restrict t = chunk->heads[1].logits + v0 * stride;
    real *restrict sum_t = out + SUM_T * stride, *restrict difference = out + DIFFERENCE * stride;
    greatest(t, rows, stride, out + MAX_T * stride, shifts);
    for (int64_t v = 0; v < rows; v++)
#pragma omp simd
        for (int64_t c = 0; c < stride; c++) {
            real p = exp_of(t[v * stride + c] - shifts[c]);
            sum_t[c] += p;
            difference[c] += p * (t[v * stride + c] - s[v * stride + c]);
        }
}

static void cross_entropy_gradient(const Chunk *chunk, int64_t v0, int64_t v1) {
    int64_t stride = chunk->stride;
    real *restrict s = chunk->heads[0].logits, floor = (real)chunk->floor;
    const real *restrict max = chunk->rows + MAX_S * stride, *restrict scale = chunk->rows + SUM_S * stride;
    for (int64_t v = v0; v < v1; v++)
#pragma omp simd
        for (int64_t c = 0; c < stride; c++) s[v * stride + c] = exp_of(s[v * stride + c] - max[c]) * scale[c] - floor;
    for (int64_t c = 0; c < chunk->tokens; c++) {
        int64_t v = chunk->target[c];
        if (v >= v0 && v < v1) s[v * stride + c] -= (real)chunk->peak;
    }
}

static void divergence_gradient(const Chunk *chunk, int64_t v0, int64_t v1) {
    int64_t stride = chunk->stride;
    real *restrict s = chunk->heads[0].logits, *restrict t = chunk->heads[1].logits;
    const real *restrict max_s = chunk->rows + MAX_S * stride, *restrict scale_s = chunk->rows + SUM_S * stride;
    const real *restrict max_t = chunk->rows + MAX_T * stride, *restrict scale_t = chunk->rows + SUM_T * stride;
    const real *restrict difference = chunk->rows + DIFFERENCE * stride;
    for (int64_t v = v0; v < v1; v++)
#pragma omp simd
        for (int64_t c = 0; c < stride; c++) {
            real s_vc = s[v * stride + c], t_vc = t[v * stride + c];
            real p = exp_of(t_vc - max_t[c]) * scale_t[c];
            s[v * stride + c] = exp_of(s_vc - max_s[c]) * scale_s[c] - p;
            t[v * stride + c] = p * (t_vc - s_vc - difference[c]);
        }
}

/* ---- phases ------------------------------------------------------------------------------------------------------ */

/* Panels of COLUMNS tokens, [token panel][width][COLUMNS], zeros after the last token. */
static real *pack_tokens(const Chunk *chunk, const Head *head) {
    int64_t width = head->width, stride = chunk->stride;
    real *panels = calloc((size_t)(stride * width) + 1, sizeof(real));
    for (int64_t c = 0; c < chunk->tokens; c++) {
        real *to = panels + c / COLUMNS * COLUMNS * width + c % COLUMNS;
        for (int64_t k = 0; k < width; k++) to[k * COLUMNS] = head->hidden[c * width + k];
    }
    return panels;
}

/* Panels of COLUMNS elements of the width, [panel][rows][COLUMNS]: `count` elements of a row are put at row r. */
INLINE void pack_row(const real *from, int64_t r, int64_t rows, int64_t count, real *panels) {
    int64_t k = 0;
    for (; k + COLUMNS <= count; k += COLUMNS) {
        store(panels + k * rows + r * COLUMNS, load(from + k));
        store(panels + k * rows + r * COLUMNS + LANES, load(from + k + LANES));
    }
    for (int64_t j = 0; k < count && j < COLUMNS; j++) panels[k * rows + r * COLUMNS + j] = k + j < count ? from[k + j] : 0;
}

/* Fetch a part of what the next span of the vocabulary needs while a tile of this one is summed: COLUMNS of a row of the
weight, and a cache line of the row's logits. */
INLINE void fetch(const Head *head, int64_t stride, int64_t v, int64_t k, int64_t done) {
    enum { LINE = 64 };
    int64_t size = head->dtype == REAL ? (int64_t)sizeof(real) : head->dtype == FLOAT32 ? 4 : 2;
    const char *weight = (const char *)head->weight + (v * head->width + k) * size;
    __builtin_prefetch(weight);
    __builtin_prefetch(weight + COLUMNS * size - 1);
    __builtin_prefetch((const char *)(head->logits + v * stride) + done / COLUMNS * LINE);
}

static void logits_task(void *context, int64_t index) {
    const Phase *phase = context;
    const Chunk *chunk = phase->chunk;
    int64_t v0 = index * BLOCK, v1 = least(v0 + BLOCK, chunk->vocabulary), stride = chunk->stride;
    real *buffer = malloc((size_t)(ROWS * TILE_STRIDE + stride) * sizeof(real));
    for (int64_t h = 0; h < chunk->count; h++) logits_block(chunk, &chunk->heads[h], phase->panels[h], v0, v1, buffer);
    statistics_block(chunk, v0, v1, chunk->statistics + index * STATISTICS * stride, buffer + ROWS * TILE_STRIDE);
    free(buffer);
}

static void weight_task(void *context, int64_t index) {
    const Phase *phase = context;
    const Chunk *chunk = phase->chunk;
    int64_t v0 = index * BLOCK, v1 = least(v0 + BLOCK, chunk->vocabulary), stride = chunk->stride;
    (chunk->formula == CROSS_ENTROPY ? cross_entropy_gradient : divergence_gradient)(chunk, v0, v1);
    for (int64_t h = 0; h < chunk->count; h++) {
        const Head *head = &chunk->heads[h];
        if (!head->grad_weight) continue;
        for (int64_t v = v0; v < v1; v += ROWS)
            for (int64_t k = 0; k < head->width; k += COLUMNS)
                tile(head->logits + v * stride, stride, 1, phase->panels[h] + k * chunk->tokens, chunk->tokens,
                     head->grad_weight + v * head->width + k, head->width, (int)head->add, v1 - v, head->width - k);
    }
}

/* Some columns of dH, over all the vocabulary, a span of it at a time. */
static void hidden_task(void *context, int64_t index) {
    const Phase *phase = context;
    const Chunk *chunk = phase->chunk;
    const Head *head = phase->head;
    int64_t width = head->width, stride = chunk->stride, group = whole((width + phase->groups - 1) / phase->groups, COLUMNS);
    int64_t k0 = index * group, k1 = least(k0 + group, width), tiles = (chunk->tokens + ROWS - 1) / ROWS;
    if (k0 >= k1) return;
    real *panels = malloc((size_t)(SPAN * whole(k1 - k0, COLUMNS)) * sizeof(real));
    real *buffer = malloc((size_t)(k1 - k0) * sizeof(real)), columns[SPAN * ROWS];
    for (int64_t v = 0; v < chunk->vocabulary; v += SPAN) {
        int64_t span = least(SPAN, chunk->vocabulary - v), later = least(SPAN, chunk->vocabulary - v - span);
        for (int64_t i = 0; i < span; i++)
            pack_row(row_of(buffer, head->weight, (int)head->dtype, (v + i) * width + k0, k1 - k0), i, span, k1 - k0, panels);
        for (int64_t c = 0, fetched = 0; c < chunk->tokens; c += ROWS) {
            /* Past the last token these are the next row's, and the tile leaves them out. */
            for (int64_t i = 0; i < span; i++) memcpy(columns + i * ROWS, head->logits + (v + i) * stride + c, ROWS * sizeof(real));
            int64_t enough = (c / ROWS + 1) * later / tiles;
            for (int64_t k = k0; k < k1; k += COLUMNS) {
                for (int64_t i = fetched; i < enough; i++) fetch(head, stride, v + span + i, k, k - k0);
                tile(columns, 1, ROWS, panels + (k - k0) * span, span, head->grad_hidden + c * width + k, width, v > 0,
                     chunk->tokens - c, k1 - k);
            }
            fetched = enough;
        }
    }
    free(buffer);
    free(panels);
}

/* The logits of a chunk and their statistics. */
void EXPORT(chunked_loss_logits)(const Chunk *chunk) {
    Phase phase = {.chunk = chunk};
    for (int64_t h = 0; h < chunk->count; h++) {
        phase.panels[h] = pack_tokens(chunk, &chunk->heads[h]);
        expect_writes(chunk->heads[h].logits, chunk->vocabulary * chunk->stride * (int64_t)sizeof(real));
    }
    parallel(logits_task, &phase, (chunk->vocabulary + BLOCK - 1) / BLOCK, chunk->threads);
    for (int64_t h = 0; h < chunk->count; h++) free((void *)phase.panels[h]);
}

/* Their gradient, and those of the weights and of the hidden states. */
void EXPORT(chunked_loss_gradients)(const Chunk *chunk) {
    Phase phase = {.chunk = chunk, .groups = chunk->threads};
    for (int64_t h = 0; h < chunk->count; h++) {
        const Head *head = &chunk->heads[h];
        real *panels = malloc((size_t)(chunk->tokens * whole(head->width, COLUMNS)) * sizeof(real) + 1);
        for (int64_t c = 0; c < chunk->tokens; c++) pack_row(head->hidden + c * head->width, c, chunk->tokens, head->width, panels);
        phase.panels[h] = panels;
        if (!head->add) expect_writes(head->grad_weight, chunk->vocabulary * head->width * (int64_t)sizeof(real));
    }
    parallel(weight_task, &phase, (chunk->vocabulary + BLOCK - 1) / BLOCK, chunk->threads);
    for (int64_t h = 0; h < chunk->count; h++) {
        phase.head = &chunk->heads[h];
        if (phase.head->grad_hidden) parallel(hidden_task, &phase, phase.groups, chunk->threads);
        free((void *)phase.panels[h]);
    }
}
