/* The products with AVX-512 VNNI, which multiplies bytes: x as whole numbers of 31 bits, in four signed digits of 8.

From every code 8 is taken, by adding −8 times the sum of x, and from the zero points, which are then small: they multiply
the sums of x over a group, once for each.

Each 8 inputs have a power of two for a scale, chosen by the largest of them. A float that is not smaller than 1/128 of that
is represented exactly, and a smaller one to 2^-31 of it; the sums of the products of digits and codes are exact. So what
is lost is what float32 loses when it adds: the last bit of a sum. 64 bytes of codes take 8 instructions, where floats
would take 24, and 8 lookups.

The digits of 128 inputs are 8 vectors of 64 bytes: of the even inputs, the first codes of the bytes, the four digits from
the highest, then those of the odd ones. Lane i of a vector has the inputs 8 i … 8 i + 7. */

#if defined(__AVX512BW__) && !defined(REAL_DOUBLE)
#define DIGITS 1

enum {
    GROUP = 128,
    GROUP_BYTES = 64,
    DIGIT_BYTES = 512,
    EIGHT = 8,
    LANES_32 = 16,
    MIDDLE = 8,     /* of the codes */
    NEIGHBOURS = 4  /* rows of W that share the loads of x */
};

/* 128 numbers in digits, or 0 where there are some that they cannot hold: NaN, infinity, or next to nothing but not
zero. start: −MIDDLE times the sums of the upper and of the lower two digits of each lane; scale: of each lane. */
static int make_part(const float *restrict x, int8_t *restrict digits, int32_t *restrict start, float *restrict scale) {
    float apart[GROUP], up[GROUP];
    int32_t number[GROUP], largest[LANES_32];
#pragma omp simd
    for (int i = 0; i < GROUP / 2; i++) {
        apart[i] = x[2 * i];
        apart[GROUP / 2 + i] = x[2 * i + 1];
    }
    for (int lane = 0; lane < LANES_32; lane++) {
        int32_t most = 0;
        for (int j = 0; j < EIGHT; j++) {
            const int32_t bits = (int32_t)(bits_of_float(x[lane * EIGHT + j]) & 0x7FFFFFFF);
            most = bits > most ? bits : most;
        }
        largest[lane] = most;
    }
    for (int lane = 0; lane < LANES_32; lane++) {
        const int32_t exponent = (largest[lane] >> 23) - 127; /* 2^exponent ≤ largest < 2^(exponent + 1) */
        if (largest[lane] && (exponent > 90 || exponent < -90)) return 0;
        const float factor = largest[lane] ? float_of_bits((uint32_t)(127 + 29 - exponent) << 23) : 0;
        scale[lane] = largest[lane] ? float_of_bits((uint32_t)(127 - 29 + exponent) << 23) : 0;
        for (int j = 0; j < 4; j++) up[lane * 4 + j] = up[GROUP / 2 + lane * 4 + j] = factor;
    }
#pragma omp simd
    for (int i = 0; i < GROUP; i++) number[i] = (int32_t)rintf(apart[i] * up[i]); /* below 2^30 */
    for (int half = 1; half >= 0; half--) {
        int32_t sums[GROUP];
#pragma omp simd
        for (int i = 0; i < GROUP; i++) {
            const int32_t low = (int8_t)number[i], rest = (number[i] - low) / 256, high = (int8_t)rest;
            number[i] = (rest - high) / 256;
            sums[i] = high * 256 + low;
            const int at = i / (GROUP / 2) * 4 * GROUP_BYTES + i % (GROUP / 2) + half * 2 * GROUP_BYTES;
            digits[at] = (int8_t)high;
            digits[at + GROUP_BYTES] = (int8_t)low;
        }
        for (int lane = 0; lane < LANES_32; lane++) {
            int32_t sum = 0;
            for (int j = 0; j < 4; j++) sum += sums[lane * 4 + j] + sums[GROUP / 2 + lane * 4 + j];
            start[half * LANES_32 + lane] = -MIDDLE * sum;
        }
    }
    return 1;
}

