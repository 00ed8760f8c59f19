/* The causal depthwise convolution, backward. Each task has some of the B·T rows, for which it computes dx and its part
of the gradients of weight and bias; dx of its last rows needs da of the W − 1 rows after them, which are computed
twice. */

#include "conv.h"

/* sum[j] += Σ_r da[t + r] · x[t + r − (W−1) + j] and sum[W] += Σ_r da[t + r] over `group` rows, a constant, whose x
begin with `rows`, from tap `from` on. */
INLINE void add_products(const Tile *k, int group, int64_t from, const real *const *rows, const real *const *grads) {
    const int64_t taps = k->c->taps;
    const real *x[GROUP], *grad[GROUP];
    for (int r = 0; r < group; r++) grad[r] = grads[r];
    for (int64_t j = from; j < taps; j++) {
        real *restrict sum = k->sums + j * TILE;
        for (int r = 0; r < group; r++) x[r] = rows[r + j];
#pragma omp simd
        for (int64_t i = 0; i < k->count; i++) {
            real total = sum[i];
#pragma GCC unroll 4
            for (int r = 0; r < group; r++) total += grad[r][i] * x[r][i];
            sum[i] = total;
        }
    }
    real *restrict sum = k->sums + taps * TILE;
#pragma omp simd
    for (int64_t i = 0; i < k->count; i++) {
        real total = sum[i];
#pragma GCC unroll 4
        for (int r = 0; r < group; r++) total += grad[r][i];
        sum[i] = total;
    }
}

/* da[t] into the ring for `group` rows from t on. */
static void pull_rows(const Tile *k, int64_t t, int64_t group, const real **rows) {
    const Conv *c = k->c;
    real *out[GROUP];
    for (int64_t r = 0; r < group; r++) out[r] = k->out + r * TILE;
    load_group(k, t, group, rows);
    if (c->silu) activate(k, t, group, 0, rows, out);
    for (int64_t r = 0; r < group; r++) {
        const int64_t offset = (k->batch * c->length + t + r) * c->width + k->first;
        const real *grad_y = row_of(k->grad_y, c->grad_y, (int)c->x_dtype, offset, k->count), *a = out[r];
        real *restrict grad = slot_of(k, k->grads, t + r);
        if (!c->silu) {
            memcpy(grad, grad_y, (size_t)k->count * sizeof(real));
            continue;
        }
#pragma omp simd
        for (int64_t i = 0; i < k->count; i++) {
            const real p = logistic_of(a[i]);
            grad[i] = grad_y[i] * (p + a[i] * p * (1 - p));
        }
    }
}

/* The shares of `group` rows from t on in the gradients of weight and bias. */
static void sum_rows(const Tile *k, int64_t t, int64_t group, const real *const *rows) {
    const real *grads[GROUP];
    int whole = group == GROUP;
    for (int64_t r = 0; r < group; r++) {
        grads[r] = slot_of(k, k->grads, t + r);
        whole &= reach_of(k->c, k->batch, t + r) == k->c->taps - 1;
    }
    if (whole) add_products(k, GROUP, 0, rows, grads);
    for (int64_t r = 0; !whole && r < group; r++)
        add_products(k, 1, k->c->taps - 1 - reach_of(k->c, k->batch, t + r), rows + r, grads + r);
}

/* dx[s] for `group` inputs from s on, those before the first being the initial state. */
static void push_rows(const Tile *k, int64_t s, int64_t group, const real **rows) {
    const Conv *c = k->c;
    const int64_t taps = c->taps, size = taps - 1;
    const int64_t last = c->grad_final && s + group > c->length - size ? reach_of(c, k->batch, c->length - 1) : 0;
    real *out[GROUP];
    for (int64_t r = 0; r < group; r++) out[r] = k->out + r * TILE;
    if (!c->documents && group == GROUP && s >= 0 && s + GROUP + size <= c->length) {
        for (int64_t j = 0; j < GROUP + size; j++) rows[j] = slot_of(k, k->grads, s + j);
        convolve_group(taps, 0, rows, k->reversed, out, k->count);
    } else {
        for (int64_t r = 0; r < group; r++) {
            for (int64_t j = 0, t = s + r; j < taps; j++, t++) {
                const int counts = t >= 0 && t < c->length && reach_of(c, k->batch, t) >= j;
                rows[j] = counts ? slot_of(k, k->grads, t) : k->zeros;
            }
            convolve_row(taps, 0, rows, k->reversed, out + r, k->count);
        }
    }
    for (int64_t r = 0, t = s; r < group; r++, t++) {
        const int64_t final = t - (c->length - size);
        if (c->grad_final && final >= 0 && size - 1 - final <= last) {
            load_row(k->grad_y, c->grad_final, (int)c->final_dtype, (k->batch * size + final) * c->width + k->first, k->count);
            for (int64_t i = 0; i < k->count; i++) out[r][i] += k->grad_y[i];
        }
        if (t >= 0)
            store_row(c->grad_x, (int)c->x_dtype, (k->batch * c->length + t) * c->width + k->first, k->count, out[r]);
        else
            store_row(c->grad_initial, (int)c->initial_dtype, (k->batch * size + t + size) * c->width + k->first, k->count, out[r]);
    }
}

