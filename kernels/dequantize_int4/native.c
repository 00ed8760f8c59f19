/* The weight of an affine 4-bit record: w_oi = scale_og · (code_oi − zero_point_og) for the group g of i. */

#include "native.h"

enum { ROWS = 16 /* of the weight to a task */, LONGEST = 256 /* group */ };

typedef struct {
    const uint8_t *packed, *zero_point;
    const float *scale;
    void *weight;
    int64_t outputs, inputs, block, dtype, threads;
} Call;

static void restore_rows(void *context, int64_t index) {
    const Call *c = context;
    const int64_t groups = (c->inputs + c->block - 1) / c->block, half = c->block / 2;
    const int64_t end = (index + 1) * ROWS < c->outputs ? (index + 1) * ROWS : c->outputs;
    for (int64_t o = index * ROWS; o < end; o++)
        for (int64_t g = 0; g < groups; g++) {
            const uint8_t *restrict packed = c->packed + (o * groups + g) * half;
            const real scale = (real)c->scale[o * groups + g];
            const int zero = c->zero_point[o * groups + g];
            const int64_t rest = c->inputs - g * c->block;
            real values[LONGEST];
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                values[2 * i] = scale * (real)((packed[i] & 15) - zero);
                values[2 * i + 1] = scale * (real)((packed[i] >> 4) - zero);
            }
            store_row(c->weight, (int)c->dtype, o * c->inputs + g * c->block, rest < c->block ? rest : c->block, values);
        }
}

void EXPORT(dequantize_int4)(const Call *call) {
    Call c = *call;
    expect_writes(c.weight, c.outputs * c.inputs * REAL_BYTES);
    parallel(restore_rows, &c, (c.outputs + ROWS - 1) / ROWS, c.threads);
}
