/* RMSNorm: y = x · r · w with r = 1 / sqrt(mean(x²) + eps), rows of `width` elements.

Backward, with g = dy · w:  dx = r · (g − x · r² · mean(g x)),  dw = Σ over rows of dy · x · r.
Bound by memory: forward reads x and writes y, backward reads x and dy and writes dx. */

#include <math.h>
#include <stdlib.h>

#include "native.h"

/* What kernels/rms_norm/native.py packs: contiguous tensors, x, y and their gradients of `dtype`. `scale` is the r of
each row, kept for the backward pass where it is not null. */
typedef struct {
    const void *x, *weight, *grad_y;
    void *y, *grad_x, *grad_weight;
    real *scale;
    int64_t rows, width, block, dtype, weight_dtype, threads;
    double eps;
    real *partial; /* (blocks, width): the gradient of the weight from each block of rows; null in the arguments */
} Norm;

/* Whether rows of a result are streamed from a buffer. */
INLINE int is_streamed(const Norm *n, const void *result) {
    const int64_t row = n->width * (int64_t)sizeof(real);
    return n->dtype == REAL && n->rows * row >= STREAM_FROM && !(((uintptr_t)result | (uint64_t)row) & 63);
}

INLINE int64_t end_of(const Norm *n, int64_t index) {
    return (index + 1) * n->block < n->rows ? (index + 1) * n->block : n->rows;
}

static void forward_block(void *context, int64_t index) {
    const Norm *n = context;
    const int dtype = (int)n->dtype, streamed = is_streamed(n, n->y), direct = dtype == REAL && !streamed;
    real *buffers = malloc(2 * (size_t)n->width * sizeof(real) + 1);
    const real *weight = row_of(buffers + n->width, n->weight, (int)n->weight_dtype, 0, n->width);
    for (int64_t row = index * n->block; row < end_of(n, index); row++) {
        const real *x = row_of(buffers, n->x, dtype, row * n->width, n->width);
        real *y = direct ? (real *)n->y + row * n->width : buffers, sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n->width; i++) sum += x[i] * x[i];
        const real scale = 1 / (real)sqrt(sum / (real)n->width + (real)n->eps);
        if (n->scale) n->scale[row] = scale;
#pragma omp simd
        for (int64_t i = 0; i < n->width; i++) y[i] = x[i] * scale * weight[i];
        if (streamed) stream_row((real *)n->y + row * n->width, y, n->width);
        if (dtype != REAL) store_row(n->y, dtype, row * n->width, n->width, y);
    }
    end_stream();
    free(buffers);
}

static void backward_block(void *context, int64_t index) {
    const Norm *n = context;
    const int dtype = (int)n->dtype, streamed = is_streamed(n, n->grad_x), direct = dtype == REAL && !streamed;
    real *buffers = malloc(4 * (size_t)n->width * sizeof(real) + 1);
    const real *weight = row_of(buffers + 3 * n->width, n->weight, (int)n->weight_dtype, 0, n->width);
    real *partial = n->partial + index * n->width;
    for (int64_t row = index * n->block; row < end_of(n, index); row++) {
        const int64_t offset = row * n->width;
        const real *x = row_of(buffers, n->x, dtype, offset, n->width);
        const real *grad_y = row_of(buffers + n->width, n->grad_y, dtype, offset, n->width);
        real *grad_x = direct ? (real *)n->grad_x + offset : buffers + 2 * n->width;
        real scale = n->scale[row], sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n->width; i++) sum += grad_y[i] * weight[i] * x[i];
        const real pull = sum / (real)n->width * scale * scale * scale;
#pragma omp simd
        for (int64_t i = 0; i < n->width; i++) {
            grad_x[i] = grad_y[i] * weight[i] * scale - x[i] * pull;
            partial[i] += grad_y[i] * (x[i] * scale);
        }
        if (streamed) stream_row((real *)n->grad_x + offset, grad_x, n->width);
        if (dtype != REAL) store_row(n->grad_x, dtype, offset, n->width, grad_x);
    }
    end_stream();
    free(buffers);
}

INLINE int64_t bytes_of_x(const Norm *n) {
    return n->rows * n->width * (n->dtype == REAL ? (int64_t)sizeof(real) : n->dtype == FLOAT32 ? 4 : 2);
}

void EXPORT(rms_norm_forward)(const Norm *norm) {
    expect_writes(norm->y, bytes_of_x(norm));
    parallel(forward_block, (void *)norm, (norm->rows + norm->block - 1) / norm->block, norm->threads);
}

void EXPORT(rms_norm_backward)(const Norm *arguments) {
    Norm n = *arguments;
    const int64_t blocks = (n.rows + n.block - 1) / n.block;
    n.partial = calloc((size_t)((blocks ? blocks : 1) * n.width) + 1, sizeof(real));
    expect_writes(n.grad_x, bytes_of_x(&n));
    parallel(backward_block, &n, blocks, n.threads);
    for (int64_t block = 1; block < blocks; block++)
#pragma omp simd
        for (int64_t i = 0; i < n.width; i++) n.partial[i] += n.partial[block * n.width + i];
    store_row(n.grad_weight, (int)n.weight_dtype, 0, n.width, n.partial);
    free(n.partial);
}
