/* A linear layer over an affine 4-bit weight, for a handful of rows: y = x Wᵀ + bias with

    w_oi = scale_og · (code_oi − zero_point_og) for the group g of i

Sums are kept in `real`. digits.h has the same in products of bytes, for AVX-512 VNNI and float. */

#include <math.h>

#include "vnni.h"

enum { OUTPUTS = 32 /* rows of W to a task */, MOST_ROWS = 16 /* of x */ };

typedef struct {
    const void *x;                             /* (rows, inputs) */
    void *y;                                   /* (rows, outputs) */
    int64_t rows, threads, dtype;
    const uint8_t *packed;                     /* (outputs, groups · block / 2), the first code of a byte in its low half */
    const float *scale;                        /* (outputs, groups) */
    const uint8_t *zero_point;
    const real *bias;                          /* (outputs), or null */
    int64_t inputs, outputs, block;
} Call;

typedef struct {
    Call c;
    int64_t groups, width; /* width: the inputs of all groups */
    real *x;               /* (rows, width), zeros after the inputs: of each group first the even ones */
    int8_t *digits;        /* the rest: see digits.h */
    int32_t *start;
    float *digit_scale, *x_sum;
    int64_t parts;
} Linear;

/* A row of x in the order of the codes. */
static void prepare_row(Linear *l, int64_t row) {
    const Call *c = &l->c;
    const int64_t half = c->block / 2;
    real in_order[256];
    for (int64_t g = 0; g < l->groups; g++) {
        real *to = l->x + row * l->width + g * c->block;
        memset(in_order, 0, sizeof in_order);
        load_row(in_order, c->x, (int)c->dtype, row * c->inputs + g * c->block, least(c->block, c->inputs - g * c->block));
        for (int64_t i = 0; i < half; i++) {
            to[i] = in_order[2 * i];
            to[half + i] = in_order[2 * i + 1];
        }
    }
}

/* Σ x_i (code_i − zero) over a group. */
INLINE real multiply_codes(const real *restrict x, const uint8_t *restrict packed, int32_t zero, int64_t half) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < half; i++) sum += x[i] * (real)((packed[i] & 15) - zero) + x[half + i] * (real)((packed[i] >> 4) - zero);
    return sum;
}

static void plain_task(void *context, int64_t index) {
    const Linear *l = context;
    const Call *c = &l->c;
    const int64_t n0 = index * OUTPUTS, outputs = least(OUTPUTS, c->outputs - n0), half = c->block / 2;
    for (int64_t r = 0; r < c->rows; r++) {
        real y[OUTPUTS];
        for (int64_t n = 0; n < outputs; n++) {
            const int64_t at = (n0 + n) * l->groups;
            y[n] = 0;
            for (int64_t g = 0; g < l->groups; g++)
                y[n] += (real)c->scale[at + g] * multiply_codes(l->x + r * l->width + g * c->block, c->packed + (at + g) * half, c->zero_point[at + g], half);
            if (c->bias) y[n] += c->bias[n0 + n];
        }
        store_row(c->y, (int)c->dtype, r * c->outputs + n0, outputs, y);
    }
}

#include "linear_int4/digits.h"

/* At most MOST_ROWS rows. */
void EXPORT(linear_int4)(const Call *call) {
    Linear l = {.c = *call, .groups = (call->inputs + call->block - 1) / call->block};
    const int64_t tasks = (call->outputs + OUTPUTS - 1) / OUTPUTS;
    l.width = l.groups * call->block;
#if DIGITS
    const int ready = has_vnni() && make_digits(&l);
    if (ready) parallel(digits_task, &l, tasks, call->threads);
    free(l.digits);
    if (ready) return;
#endif
    l.x = aligned(call->rows * l.width * (int64_t)sizeof(real));
    for (int64_t r = 0; r < call->rows; r++) prepare_row(&l, r);
    parallel(plain_task, &l, tasks, call->threads);
    free(l.x);
}
