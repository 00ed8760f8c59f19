/* A handful of rows of x times a 4-bit weight, with AVX-512: each weight is looked up in a register and used at once.

The absmax multiplies the sum over a lane's codes, which are of one block, so that nothing is scaled weight by weight.
The rows of x pass in chunks that stay in the first cache; W is read once, as it lies in memory.

The file that includes this defines, beside what groups.h and tiles.h ask for,
    look_up_group(codes, j, table)      the values of the codes that a shift by 4 j brings down
    table_of(values)                    the table that it reads
*/

enum { FEW = 6, FIRST_CACHE = 1 << 14 /* bytes of x to a chunk */ };

/* sums[r][i] += x[r] · w[n + i] over `count` inputs from `from` on, for `rows` rows of x, a number known when compiled.
scales: the absmax of row n and after. */
INLINE TARGET void multiply_few_rows(const int rows, const Linear *l, int64_t n, int64_t outputs, int64_t from, int64_t count, const float *restrict scales, float *restrict sums) {
    const Lanes lanes = lanes_of(l->weight.block);
    const __m512i table = table_of(l->weight.values);
    const element *x = l->panel + from;
    vec totals[FEW][NEIGHBOURS] = {0};
    for (int i = 0; i < outputs; i++) {
        const uint8_t *packed = l->weight.packed + ((n + i) * l->inputs + from) / 2, *next = packed + l->inputs / 2;
        const float *absmax = scales + ((i * l->inputs + from) >> lanes.shift);
        const int64_t skipped = from & (l->weight.block - 1);
        vec row[FEW] = {0};
        for (int64_t k = 0; k < count; k += GROUP) {
            const __m512i codes = _mm512_loadu_si512(packed + k / 2);
            _mm_prefetch((const char *)next + k / 2, _MM_HINT_T0);
            const __m512 scale = scale_of(&lanes, absmax + ((skipped + k) >> lanes.shift));
            vec parts[FEW] = {0};
#pragma GCC unroll 8
            for (int j = 0; j < LOOKUPS; j++) {
                const operand values = look_up_group(codes, j, table);
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++) parts[r] = accumulate(parts[r], operand_at(x + r * (l->inputs + STEP) + k + j * STEP), values);
            }
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) row[r] = (vec)_mm512_fmadd_ps((__m512)parts[r], scale, (__m512)row[r]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) totals[r][i] = row[r];
    }
    for (int r = 0; r < rows; r++) add_lanes(sums + r * OUTPUTS, totals[r]);
}

static TARGET void few_task(void *context, int64_t index) {
    const Linear *l = context;
    const int64_t n0 = index * OUTPUTS, outputs = least(OUTPUTS, l->outputs - n0), blocks = l->inputs / l->weight.block;
    float *decoded = l->weight.nested ? malloc((size_t)(outputs * blocks) * sizeof(float)) : 0;
    const float *scales = scales_of(&l->weight, n0 * blocks, outputs * blocks, decoded);
    const int64_t chunk = FIRST_CACHE / (l->rows * (int64_t)sizeof(element)) / GROUP * GROUP;
    float sums[FEW * OUTPUTS] = {0};
    for (int64_t from = 0; from < l->inputs; from += chunk)
        for (int64_t n = 0; n < outputs; n += NEIGHBOURS) {
            const int64_t count = least(chunk, l->inputs - from), some = least(NEIGHBOURS, outputs - n);
            const float *absmax = scales + n * blocks;
            switch (l->rows) {
            case 1: multiply_few_rows(1, l, n0 + n, some, from, count, absmax, sums + n); break;
            case 2: multiply_few_rows(2, l, n0 + n, some, from, count, absmax, sums + n); break;
            case 3: multiply_few_rows(3, l, n0 + n, some, from, count, absmax, sums + n); break;
            case 4: multiply_few_rows(4, l, n0 + n, some, from, count, absmax, sums + n); break;
            case 5: multiply_few_rows(5, l, n0 + n, some, from, count, absmax, sums + n); break;
            case 6: multiply_few_rows(6, l, n0 + n, some, from, count, absmax, sums + n); break;
            }
        }
    for (int64_t r = 0; r < l->rows; r++) {
        for (int64_t n = 0; n < outputs; n++) sums[r * OUTPUTS + n] += l->bias ? l->bias[n0 + n] : 0;
        store_row(l->y, l->dtype, r * l->outputs + n0, outputs, sums + r * OUTPUTS);
    }
    free(decoded);
}

/* Whether there are few rows, and each row of W is made of whole groups and whole blocks. */
INLINE int suits_few(const Linear *l) {
    return l->rows > 0 && l->rows <= FEW && l->inputs % GROUP == 0 && l->inputs % l->weight.block == 0;
}

static TARGET void multiply_few(Linear *l, int64_t threads) {
    /* A row is a vector longer than its inputs: rows at multiples of 4096 bytes would share cache lines. */
    const int64_t stride = l->inputs + STEP;
    l->panel = aligned(l->rows * stride * (int64_t)sizeof(element));
    for (int64_t r = 0; r < l->rows; r++) widen_x(l->panel + r * stride, l, r, 0, l->inputs);
    parallel(few_task, l, (l->outputs + OUTPUTS - 1) / OUTPUTS, threads);
    free(l->panel);
}