/* x in digits, and its sums over the groups; 0 where it cannot be. */
static int make_digits(Linear *l) {
    const Call *c = &l->c;
    const int64_t parts = l->parts = (l->width + GROUP - 1) / GROUP, all = c->rows * parts;
    l->digits = aligned(all * (DIGIT_BYTES + 3 * LANES_32 * 4) + c->rows * l->groups * 4);
    l->start = (int32_t *)(l->digits + all * DIGIT_BYTES);
    l->digit_scale = (float *)(l->start + all * 2 * LANES_32);
    l->x_sum = l->digit_scale + all * LANES_32;
    for (int64_t r = 0; r < c->rows; r++) {
        float *sums = l->x_sum + r * l->groups;
        for (int64_t g = 0; g < l->groups; g++) sums[g] = 0;
        for (int64_t p = 0; p < parts; p++) {
            const int64_t at = r * parts + p;
            float x[GROUP] = {0};
            /* A large block may fill up whole parts. */
            if (p * GROUP < c->inputs) load_row(x, c->x, (int)c->dtype, r * c->inputs + p * GROUP, least(GROUP, c->inputs - p * GROUP));
            if (!make_part(x, l->digits + at * DIGIT_BYTES, l->start + at * 2 * LANES_32, l->digit_scale + at * LANES_32)) return 0;
            for (int i = 0; i < GROUP && p * GROUP + i < l->width; i += 16) {
                float sum = 0;
                for (int j = 0; j < 16; j++) sum += x[i + j];
                sums[(p * GROUP + i) / c->block] += sum;
            }
        }
    }
    return 1;
}

/* ---- the products ------------------------------------------------------------------------------------------------- */

typedef struct {
    const uint8_t *packed;
    const float *scale;
    const uint8_t *zero_point;
    int64_t bytes, groups; /* of a row */
    int64_t next;          /* the last row: it stands for those that are not there */
} Rows;

/* totals[n] += scale · x · (code − MIDDLE) over the 128 inputs of a part, for NEIGHBOURS rows of W. */
INLINE VNNI void multiply_part(const Linear *l, int64_t at, const __m512i *restrict codes, const __m512 *restrict of_lane, __m512 *restrict totals) {
    const __m512i low = _mm512_set1_epi8(15);
    const int8_t *x = l->digits + at * DIGIT_BYTES;
    __m512i even[NEIGHBOURS], odd[NEIGHBOURS], halves[2][NEIGHBOURS];
#pragma GCC unroll 4
    for (int n = 0; n < NEIGHBOURS; n++) {
        even[n] = _mm512_and_si512(codes[n], low);
        odd[n] = _mm512_and_si512(_mm512_srli_epi16(codes[n], 4), low);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++, x += 2 * GROUP_BYTES) {
        const __m512i start = _mm512_load_si512(l->start + (at * 2 + i) * LANES_32);
        const __m512i even_high = _mm512_load_si512(x), even_low = _mm512_load_si512(x + GROUP_BYTES);
        const __m512i odd_high = _mm512_load_si512(x + 4 * GROUP_BYTES), odd_low = _mm512_load_si512(x + 5 * GROUP_BYTES);
#pragma GCC unroll 4
        for (int n = 0; n < NEIGHBOURS; n++) {
            /* The digits of a number stand 8 bits apart: 8 · 15 · 2^7 · 2^8 leaves room in 31 bits. */
            __m512i sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), even[n], even_high), odd[n], odd_high);
            sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_slli_epi32(sum, 8), even[n], even_low), odd[n], odd_low);
            halves[i][n] = _mm512_add_epi32(sum, start);
        }
    }
    const __m512 x_scale = _mm512_load_ps(l->digit_scale + at * LANES_32), shift = _mm512_set1_ps(65536);
#pragma GCC unroll 4
    for (int n = 0; n < NEIGHBOURS; n++) {
        const __m512 whole = _mm512_fmadd_ps(_mm512_cvtepi32_ps(halves[0][n]), shift, _mm512_cvtepi32_ps(halves[1][n]));
        totals[n] = _mm512_fmadd_ps(whole, _mm512_mul_ps(of_lane[n], x_scale), totals[n]);
    }
}

