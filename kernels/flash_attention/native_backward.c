/* Attention, backward: weights are computed again from the saved log-sum-exp (FlashAttention-2, arXiv 2307.08691).

With P the weights and δ = Σ grad · out:  dv = Pᵀ grad;  ds = P · (grad vᵀ − δ);  dq = scale · ds k;
dk = scale · dsᵀ q;  dslope = −Σ ds · |distance|;  dsink = −Σ exp(sink − lse) · δ. Five products where the forward pass has two.

Queries are cut into spans, each with gradients of keys and values of its own, its part; the parts are then added up in
order. The cut follows from the shapes alone, so that threads change no bit of the result. */

#include "flash_attention/tiles.h"

/* There are SPANS spans in all, unless they would have fewer than LEAST queries. */
enum { LEAST = 256, SPANS = 8 };

typedef struct {
    Attention call;
    int64_t span, spans, k_width, v_width; /* queries of a span, spans of a pair (b, g); widths in whole registers */
    int direct;                            /* whether the gradients themselves serve as the only part */
    real *parts, *heads;                   /* heads: (pairs, spans, 2, M), gradients of slopes and of sinks */
} Backward;

/* The gradients that a span adds to those of the keys low … high. */
typedef struct {
    int64_t low, high, k_stride, v_stride;
    real *k, *v;
} Part;

/* The keys that causal and window let a span see. */
static void extent(const Backward *w, int64_t span, int64_t *low, int64_t *high) {
    const Attention *a = &w->call;
    const int64_t first = span * w->span + a->S - a->T, last = least((span + 1) * w->span, a->T) - 1 + a->S - a->T;
    *low = a->window && !w->direct ? most(0, first - a->window + 1) : 0;
    *high = a->S;
    if (w->direct) return;
    if (a->window) *high = least(*high, last + a->window);
    if (a->causal) *high = least(*high, last + 1);
    *high = most(*high, *low);
}

/* Keys of the parts of spans 0 … spans. */
static int64_t keys_before(const Backward *w, int64_t spans) {
    int64_t keys = 0, low, high;
    for (int64_t span = 0; span < spans; span++) extent(w, span, &low, &high), keys += high - low;
    return keys;
}

static Part part_of(const Backward *w, int64_t pair, int64_t span) {
    const Attention *a = &w->call;
    Part part = {.k_stride = w->k_width, .v_stride = w->v_width};
    extent(w, span, &part.low, &part.high);
    if (w->direct) {
        const int64_t head = pair / a->G * a->S * a->G + pair % a->G;
        real *k = (real *)a->grad_k + head * a->K, *v = (real *)a->grad_v + head * a->V;
        return (Part){.high = a->S, .k_stride = a->G * a->K, .v_stride = a->G * a->V, .k = k, .v = v};
    }
    part.k = w->parts + (pair * keys_before(w, w->spans) + keys_before(w, span)) * (w->k_width + w->v_width);
    part.v = part.k + (part.high - part.low) * w->k_width;
    return part;
}

typedef struct {
    real lse[ROWS], delta[ROWS], slope[ROWS], centre[ROWS];
    real *q, *grad, *grad_q, *score, *grad_score, *cap_slopes; /* columns */
    real *q_rows, *grad_rows, *widened;
} State;

/* About the mean distance of a row from its keys, which are weighted by exp(−slope · distance). */
static real centre_of(const Tile *t, int64_t r) {
    const real before = (real)t->from - t->position[r], after = t->position[r] - (real)(t->to - 1);
    const real nearest = before > 0 ? before : after > 0 ? after : 0, half = (real)(t->to - t->from) / 2;
    return nearest + (t->slope[r] * half > LOG2_E ? LOG2_E / t->slope[r] : half);
}

static void open_tile(const Backward *w, const Tile *t, State *s) {
    const Attention *a = &w->call;
    const int64_t lanes = t->lanes, K = w->k_width, V = w->v_width, head = a->H * a->V;
    const int64_t out_strides[3] = {a->T * head, head, a->V};
    gather(a, t, a->out, out_strides, a->V, V, s->score); /* not needed yet for scores */
    gather(a, t, a->grad, a->grad_strides, a->V, V, s->grad_rows);
    gather(a, t, a->q, a->q_strides, a->K, K, s->q_rows);
    for (int64_t i = 0; i < lanes * K; i++) s->q_rows[i] *= (real)a->scale;
    transpose(s->q_rows, K, lanes, a->K, score_unit(a), s->q, lanes);
    transpose(s->grad_rows, V, lanes, a->V, 1, s->grad, lanes);
    memset(s->grad_q, 0, (size_t)(a->K * lanes) * sizeof(real));
    const real *lse = a->lse + (t->b * a->G + t->g) * a->T * sharing(a) + t->first;
    for (int64_t r = 0; r < lanes; r++) {
        vec sum = {};
        for (int64_t i = 0; i < V; i += LANES) sum += load(s->score + r * V + i) * load(s->grad_rows + r * V + i);
        s->delta[r] = s->slope[r] = 0;
        for (int l = 0; l < LANES; l++) s->delta[r] += sum[l];
        s->lse[r] = r < t->rows ? lse[r] : INFINITE;
        s->centre[r] = centre_of(t, r);
    }
}

