/* The products with AVX-512 VNNI, four to a lane of 32 bits. It multiplies unsigned bytes with signed ones: those of the
weight are made unsigned by adding 128, which is taken off again as 128 · Σ x8. */

#if defined(__AVX512BW__)

enum {
    FEW = 16,     /* rows for which laying out the weight would cost more than it saves */
    GROUP = 4,    /* rows of the weight whose lanes are added up together */
    AHEAD = 4096  /* bytes */
};

INLINE __m512i unsigned_of(__m512i bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); }

/* ---- a handful of rows: the weight is read once, as it lies in memory --------------------------------------------- */

/* totals[r] = the products of row r of x with a row of the weight, lane by lane; sum: those of ones with it. rows,
sum_too: known when compiled. */
INLINE VNNI void multiply_few(const int rows, const int sum_too, const Linear *l, const int8_t *restrict x, const int8_t *restrict w, __m512i *restrict totals, __m512i *restrict sum) {
    const __m512i ones = _mm512_set1_epi8(1);
    const int64_t inputs = l->c.inputs;
    __m512i even[TOGETHER], odd[TOGETHER], both = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) even[r] = odd[r] = _mm512_setzero_si512();
    int64_t k = 0;
    for (; k + 128 <= inputs; k += 128) {
        const __m512i w0 = _mm512_loadu_si512(w + k), w1 = _mm512_loadu_si512(w + k + 64);
        const __m512i u0 = unsigned_of(w0), u1 = unsigned_of(w1);
        _mm_prefetch((const char *)w + k + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)w + k + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            even[r] = _mm512_dpbusd_epi32(even[r], u0, _mm512_load_si512(x + r * l->stride + k));
            odd[r] = _mm512_dpbusd_epi32(odd[r], u1, _mm512_load_si512(x + r * l->stride + k + 64));
        }
        if (sum_too) both = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(both, ones, w0), ones, w1);
    }
    for (; k < inputs; k += 64) {
        const __mmask64 mask = inputs - k >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << (inputs - k)) - 1;
        const __m512i w0 = _mm512_maskz_loadu_epi8(mask, w + k), u0 = unsigned_of(w0);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) even[r] = _mm512_dpbusd_epi32(even[r], u0, _mm512_load_si512(x + r * l->stride + k));
        if (sum_too) both = _mm512_dpbusd_epi32(both, ones, w0);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) totals[r] = _mm512_add_epi32(even[r], odd[r]);
    *sum = both;
}

INLINE VNNI void multiply_group(const int rows, const int sum_too, const Linear *l, int64_t m, int64_t n, int64_t some, int32_t *restrict sums, int32_t *restrict weight_sums) {
    __m512i totals[TOGETHER][GROUP], of_weight[GROUP];
    for (int64_t i = 0; i < GROUP; i++) {
        __m512i row[TOGETHER];
        /* The last row stands for those that are not there. */
        multiply_few(rows, sum_too, l, l->x8 + m * l->stride, l->c.weight + (n + least(i, some - 1)) * l->c.inputs, row, of_weight + i);
        for (int r = 0; r < rows; r++) totals[r][i] = row[r];
    }
    for (int r = 0; r < rows; r++) sum_four(sums + r * OUTPUTS, totals[r]);
    if (sum_too) sum_four(weight_sums, of_weight);
}

static VNNI void few_task(void *context, int64_t index) {
    const Linear *l = context;
    const int64_t n0 = index * OUTPUTS, outputs = least(OUTPUTS, l->c.outputs - n0), rows = l->c.rows;
    int32_t sums[FEW * OUTPUTS], weight_sums[OUTPUTS] = {0};
    for (int64_t n = 0; n < outputs; n += GROUP) {
        const int64_t some = least(GROUP, outputs - n);
        for (int64_t m = 0; m < rows; m += TOGETHER) {
            int32_t *to = sums + m * OUTPUTS + n, *too = weight_sums + n;
            /* The sums of the weight are taken once. */
            switch (least(TOGETHER, rows - m) * 2 + (l->zero != 0 && !m)) {
            case 2: multiply_group(1, 0, l, m, n0 + n, some, to, too); break;
            case 3: multiply_group(1, 1, l, m, n0 + n, some, to, too); break;
            case 4: multiply_group(2, 0, l, m, n0 + n, some, to, too); break;
            case 5: multiply_group(2, 1, l, m, n0 + n, some, to, too); break;
            case 6: multiply_group(3, 0, l, m, n0 + n, some, to, too); break;
            case 7: multiply_group(3, 1, l, m, n0 + n, some, to, too); break;
            case 8: multiply_group(4, 0, l, m, n0 + n, some, to, too); break;
            case 9: multiply_group(4, 1, l, m, n0 + n, some, to, too); break;
            }
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t n = 0; n < outputs; n++) sums[r * OUTPUTS + n] = (int32_t)((uint32_t)sums[r * OUTPUTS + n] - 128u * (uint32_t)l->row_sum[r]);
        finish(l, r, n0, outputs, sums + r * OUTPUTS, weight_sums);
    }
}

