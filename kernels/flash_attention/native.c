/* Attention, forward: an online softmax over blocks of keys (FlashAttention-2, arXiv 2307.08691).

Two products of T · M · S · K multiplications for each (b, g), less what causal and window hide; no memory beyond the
output and a tile's for each thread. */

#include <tgmath.h> /* log2 of a float in float */

#include "flash_attention/tiles.h"

/* Queries of a task. */
enum { SPAN = 128 };

typedef struct {
    real maximum[ROWS], total[ROWS];
    real *q, *rows, *out, *score, *widened; /* q, score and out are columns */
} State;

/* The scores become weights, and total and output shrink where the maximum has risen. */
static void soften(const Attention *a, const Tile *t, const Block *block, State *s) {
    const int64_t lanes = t->lanes;
    for (int64_t r = 0; r < lanes; r += LANES) {
        const vec before = load(s->maximum + r);
        vec maximum = before, odd = before, sum = {}; /* two maxima, because each waits for itself */
        int64_t j = 0;
        for (; j + 2 <= block->count; j += 2) {
            maximum = larger(load(s->score + j * lanes + r), maximum);
            odd = larger(load(s->score + (j + 1) * lanes + r), odd);
        }
        maximum = larger(odd, j < block->count ? larger(load(s->score + j * lanes + r), maximum) : maximum);
        /* Where no key was seen yet, −inf − (−inf) would be NaN. */
        const vec shift = choose(maximum == -INFINITE, (vec){}, maximum), shrink = exp2_to_zero(before - shift);
        for (j = 0; j < block->count; j++) {
            const vec weight = exp2_to_zero(load(s->score + j * lanes + r) - shift);
            store(s->score + j * lanes + r, weight);
            sum += weight;
        }
        store(s->total + r, load(s->total + r) * shrink + sum);
        store(s->maximum + r, maximum);
        for (int64_t i = 0; i < a->V; i++) store(s->out + i * lanes + r, load(s->out + i * lanes + r) * shrink);
    }
}

/* A decoding step has too few rows to fill a register: then K and V are better held across registers than rows. */
INLINE int has_few_rows(const Attention *a, const Tile *t) { return 8 * t->rows <= LANES && a->V % LANES == 0; }

static void score_few_rows(const Attention *a, const Tile *t, const Block *block, State *s) {
    const real factor = (real)a->scale * score_unit(a);
    for (int64_t j = 0; j < block->count; j++) {
        const real *k = block->k + j * block->k_stride;
        store(s->score + j * LANES, (vec){});
        for (int64_t r = 0; r < t->rows; r++) {
            const real *q = s->rows + r * a->K;
            real sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < a->K; i++) sum += q[i] * k[i];
            s->score[j * LANES + r] = sum * factor;
        }
    }
    finish_scores(a, t, block, s->score, 0);
}

static void add_values_to_few_rows(const Attention *a, const Tile *t, const Block *block, State *s) {
    real *sums = s->rows + t->rows * a->K;
    product((Product){.to = sums, .factors = s->score, .from = block->v, .to_stride = a->V, .outer = 1, .inner = LANES,
                      .from_stride = block->v_stride, .outs = t->rows, .lanes = a->V, .terms = block->count});
    for (int64_t i = 0; i < a->V; i++)
        for (int64_t r = 0; r < t->rows; r++) s->out[i * LANES + r] += sums[r * a->V + i];
}

static void add_values(const Attention *a, const Tile *t, const Block *block, State *s) {
    product((Product){.to = s->out, .factors = block->v, .from = s->score, .to_stride = t->lanes, .outer = 1,
                      .inner = block->v_stride, .from_stride = t->lanes, .outs = a->V, .lanes = t->lanes,
                      .terms = block->count, .add = 1});
}

static void attend(const Attention *a, const Tile *t, State *s) {
    const int64_t lanes = t->lanes;
    const int few = has_few_rows(a, t);
    gather(a, t, a->q, a->q_strides, a->K, a->K, s->rows);
    transpose(s->rows, a->K, lanes, a->K, (real)a->scale * score_unit(a), s->q, lanes);
    memset(s->out, 0, (size_t)(a->V * lanes) * sizeof(real));
    for (int64_t r = 0; r < lanes; r++) {
        s->maximum[r] = a->sinks && r < t->rows ? a->sinks[t->head[r]] * LOG2_E : -INFINITE;
        s->total[r] = s->maximum[r] > -INFINITE;
    }
    Block block;
    for (int64_t from = t->from; from < t->to; from += block.count) {
        if (!open_block(a, t, from, s->widened, &block)) continue;
        if (few) score_few_rows(a, t, &block, s);
        else compute_scores(a, t, &block, s->q, s->score, 0);
        soften(a, t, &block, s);
        if (few) add_values_to_few_rows(a, t, &block, s);
        else add_values(a, t, &block, s);
    }
    for (int64_t r = 0; r < lanes; r += LANES) {
        const vec total = load(s->total + r), inverse = 1 / choose(total == 0, broadcast(1), total);
        for (int64_t i = 0; i < a->V; i++) store(s->out + i * lanes + r, load(s->out + i * lanes + r) * inverse);
    }
    scatter(a, t, s->out, a->V, 1, s->rows, a->made);
    real *lse = a->lse + (t->b * a->G + t->g) * a->T * sharing(a) + t->first;
    for (int64_t r = 0; r < t->rows; r++)
        lse[r] = s->total[r] == 0 ? INFINITE : s->maximum[r] + log2(s->total[r]);
}

static void forward_span(void *context, int64_t index) {
    const Attention *a = context;
    const int64_t M = sharing(a), pairs = a->B * a->G, spans = (a->T + SPAN - 1) / SPAN;
    const int64_t pair = index % pairs, span = spans - 1 - index / pairs; /* under causal the last ones take longest */
    const int64_t begin = span * SPAN * M, end = least(begin + SPAN * M, a->T * M);
    const int64_t widest = most(a->K, a->V);
    real *scratch = malloc((size_t)(ROWS * (a->K + a->V + widest) + KEYS * (ROWS + a->K + a->V)) * sizeof(real));
    State state;
    Tile tile;
    state.q = scratch, state.rows = state.q + ROWS * a->K, state.out = state.rows + ROWS * widest;
    state.score = state.out + ROWS * a->V, state.widened = state.score + KEYS * ROWS;
    for (int64_t first = begin; first < end; first += ROWS) {
        place(a, &tile, pair, first, least(ROWS, end - first));
        attend(a, &tile, &state);
    }
    free(scratch);
}

void EXPORT(flash_attention_forward)(const Attention *a) {
    expect_writes(a->made, a->B * a->T * a->H * a->V * (a->dtype == REAL ? REAL_BYTES : 2));
    parallel(forward_span, (void *)a, (a->T + SPAN - 1) / SPAN * a->B * a->G, a->threads);
}