/* The scores become weights. */
static void weigh(const Tile *t, const Block *block, State *s) {
    for (int64_t j = 0; j < block->count; j++)
        for (int64_t r = 0; r < t->lanes; r += LANES) {
            real *at = s->score + j * t->lanes + r;
            store(at, exp2_to_zero(load(at) - load(s->lse + r)));
        }
}

/* The gradients of weights become those of scores, and then those before the cap.

   The gradients of a row's scores, its sink's among them, sum up to 0: for the slope, distances may be taken less a
   constant. Where that is about their mean, the rounding of delta does not grow with them. */
static void differentiate_softmax(const Attention *a, const Tile *t, const Block *block, State *s) {
    for (int64_t r = 0; r < t->lanes; r += LANES) {
        const vec delta = load(s->delta + r), position = load(t->position + r), centre = load(s->centre + r);
        vec slope = load(s->slope + r);
        for (int64_t j = 0; j < block->count; j++) {
            const int64_t at = j * t->lanes + r;
            vec grad = load(s->score + at) * (load(s->grad_score + at) - delta);
            if (a->grad_slopes) slope -= grad * (magnitude(position - (real)(block->from + j)) - centre);
            if (s->cap_slopes) grad *= load(s->cap_slopes + at);
            store(s->grad_score + at, grad);
        }
        store(s->slope + r, slope);
    }
}

static void differentiate_block(const Backward *w, const Tile *t, const Block *block, const Part *part, State *s) {
    const Attention *a = &w->call;
    const int64_t lanes = t->lanes, K = w->k_width, V = w->v_width, key = block->from - part->low;
    compute_scores(a, t, block, s->q, s->score, s->cap_slopes);
    weigh(t, block, s);
    product((Product){.to = part->v + key * part->v_stride, .factors = s->score, .from = s->grad_rows,
                      .to_stride = part->v_stride, .outer = lanes, .inner = 1, .from_stride = V, .outs = block->count,
                      .lanes = V, .terms = lanes, .add = 1});
    product((Product){.to = s->grad_score, .factors = block->v, .from = s->grad, .to_stride = lanes,
                      .outer = block->v_stride, .inner = 1, .from_stride = lanes, .outs = block->count, .lanes = lanes,
                      .terms = a->V});
    differentiate_softmax(a, t, block, s);
    product((Product){.to = s->grad_q, .factors = block->k, .from = s->grad_score, .to_stride = lanes, .outer = 1,
                      .inner = block->k_stride, .from_stride = lanes, .outs = a->K, .lanes = lanes,
                      .terms = block->count, .add = 1});
    product((Product){.to = part->k + key * part->k_stride, .factors = s->grad_score, .from = s->q_rows,
                      .to_stride = part->k_stride, .outer = lanes, .inner = 1, .from_stride = K, .outs = block->count,
                      .lanes = K, .terms = lanes, .add = 1});
}

/* What the tile adds to the gradients of slopes and sinks. */
static void add_heads(const Attention *a, const Tile *t, const State *s, real *heads) {
    const int64_t M = sharing(a);
    for (int64_t r = 0; r < t->rows; r++) {
        const int64_t m = t->head[r] - t->g * M;
        const real sink = a->sinks ? exp2_of(a->sinks[t->head[r]] * LOG2_E - s->lse[r]) * s->delta[r] : 0;
        heads[m] += s->slope[r] - s->centre[r] * sink;
        heads[M + m] -= sink;
    }
}

