/* The products in pairs of 16 bits, which every processor multiplies and adds up: two products to a lane of 32 bits. */

enum { TOGETHER = 4 /* rows of x that share a row of the weight as it passes */ };

/* sums[r] = Σ x[r] · w for `rows` rows of x, a number known when compiled. */
INLINE void multiply_pairs(const int rows, const Linear *l, const int16_t *restrict x, const int8_t *restrict w, int32_t *restrict sums) {
    const int64_t inputs = l->c.inputs;
    int32_t totals[TOGETHER] = {0};
    int64_t i = 0;
#if defined(__AVX2__)
    __m256i lanes[TOGETHER];
    for (int r = 0; r < rows; r++) lanes[r] = _mm256_setzero_si256();
    for (; i + 16 <= inputs; i += 16) {
        const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + i)));
        for (int r = 0; r < rows; r++) {
            const __m256i x16 = _mm256_loadu_si256((const __m256i *)(x + r * l->stride + i));
            lanes[r] = _mm256_add_epi32(lanes[r], _mm256_madd_epi16(wide, x16));
        }
    }
    for (int r = 0; r < rows; r++) {
        int32_t eight[8];
        _mm256_storeu_si256((__m256i *)eight, lanes[r]);
        for (int j = 0; j < 8; j++) totals[r] += eight[j];
    }
#elif defined(__SSE2__)
    __m128i lanes[TOGETHER];
    for (int r = 0; r < rows; r++) lanes[r] = _mm_setzero_si128();
    for (; i + 8 <= inputs; i += 8) {
        const __m128i bytes = _mm_loadl_epi64((const __m128i *)(w + i));
        const __m128i wide = _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
        for (int r = 0; r < rows; r++) {
            const __m128i x16 = _mm_loadu_si128((const __m128i *)(x + r * l->stride + i));
            lanes[r] = _mm_add_epi32(lanes[r], _mm_madd_epi16(wide, x16));
        }
    }
    for (int r = 0; r < rows; r++) {
        int32_t four[4];
        _mm_storeu_si128((__m128i *)four, lanes[r]);
        for (int j = 0; j < 4; j++) totals[r] += four[j];
    }
#endif
    for (int r = 0; r < rows; r++) {
        int32_t sum = totals[r];
        for (int64_t rest = i; rest < inputs; rest++) sum += (int32_t)x[r * l->stride + rest] * w[rest];
        sums[r * OUTPUTS] = sum;
    }
}

static void pairs_task(void *context, int64_t index) {
    const Linear *l = context;
    const int64_t n0 = index * OUTPUTS, outputs = least(OUTPUTS, l->c.outputs - n0), inputs = l->c.inputs;
    int32_t weight_sums[OUTPUTS] = {0}, sums[TOGETHER * OUTPUTS];
    const int8_t *weight = l->c.weight + n0 * inputs;
    if (l->zero)
        for (int64_t n = 0; n < outputs; n++) {
            int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < inputs; i++) sum += weight[n * inputs + i];
            weight_sums[n] = sum;
        }
    for (int64_t m = 0; m < l->c.rows; m += TOGETHER) {
        const int64_t rows = least(TOGETHER, l->c.rows - m);
        const int16_t *x = l->x16 + m * l->stride;
        for (int64_t n = 0; n < outputs; n++) {
            const int8_t *w = weight + n * inputs;
            switch (rows) {
            case 1: multiply_pairs(1, l, x, w, sums + n); break;
            case 2: multiply_pairs(2, l, x, w, sums + n); break;
            case 3: multiply_pairs(3, l, x, w, sums + n); break;
            case 4: multiply_pairs(4, l, x, w, sums + n); break;
            }
        }
        for (int64_t r = 0; r < rows; r++) finish(l, m + r, n0, outputs, sums + r * OUTPUTS, weight_sums);
    }
}