/* sums[n] = Σ x · w for NEIGHBOURS rows of W. */
static VNNI void multiply_rows(const Linear *l, int64_t row, const Rows *w, float *restrict sums) {
    const int shift = __builtin_ctzll((uint64_t)l->c.block);
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i block_of_lane = _mm512_srl_epi32(_mm512_slli_epi32(lanes, 3), _mm_cvtsi32_si128(shift < 7 ? shift : 7));
    const int64_t blocks = shift < 7 ? GROUP >> shift : 1;
    __m512 totals[NEIGHBOURS];
#pragma GCC unroll 4
    for (int n = 0; n < NEIGHBOURS; n++) totals[n] = _mm512_setzero_ps();
    for (int64_t p = 0; p < l->parts; p++) {
        const int64_t rest = w->bytes - p * GROUP_BYTES, first = p * GROUP >> shift;
        const __mmask64 mask = rest >= GROUP_BYTES ? ~(__mmask64)0 : ((__mmask64)1 << rest) - 1;
        const __mmask8 used = (__mmask8)((1 << least(blocks, w->groups - first)) - 1);
        __m512i codes[NEIGHBOURS];
        __m512 of_lane[NEIGHBOURS];
#pragma GCC unroll 4
        for (int n = 0; n < NEIGHBOURS; n++) {
            const int64_t at = least(n, w->next);
            codes[n] = _mm512_maskz_loadu_epi8(mask, w->packed + at * w->bytes + p * GROUP_BYTES);
            of_lane[n] = _mm512_permutexvar_ps(block_of_lane, _mm512_castps256_ps512(_mm256_maskz_loadu_ps(used, w->scale + at * w->groups + first)));
        }
        multiply_part(l, row * l->parts + p, codes, of_lane, totals);
    }
    /* Less (zero_point − MIDDLE) · scale · X, 16 groups at a time. */
    for (int64_t g = 0; g < w->groups; g += 16) {
        const __mmask16 used = (__mmask16)(w->groups - g >= 16 ? 0xFFFF : (1 << (w->groups - g)) - 1);
        const __m512 x_sum = _mm512_maskz_loadu_ps(used, l->x_sum + row * w->groups + g);
#pragma GCC unroll 4
        for (int n = 0; n < NEIGHBOURS; n++) {
            const int64_t at = least(n, w->next) * w->groups + g;
            const __m512i zero_points = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(used, w->zero_point + at));
            const __m512 zeros = _mm512_cvtepi32_ps(_mm512_sub_epi32(zero_points, _mm512_set1_epi32(MIDDLE)));
            totals[n] = _mm512_fnmadd_ps(_mm512_mul_ps(zeros, _mm512_maskz_loadu_ps(used, w->scale + at)), x_sum, totals[n]);
        }
    }
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(totals[0], totals[1]), _mm512_unpackhi_ps(totals[0], totals[1]));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(totals[2], totals[3]), _mm512_unpackhi_ps(totals[2], totals[3]));
    const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

static void digits_task(void *context, int64_t index) {
    const Linear *l = context;
    const Call *c = &l->c;
    const int64_t n0 = index * OUTPUTS, outputs = least(OUTPUTS, c->outputs - n0);
    const int64_t bytes = l->width / 2;
    float sums[MOST_ROWS * OUTPUTS];
    for (int64_t n = 0; n < outputs; n += NEIGHBOURS) {
        const int64_t at = n0 + n;
        const Rows w = {c->packed + at * bytes, c->scale + at * l->groups, c->zero_point + at * l->groups, bytes, l->groups, outputs - n - 1};
        for (int64_t r = 0; r < c->rows; r++) multiply_rows(l, r, &w, sums + r * OUTPUTS + n);
    }
    for (int64_t r = 0; r < c->rows; r++) {
        if (c->bias)
            for (int64_t n = 0; n < outputs; n++) sums[r * OUTPUTS + n] += c->bias[n0 + n];
        store_row(c->y, (int)c->dtype, r * c->outputs + n0, outputs, sums + r * OUTPUTS);
    }
}

#endif