static void backward_span(void *context, int64_t index) {
    const Backward *w = context;
    const Attention *a = &w->call;
    const int64_t M = sharing(a), pairs = a->B * a->G, K = w->k_width, V = w->v_width;
    const int64_t pair = index % pairs, span = w->spans - 1 - index / pairs; /* the last ones take longest */
    const int64_t begin = span * w->span * M, end = least(begin + w->span * M, a->T * M);
    const Part part = part_of(w, pair, span);
    for (int64_t j = 0; j < part.high - part.low; j++) {
        memset(part.k + j * part.k_stride, 0, (size_t)K * sizeof(real));
        memset(part.v + j * part.v_stride, 0, (size_t)V * sizeof(real));
    }
    real *heads = w->heads + (pair * w->spans + span) * 2 * M;
    for (int64_t m = 0; m < 2 * M; m++) heads[m] = 0;
    const int64_t scores = most(KEYS * ROWS, V * ROWS), keys = KEYS * (a->K + a->V);
    real *scratch = malloc((size_t)(3 * ROWS * K + 2 * ROWS * V + keys + 2 * KEYS * ROWS + scores) * sizeof(real));
    State s = {.q = scratch, .q_rows = scratch + ROWS * K, .grad_q = scratch + 2 * ROWS * K};
    s.grad = s.grad_q + ROWS * K, s.grad_rows = s.grad + ROWS * V, s.widened = s.grad_rows + ROWS * V;
    s.grad_score = s.widened + keys, s.cap_slopes = a->softcap > 0 ? s.grad_score + KEYS * ROWS : 0;
    s.score = s.grad_score + 2 * KEYS * ROWS;
    Tile tile;
    Block block;
    for (int64_t first = begin; first < end; first += ROWS) {
        place(a, &tile, pair, first, least(ROWS, end - first));
        open_tile(w, &tile, &s);
        for (int64_t from = tile.from; from < tile.to; from += block.count)
            if (open_block(a, &tile, from, s.widened, &block)) differentiate_block(w, &tile, &block, &part, &s);
        add_heads(a, &tile, &s, heads);
        scatter(a, &tile, s.grad_q, a->K, (real)a->scale, s.q_rows, a->grad_q);
    }
    free(scratch);
}

/* The gradients of some keys of a pair: the sum of its parts. */
static void add_parts(void *context, int64_t index) {
    const Backward *w = context;
    const Attention *a = &w->call;
    const int64_t chunks = (a->S + LEAST - 1) / LEAST, pair = index / chunks, K = w->k_width, V = w->v_width;
    const int64_t begin = index % chunks * LEAST, end = least(begin + LEAST, a->S);
    real *sums = malloc((size_t)(LEAST * (K + V)) * sizeof(real)), *v_sums = sums + LEAST * K;
    memset(sums, 0, (size_t)(LEAST * (K + V)) * sizeof(real));
    for (int64_t span = 0; span < w->spans; span++) {
        const Part part = part_of(w, pair, span);
        const int64_t low = most(begin, part.low), count = least(end, part.high) - low;
        real *k = sums + (low - begin) * K, *v = v_sums + (low - begin) * V;
        for (int64_t i = 0; i < count * K; i++) k[i] += part.k[(low - part.low) * K + i];
        for (int64_t i = 0; i < count * V; i++) v[i] += part.v[(low - part.low) * V + i];
    }
    for (int64_t j = begin; j < end; j++) {
        const int64_t row = (pair / a->G * a->S + j) * a->G + pair % a->G;
        store_row(a->grad_k, (int)a->dtype, row * a->K, a->K, sums + (j - begin) * K);
        store_row(a->grad_v, (int)a->dtype, row * a->V, a->V, v_sums + (j - begin) * V);
    }
    free(sums);
}

static void sum_heads(const Backward *w, int64_t kind, real *grad) {
    const Attention *a = &w->call;
    const int64_t M = sharing(a);
    for (int64_t h = 0; grad && h < a->H; h++) {
        grad[h] = 0;
        for (int64_t i = 0; i < a->B * w->spans; i++)
            grad[h] += w->heads[(((i / w->spans * a->G + h / M) * w->spans + i % w->spans) * 2 + kind) * M + h % M];
    }
}

void EXPORT(flash_attention_backward)(const Attention *a) {
    const int64_t pairs = a->B * a->G, wanted = pairs > 0 ? most(1, SPANS / pairs) : 1;
    Backward w = {.call = *a, .k_width = rounded_up(a->K, LANES), .v_width = rounded_up(a->V, LANES)};
    w.span = most(LEAST, rounded_up((a->T + wanted - 1) / wanted, ROWS));
    w.spans = (a->T + w.span - 1) / w.span;
    w.direct = w.spans == 1 && a->dtype == REAL && w.k_width == a->K && w.v_width == a->V;
    const int64_t width = w.k_width + w.v_width, parts = w.direct ? 0 : pairs * keys_before(&w, w.spans) * width;
    w.parts = malloc((size_t)(parts + pairs * w.spans * 2 * sharing(a)) * sizeof(real));
    w.heads = w.parts + parts;
    expect_writes(a->grad_q, a->B * a->T * a->H * a->K * (a->dtype == REAL ? REAL_BYTES : 2));
    parallel(backward_span, &w, w.spans * pairs, a->threads);
    if (!w.direct) parallel(add_parts, &w, (a->S + LEAST - 1) / LEAST * pairs, a->threads);
    sum_heads(&w, 0, a->grad_slopes);
    sum_heads(&w, 1, a->grad_sinks);
    free(w.parts);
}
