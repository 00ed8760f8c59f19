/* RMSNorm: y = x · r · w with r = 1 / sqrt(mean(x²) + eps), rows of `width` elements.

Backward, with g = dy · w:  dx = r · (g − x · r² · mean(g x)),  dw = Σ over rows of dy · x · r.
Bound by memory: forward reads x and writes y, backward reads x and dy and writes dx. */

#include <math.h>
#include <stdlib.h>

#include "native.h"

typedef struct {
    const void *x, *grad_y;
    void *y, *grad_x;
    const real *weight;
    real *scale, *grad_weight;
    int64_t rows, width, block;
    double eps;
    int dtype;
} Norm;

static void forward_block(void *context, int64_t index) {
    const Norm *n = context;
    real *buffer = malloc((size_t)n->width * sizeof(real));
    int64_t end = (index + 1) * n->block;
    for (int64_t row = index * n->block; row < (end < n->rows ? end : n->rows); row++) {
        const real *x = row_of(buffer, n->x, n->dtype, row * n->width, n->width);
        real *y = n->dtype == REAL ? (real *)n->y + row * n->width : buffer, sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n->width; i++) sum += x[i] * x[i];
        real scale = 1 / (real)sqrt(sum / (real)n->width + (real)n->eps);
        n->scale[row] = scale;
#pragma omp simd
        for (int64_t i = 0; i < n->width; i++) y[i] = x[i] * scale * n->weight[i];
        if (n->dtype != REAL) store_row(n->y, n->dtype, row * n->width, n->width, buffer);
    }
    free(buffer);
}

static void backward_block(void *context, int64_t index) {
    const Norm *n = context;
    real *buffers = malloc(3 * (size_t)n->width * sizeof(real));
    real *grad_weight = n->grad_weight + index * n->width;
    memset(grad_weight, 0, (size_t)n->width * sizeof(real));
    int64_t end = (index + 1) * n->block;
    for (int64_t row = index * n->block; row < (end < n->rows ? end : n->rows); row++) {
        const int64_t offset = row * n->width;
        const real *x = row_of(buffers, n->x, n->dtype, offset, n->width);
        const real *grad_y = row_of(buffers + n->width, n->grad_y, n->dtype, offset, n->width);
        real *grad_x = n->dtype == REAL ? (real *)n->grad_x + offset : buffers + 2 * n->width;
        real scale = n->scale[row], sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n->width; i++) sum += grad_y[i] * n->weight[i] * x[i];
        real pull = sum / (real)n->width * scale * scale * scale;
#pragma omp simd
        for (int64_t i = 0; i < n->width; i++) {
            grad_x[i] = grad_y[i] * n->weight[i] * scale - x[i] * pull;
            grad_weight[i] += grad_y[i] * (x[i] * scale);
        }
        if (n->dtype != REAL) store_row(n->grad_x, n->dtype, offset, n->width, grad_x);
    }
    free(buffers);
}

/* x, y: (rows, width) of `dtype`; weight: (width), scale: (rows), the r of each row, kept for the backward pass. */
void EXPORT(rms_norm_forward)(const void *x, int64_t dtype, const real *weight, double eps, void *y, real *scale,
                              int64_t rows, int64_t width, int64_t block, int64_t threads) {
    Norm norm = {.x = x, .y = y, .weight = weight, .scale = scale, .rows = rows, .width = width, .block = block, .eps = eps, .dtype = (int)dtype};
    parallel(forward_block, &norm, (rows + block - 1) / block, threads);
}

/* grad_weight: (blocks, width), one partial sum for each block of rows; the caller adds them up. */
void EXPORT(rms_norm_backward)(const void *grad_y, const void *x, int64_t dtype, const real *weight, const real *scale,
                               void *grad_x, real *grad_weight, int64_t rows, int64_t width, int64_t block, int64_t threads) {
    Norm norm = {.x = x, .grad_y = grad_y, .grad_x = grad_x, .weight = weight, .scale = (real *)scale, .grad_weight = grad_weight, .rows = rows, .width = width, .block = block, .dtype = (int)dtype};
    parallel(backward_block, &norm, (rows + block - 1) / block, threads);
}