/* ---- many rows: 64 rows of the weight are laid out for tiles of 6 × 64 sums in registers --------------------------- */

/* tile (inputs / 4, OUTPUTS, 4): the unsigned bytes of 64 rows of the weight, the last of which stands for those that are
not there. A multiple of 64 inputs, zeros after the last. */
static VNNI void fill_tile(const Linear *l, int64_t n0, int64_t outputs, uint8_t *restrict tile, int32_t *restrict weight_sums) {
    const int64_t inputs = l->c.inputs;
    const __m512i ones = _mm512_set1_epi8(1);
    for (int64_t n = 0; n < OUTPUTS; n += 16) {
        __m512i sum = _mm512_setzero_si512();
        for (int64_t k = 0; k < inputs; k += 64) {
            const __mmask64 mask = inputs - k >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << (inputs - k)) - 1;
            __m512i rows[16];
            for (int i = 0; i < 16; i++) rows[i] = _mm512_maskz_loadu_epi8(mask, l->c.weight + (n0 + least(n + i, outputs - 1)) * inputs + k);
            transpose(rows);
            for (int i = 0; i < 16; i++) {
                if (l->zero) sum = _mm512_dpbusd_epi32(sum, ones, rows[i]);
                _mm512_store_si512(tile + (k / 4 + i) * 4 * OUTPUTS + n * 4, unsigned_of(rows[i]));
            }
        }
        _mm512_storeu_si512(weight_sums + n, sum);
    }
}

/* y of `rows` rows of x from m on, a number known when compiled. */
INLINE VNNI void multiply_tile(const int rows, const Linear *l, int64_t m, int64_t n0, int64_t outputs, const uint8_t *restrict tile, const int32_t *restrict weight_sums) {
    __m512i totals[ROWS][4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) totals[r][v] = _mm512_set1_epi32((int32_t)(0u - 128u * (uint32_t)l->row_sum[m + r]));
    const int8_t *x = l->x8 + m * l->stride;
    const int64_t stride = l->stride, steps = (l->c.inputs + 3) / 4;
    for (int64_t k = 0; k < steps; k++, tile += 4 * OUTPUTS, x += 4) {
        const __m512i w0 = _mm512_load_si512(tile), w1 = _mm512_load_si512(tile + 64), w2 = _mm512_load_si512(tile + 128), w3 = _mm512_load_si512(tile + 192);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + r * stride, 4);
            const __m512i x4 = _mm512_set1_epi32(four);
            totals[r][0] = _mm512_dpbusd_epi32(totals[r][0], w0, x4);
            totals[r][1] = _mm512_dpbusd_epi32(totals[r][1], w1, x4);
            totals[r][2] = _mm512_dpbusd_epi32(totals[r][2], w2, x4);
            totals[r][3] = _mm512_dpbusd_epi32(totals[r][3], w3, x4);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        int32_t sums[OUTPUTS];
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) _mm512_storeu_si512(sums + 16 * v, totals[r][v]);
        finish(l, m + r, n0, outputs, sums, weight_sums);
    }
}

static VNNI void many_task(void *context, int64_t index) {
    const Linear *l = context;
    const int64_t n0 = index * OUTPUTS, outputs = least(OUTPUTS, l->c.outputs - n0), rows = l->c.rows;
    uint8_t *tile = aligned(l->stride * OUTPUTS);
    int32_t sums[OUTPUTS];
    fill_tile(l, n0, outputs, tile, sums);
    int64_t m = 0;
    for (; m + ROWS <= rows; m += ROWS) multiply_tile(ROWS, l, m, n0, outputs, tile, sums);
    switch (rows - m) {
    case 5: multiply_tile(5, l, m, n0, outputs, tile, sums); break;
    case 4: multiply_tile(4, l, m, n0, outputs, tile, sums); break;
    case 3: multiply_tile(3, l, m, n0, outputs, tile, sums); break;
    case 2: multiply_tile(2, l, m, n0, outputs, tile, sums); break;
    case 1: multiply_tile(1, l, m, n0, outputs, tile, sums); break;
    }
    free(tile);
}

#endif