/* Input s is done once da is known up to s + W − 1, which for the last inputs lies in the rows of another task. */
static void backward_rows(const Tile *k, int64_t begin, int64_t end) {
    const Conv *c = k->c;
    const int64_t size = c->taps - 1, stop = end + size;
    const real *rows[size + GROUP];
    for (int64_t t = begin - size; t < begin; t++) load_input(k, t);
    int64_t s = begin || !c->grad_initial ? begin : -size;
    for (int64_t t = begin, group; t < stop; t += group) {
        const int64_t edge = t < end ? end : t < c->length && stop > c->length ? c->length : stop;
        group = edge - t < GROUP ? edge - t : GROUP;
        if (t < c->length) pull_rows(k, t, group, rows);
        if (t < end) sum_rows(k, t, group, rows);
        for (int64_t count; s < t + group - size; s += count) {
            count = t + group - size - s < GROUP ? t + group - size - s : GROUP;
            push_rows(k, s, count, rows);
        }
    }
}

static void backward_task(void *context, int64_t index) {
    const Conv *c = context;
    const int64_t begin = index * c->block, all = c->batch * c->length;
    const int64_t end = begin + c->block < all ? begin + c->block : all;
    Tile tile, *k = &tile;
    real *memory = make_tile(k, c, 1);
    for (k->first = 0; k->first < c->width; k->first += TILE) {
        k->count = c->width - k->first < TILE ? c->width - k->first : TILE;
        load_weights(k);
        for (int64_t j = 0; j < c->taps; j++)
            memcpy(k->reversed + j * TILE, k->weights + (c->taps - 1 - j) * TILE, TILE * sizeof(real));
        memset(k->reversed + c->taps * TILE, 0, TILE * sizeof(real));
        memset(k->sums, 0, (size_t)(c->taps + 1) * TILE * sizeof(real));
        for (int64_t row = begin, next; row < end; row = next) {
            k->batch = row / c->length;
            next = (k->batch + 1) * c->length < end ? (k->batch + 1) * c->length : end;
            backward_rows(k, row - k->batch * c->length, next - k->batch * c->length);
        }
        for (int64_t j = 0; j <= c->taps; j++) {
            real *partial = c->partial + (index * (c->taps + 1) + j) * c->width + k->first;
            memcpy(partial, k->sums + j * TILE, (size_t)k->count * sizeof(real));
        }
    }
    free(memory);
}

/* The partial sums of all blocks, in their order. */
static void sum_partials(const Conv *c, int64_t blocks) {
    for (int64_t j = 0; j <= c->taps; j++) {
        real *restrict sum = c->partial + j * c->width;
        for (int64_t block = 1; block < blocks; block++) {
            const real *partial = sum + block * (c->taps + 1) * c->width;
#pragma omp simd
            for (int64_t i = 0; i < c->width; i++) sum[i] += partial[i];
        }
        if (j < c->taps && c->weight_dtype == REAL)
            for (int64_t i = 0; i < c->width; i++) ((real *)c->grad_weight)[i * c->taps + j] = sum[i];
        else if (j < c->taps)
            for (int64_t i = 0; i < c->width; i++)
                store_row(c->grad_weight, (int)c->weight_dtype, i * c->taps + j, 1, sum + i);
        else if (c->grad_bias)
            store_row(c->grad_bias, (int)c->bias_dtype, 0, c->width, sum);
    }
}

void EXPORT(causal_conv1d_backward)(const Conv *arguments) {
    Conv c = *arguments;
    const int64_t rows = c.batch * c.length, blocks = (rows + c.block - 1) / c.block;
    c.partial = calloc((size_t)((blocks ? blocks : 1) * (c.taps + 1) * c.width + 1), sizeof(real));
    expect_writes(c.grad_x, bytes_of_x(&c));
    parallel(backward_task, &c, blocks, c.threads);
    sum_partials(&c, blocks);
    free(c.partial);
}
