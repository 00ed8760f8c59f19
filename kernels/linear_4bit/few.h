/* A handful of rows of x times a 4-bit weight, with AVX-512: each weight is looked up in a register and used at once.

The absmax multiplies the sum over a lane's codes, which are of one block, so that nothing is scaled weight by weight.

The file that includes this defines, beside what groups.h asks for,
    look_up_group(codes, j, table)      the values of the codes that a shift by 4 j brings down
    table_of(values)                    the table that it reads
*/

enum {
    FEW = 4,
    AHEAD = 2048 /* bytes of W that are fetched before they are read */
};

/* sums[r][i] = x[r] · w[n + i] for `rows` rows of x, a number known when compiled, and one row of W after the other, as
they lie in memory. scales: the absmax of row n and after. */
INLINE TARGET void multiply_few_rows(const int rows, const Linear *l, int64_t n, int64_t outputs, const float *restrict scales, float sums[FEW][NEIGHBOURS]) {
    const Lanes lanes = lanes_of(l->weight.block);
    const int64_t blocks = l->inputs >> lanes.shift;
    const __m512i table = table_of(l->weight.values);
    vec totals[FEW][NEIGHBOURS] = {0};
    for (int i = 0; i < outputs; i++) {
        const uint8_t *packed = l->weight.packed + (n + i) * l->inputs / 2;
        const float *absmax = scales + i * blocks;
        vec row[FEW] = {0};
        for (int64_t k = 0; k < l->inputs; k += GROUP) {
            const __m512i codes = _mm512_loadu_si512(packed + k / 2);
            _mm_prefetch((const char *)packed + k / 2 + AHEAD, _MM_HINT_T0);
            const __m512 scale = scale_of(&lanes, absmax + (k >> lanes.shift));
            vec parts[FEW] = {0};
#pragma GCC unroll 8
            for (int j = 0; j < LOOKUPS; j++) {
                const operand values = look_up_group(codes, j, table);
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) parts[r] = accumulate(parts[r], operand_at(l->panel + r * l->inputs + k + j * STEP), values);
            }
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) row[r] = (vec)_mm512_fmadd_ps((__m512)parts[r], scale, (__m512)row[r]);
        }
        for (int r = 0; r < rows; r++) totals[r][i] = row[r];
    }
    for (int r = 0; r < rows; r++) add_lanes(sums[r], totals[r]);
}

static TARGET void few_task(void *context, int64_t index) {
    const Linear *l = context;
    const int64_t n0 = index * OUTPUTS, end = least(n0 + OUTPUTS, l->outputs), blocks = l->inputs / l->weight.block;
    float *decoded = l->weight.nested ? malloc((size_t)((end - n0) * blocks) * sizeof(float)) : 0;
    const float *scales = scales_of(&l->weight, n0 * blocks, (end - n0) * blocks, decoded);
    for (int64_t n = n0; n < end; n += NEIGHBOURS, scales += NEIGHBOURS * blocks) {
        const int64_t outputs = least(NEIGHBOURS, end - n);
        float sums[FEW][NEIGHBOURS] = {0};
        switch (l->rows) {
        case 1: multiply_few_rows(1, l, n, outputs, scales, sums); break;
        case 2: multiply_few_rows(2, l, n, outputs, scales, sums); break;
        case 3: multiply_few_rows(3, l, n, outputs, scales, sums); break;
        case 4: multiply_few_rows(4, l, n, outputs, scales, sums); break;
        }
        for (int64_t r = 0; r < l->rows; r++) {
            for (int64_t i = 0; i < outputs; i++) sums[r][i] += l->bias ? l->bias[n + i] : 0;
            store_row(l->y, l->dtype, r * l->outputs + n, outputs, sums[r]);
        }
    }
    free(decoded);
}

/* Whether there are few rows, and each row of W is made of whole groups and whole blocks. */
INLINE int suits_few(const Linear *l) {
    return l->rows <= FEW && l->inputs % GROUP == 0 && l->inputs % l->weight.block == 0;
}

static TARGET void multiply_few(Linear *l, int64_t threads) {
    l->panel = aligned(l->rows * l->inputs * (int64_t)sizeof(element));
    for (int64_t r = 0; r < l->rows; r++) widen_x(l->panel + r * l->inputs, l, r, 0, l->inputs);
    parallel(few_task, l, (l->outputs + OUTPUTS - 1) / OUTPUTS, threads);
    free(l->panel);
}
