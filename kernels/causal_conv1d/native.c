/* The causal depthwise convolution, forward: each task has some of the B·T rows, and goes through them for every tile. */

#include "conv.h"

static void forward_rows(const Tile *k, int64_t begin, int64_t end) {
    const Conv *c = k->c;
    const real *rows[c->taps - 1 + GROUP];
    for (int64_t t = begin - (c->taps - 1); t < begin; t++) load_input(k, t);
    for (int64_t t = begin, group; t < end; t += group) {
        group = end - t < GROUP ? end - t : GROUP;
        const int64_t offset = (k->batch * c->length + t) * c->width + k->first;
        real *out[GROUP];
        for (int64_t r = 0; r < group; r++)
            out[r] = c->x_dtype == REAL ? (real *)c->y + offset + r * c->width : k->out + r * TILE;
        load_group(k, t, group, rows);
        activate(k, t, group, (int)c->silu, rows, out);
        for (int64_t r = 0; c->x_dtype != REAL && r < group; r++)
            store_row(c->y, (int)c->x_dtype, offset + r * c->width, k->count, out[r]);
    }
}

static void forward_task(void *context, int64_t index) {
    const Conv *c = context;
    const int64_t begin = index * c->block, all = c->batch * c->length;
    const int64_t end = begin + c->block < all ? begin + c->block : all;
    Tile tile, *k = &tile;
    real *memory = make_tile(k, c, 0);
    for (k->first = 0; k->first < c->width; k->first += TILE) {
        k->count = c->width - k->first < TILE ? c->width - k->first : TILE;
        load_weights(k);
        for (int64_t row = begin, next; row < end; row = next) {
            k->batch = row / c->length;
            next = (k->batch + 1) * c->length < end ? (k->batch + 1) * c->length : end;
            forward_rows(k, row - k->batch * c->length, next - k->batch * c->length);
        }
    }
    free(memory);
}

/* The last W − 1 inputs of a batch, zeros for those of another document than the last token's. */
static void store_final(const Conv *c, int64_t batch, real *buffer) {
    const int64_t size = c->taps - 1, reach = c->length ? reach_of(c, batch, c->length - 1) : size;
    for (int64_t row = 0; row < size; row++) {
        const int64_t t = c->length - size + row;
        const int64_t offset = (batch * size + row) * c->width;
        for (int64_t first = 0, count; first < c->width; first += count) {
            count = c->width - first < TILE ? c->width - first : TILE;
            if (size - 1 - row > reach)
                memset(buffer, 0, TILE * sizeof(real));
            else if (t < 0)
                load_initial(c, batch, t + size, first, count, buffer);
            else
                load_row(buffer, c->x, (int)c->x_dtype, batch * c->x_batch + t * c->x_row + first, count);
            store_row(c->final, (int)c->final_dtype, offset + first, count, buffer);
        }
    }
}

void EXPORT(causal_conv1d_forward)(const Conv *c) {
    const int64_t rows = c->batch * c->length;
    real buffer[TILE];
    expect_writes(c->y, bytes_of_x(c));
    parallel(forward_task, (void *)c, (rows + c->block - 1) / c->block, c->threads);
    for (int64_t b = 0; c->final && b < c->batch; b++) store_final(c, b, buffer);
}

/* ---- one token --------------------------------------------------------------------------------------------------- */

/* What kernels/causal_conv1d/native.py packs for a decoding step: contiguous tensors of the type of arithmetic, the
inputs before in `initial` and those that are kept in `final`, both (B, W − 1, E). */
typedef struct {
    const real *x, *weight, *bias, *initial;
    real *y, *final;
    int64_t batch, width, taps, silu;
} Step;

INLINE void step_row(const Step *s, int64_t batch, int64_t taps, int silu) {
    const int64_t width = s->width;
    const real *x = s->x + batch * width, *initial = s->initial + batch * (taps - 1) * width;
    real *restrict y = s->y + batch * width, *restrict final = s->final + batch * (taps - 1) * width;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        real sum = s->bias ? s->bias[i] : 0;
#pragma GCC unroll 4
        for (int64_t j = 0; j < taps - 1; j++) sum += initial[j * width + i] * s->weight[i * taps + j];
        sum += x[i] * s->weight[i * taps + taps - 1];
        y[i] = silu ? sum * logistic_of(sum) : sum;
    }
    if (taps == 1) return;
    memcpy(final, initial + width, (size_t)((taps - 2) * width) * sizeof(real));
    memcpy(final + (taps - 2) * width, x, (size_t)width * sizeof(real));
}

void EXPORT(causal_conv1d_step)(const Step *s) {
    for (int64_t b = 0; b < s->batch; b++) {
        if (s->taps == 4 && s->silu)
            step_row(s, b, 4, 1);
        else
            step_row(s, b, s->taps, (int)s->silu);
    }
}
