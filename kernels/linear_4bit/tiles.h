/* Many rows of x times a 4-bit weight: tiles of the weight are widened once into the first cache, and multiplied with
all rows of x from there.

Both operands run along the inputs: a vector holds STEP consecutive inputs of one row of x or of W, an accumulator is a
vector, and its lanes are added up when a chunk of inputs is done. So nothing is transposed. 4 rows of W stand against
ROWS of x in registers.

The file that includes this defines, beside what groups.h asks for,
    ROWS                                rows of x to a register tile
    widen_x(to, l, row, from, count)    `count` inputs of a row of x, with zeros up to the next multiple of STEP
    widen_weight(to, l, row, from, count, scales, first)
                                        the same for a row of the weight, in the same order; scales: the absmax from
                                        block `first` on
*/

enum {
    CHUNK = 1024,           /* inputs that a pass takes; a tile of W is then 16 kB in float */
    STRIDE = CHUNK + STEP,  /* not a power of two, whose multiples would share cache lines */
    OUTPUTS = 64,           /* rows of W to a task */
    MOST_ROWS = 128,        /* rows of x that stay in the second cache */
    NEIGHBOURS = 4          /* rows of W to a register tile */
};

/* sums[i] += the lanes of the four accumulators of a row of x. */
INLINE TARGET void add_lanes(real *restrict sums, const vec *restrict accumulators) {
#if defined(__AVX512F__) && !defined(REAL_DOUBLE)
    const __m512 a = (__m512)accumulators[0], b = (__m512)accumulators[1], c = (__m512)accumulators[2], d = (__m512)accumulators[3];
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), quarter));
#else
    for (int n = 0; n < NEIGHBOURS; n++) {
        real lanes[LANES];
        memcpy(lanes, accumulators + n, sizeof lanes);
        for (int width = LANES / 2; width; width /= 2)
            for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
        sums[n] += lanes[0];
    }
#endif
}

/* sums[r][n] += Σ over `steps` vectors of x[r] · w[n], for `count` rows of x, known when compiled. */
INLINE TARGET void multiply(const int count, const element *restrict x, const element *restrict w, int64_t steps, real *restrict sums) {
    vec accumulators[ROWS][NEIGHBOURS];
    for (int r = 0; r < count; r++)
        for (int n = 0; n < NEIGHBOURS; n++) accumulators[r][n] = (vec){0};
    for (int64_t s = 0; s < steps * STEP; s += STEP)
#pragma GCC unroll 8
        for (int r = 0; r < count; r++)
#pragma GCC unroll 4
            for (int n = 0; n < NEIGHBOURS; n++) accumulators[r][n] = accumulate(accumulators[r][n], operand_at(x + r * STRIDE + s), operand_at(w + n * STRIDE + s));
    for (int r = 0; r < count; r++) add_lanes(sums + r * OUTPUTS, accumulators[r]);
}

static TARGET void multiply_rows(int64_t count, const element *x, const element *w, int64_t steps, real *sums) {
    for (; count >= ROWS; count -= ROWS, x += ROWS * STRIDE, sums += ROWS * OUTPUTS) multiply(ROWS, x, w, steps, sums);
    switch (count) {
#if ROWS > 5
    case 5: multiply(5, x, w, steps, sums); break;
    case 4: multiply(4, x, w, steps, sums); break;
    case 3: multiply(3, x, w, steps, sums); break;
#endif
#if ROWS > 2
    case 2: multiply(2, x, w, steps, sums); break;
#endif
    case 1: multiply(1, x, w, steps, sums); break;
    }
}

/* A row of x into the panel. */
static TARGET void panel_task(void *context, int64_t row) {
    const Linear *l = context;
    for (int64_t from = 0, chunk = 0; from < l->inputs; from += CHUNK, chunk++)
        widen_x(l->panel + (chunk * l->rows + row) * STRIDE, l, row, from, least(CHUNK, l->inputs - from));
}

static TARGET void outputs_task(void *context, int64_t index) {
    const Linear *l = context;
    const int64_t n0 = index * OUTPUTS, outputs = least(OUTPUTS, l->outputs - n0), block = l->weight.block;
    const int64_t first = n0 * l->inputs / block, blocks = ((n0 + outputs) * l->inputs + block - 1) / block - first;
    float *decoded = l->weight.nested ? malloc((size_t)blocks * sizeof(float)) : 0;
    const float *scales = scales_of(&l->weight, first, blocks, decoded);
    element *tile = aligned(NEIGHBOURS * STRIDE * sizeof(element));
    real *sums = aligned(MOST_ROWS * OUTPUTS * sizeof(real));
    memset(tile, 0, NEIGHBOURS * STRIDE * sizeof(element));
    for (int64_t m0 = 0; m0 < l->rows; m0 += MOST_ROWS) {
        const int64_t rows = least(MOST_ROWS, l->rows - m0);
        memset(sums, 0, (size_t)(rows * OUTPUTS) * sizeof(real));
        for (int64_t from = 0, chunk = 0; from < l->inputs; from += CHUNK, chunk++) {
            const int64_t count = least(CHUNK, l->inputs - from), steps = (count + STEP - 1) / STEP;
            for (int64_t n = 0; n < outputs; n += NEIGHBOURS) {
                for (int64_t i = 0; i < least(NEIGHBOURS, outputs - n); i++)
                    widen_weight(tile + i * STRIDE, l, n0 + n + i, from, count, scales, first);
                multiply_rows(rows, l->panel + (chunk * l->rows + m0) * STRIDE, tile, steps, sums + n);
            }
        }
        for (int64_t m = 0; m < rows; m++) {
            real *row = sums + m * OUTPUTS;
            if (l->bias)
                for (int64_t n = 0; n < outputs; n++) row[n] += l->bias[n0 + n];
            store_row(l->y, l->dtype, (m0 + m) * l->outputs + n0, outputs, row);
        }
    }
    free(sums);
    free(tile);
    free(decoded);
}

static TARGET void multiply_tiles(Linear *l, int64_t threads) {
    const int64_t chunks = (l->inputs + CHUNK - 1) / CHUNK;
    l->panel = aligned(chunks * l->rows * STRIDE * (int64_t)sizeof(element));
    parallel(panel_task, l, l->rows, l->rows < 8 ? 1 : threads);
    parallel(outputs_task, l, (l->outputs + OUTPUTS - 1) / OUTPUTS, threads);
    free(l->panel);
}
