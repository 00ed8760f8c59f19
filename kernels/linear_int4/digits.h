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

enum { GROUP = 128, GROUP_BYTES = 64, DIGIT_BYTES = 512, EIGHT = 8, LANES_32 = 16, MIDDLE = 8 };

/* x in digits, or 0 where it has numbers that they cannot hold: NaN, infinity, or next to nothing but not zero. */
static int make_digits(Linear *l) {
    const Call *c = &l->c;
    const int64_t parts = l->parts = (l->width + GROUP - 1) / GROUP, half = c->block / 2;
    const int64_t bytes = c->rows * parts * (DIGIT_BYTES + 3 * LANES_32 * (int64_t)sizeof(int32_t));
    l->digits = aligned(bytes);
    l->start = (int32_t *)(l->digits + c->rows * parts * DIGIT_BYTES);
    l->digit_scale = (float *)(l->start + c->rows * parts * 2 * LANES_32);
    memset(l->digits, 0, (size_t)bytes);
    for (int64_t r = 0; r < c->rows; r++)
        for (int64_t lane = 0; lane < l->width / EIGHT; lane++) {
            const int64_t i = lane * EIGHT, g = i / c->block, within = (i - g * c->block) / 2;
            const float *even = l->x + r * l->width + g * c->block + within, *odd = even + half;
            uint32_t largest = 0;
            for (int j = 0; j < 4; j++) {
                const uint32_t a = bits_of_float(even[j]) & 0x7FFFFFFF, b = bits_of_float(odd[j]) & 0x7FFFFFFF;
                largest = a > largest ? a : largest;
                largest = b > largest ? b : largest;
            }
            if (!largest) continue;
            const int32_t exponent = (int32_t)(largest >> 23) - 127; /* 2^exponent ≤ largest < 2^(exponent + 1) */
            if (exponent > 90 || exponent < -90) return 0;
            const float up = float_of_bits((uint32_t)(127 + 29 - exponent) << 23);
            const int64_t part = r * parts + lane / LANES_32, in_part = lane % LANES_32;
            int8_t *to = l->digits + part * DIGIT_BYTES + in_part * 4;
            int32_t *start = l->start + part * 2 * LANES_32 + in_part;
            l->digit_scale[part * LANES_32 + in_part] = float_of_bits((uint32_t)(127 - 29 + exponent) << 23);
            for (int j = 0; j < 8; j++) {
                int32_t number = (int32_t)lrintf((j < 4 ? even[j] : odd[j - 4]) * up); /* below 2^30 */
                int8_t *digit = to + (j < 4 ? 0 : 4 * GROUP_BYTES) + j % 4;
                for (int d = 3; d >= 0; d--) {
                    const int32_t last = (int8_t)number;
                    digit[d * GROUP_BYTES] = (int8_t)last;
                    start[d / 2 * LANES_32] -= MIDDLE * last * (d % 2 ? 1 : 256);
                    number = (number - last) / 256;
                }
            }
        }
    return 1;
}

/* totals[r] += scale · x · code over 128 inputs of a row of W, for `rows` rows of x, a number known when compiled. */
INLINE VNNI void multiply_part(const int rows, const Linear *l, int64_t part, __m512i codes, __m512 of_lane, __m512 *restrict totals) {
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i even = _mm512_and_si512(codes, low), odd = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        const int64_t at = r * l->parts + part;
        const int8_t *x = l->digits + at * DIGIT_BYTES;
        __m512i halves[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++, x += 2 * GROUP_BYTES) {
            /* The digits of a number stand 8 bits apart: 8 · 15 · 2^7 · 2^8 leaves room in 31 bits. */
            __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even, _mm512_load_si512(x));
            sum = _mm512_slli_epi32(_mm512_dpbusd_epi32(sum, odd, _mm512_load_si512(x + 4 * GROUP_BYTES)), 8);
            sum = _mm512_dpbusd_epi32(sum, even, _mm512_load_si512(x + GROUP_BYTES));
            sum = _mm512_dpbusd_epi32(sum, odd, _mm512_load_si512(x + 5 * GROUP_BYTES));
            halves[i] = _mm512_add_epi32(sum, _mm512_load_si512(l->start + (at * 2 + i) * LANES_32));
        }
        const __m512 whole = _mm512_fmadd_ps(_mm512_cvtepi32_ps(halves[0]), _mm512_set1_ps(65536), _mm512_cvtepi32_ps(halves[1]));
        const __m512 factor = _mm512_mul_ps(of_lane, _mm512_load_ps(l->digit_scale + at * LANES_32));
        totals[r] = _mm512_fmadd_ps(whole, factor, totals[r]);
    }
}

INLINE VNNI void multiply_row(const int rows, const Linear *l, const uint8_t *restrict packed, const float *restrict scale, int shift, __m512i block_of_lane, __m512 *restrict totals) {
    const int64_t bytes = l->width / 2, whole = bytes / GROUP_BYTES, blocks = shift < 7 ? GROUP >> shift : 1;
    const __mmask8 all = (__mmask8)((1 << blocks) - 1);
    __m512 sums[FEW];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) sums[r] = _mm512_setzero_ps();
    int64_t p = 0;
    for (; p < whole; p++) {
        const __m512 scales = _mm512_castps256_ps512(_mm256_maskz_loadu_ps(all, scale + (p * GROUP >> shift)));
        multiply_part(rows, l, p, _mm512_loadu_si512(packed + p * GROUP_BYTES), _mm512_permutexvar_ps(block_of_lane, scales), sums);
    }
    if (bytes > p * GROUP_BYTES) {
        const int64_t first = p * GROUP >> shift;
        const __mmask64 rest = ((__mmask64)1 << (bytes - p * GROUP_BYTES)) - 1;
        const __mmask8 used = (__mmask8)((1 << least(blocks, l->groups - first)) - 1);
        const __m512 scales = _mm512_castps256_ps512(_mm256_maskz_loadu_ps(used, scale + first));
        multiply_part(rows, l, p, _mm512_maskz_loadu_epi8(rest, packed + p * GROUP_BYTES), _mm512_permutexvar_ps(block_of_lane, scales), sums);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) totals[r] = sums[r];
}

/* Less (zero_point − 8) · scale · X, lane by lane: 16 groups at a time. */
INLINE void take_zero_points(const int rows, const Linear *l, const float *restrict scale, const uint8_t *restrict zero_point, __m512 *restrict totals) {
    for (int64_t g = 0; g < l->groups; g += 16) {
        const __mmask16 used = (__mmask16)(l->groups - g >= 16 ? 0xFFFF : (1 << (l->groups - g)) - 1);
        const __m512i zero_points = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(used, zero_point + g));
        const __m512 zeros = _mm512_cvtepi32_ps(_mm512_sub_epi32(zero_points, _mm512_set1_epi32(MIDDLE)));
        const __m512 product = _mm512_mul_ps(zeros, _mm512_maskz_loadu_ps(used, scale + g));
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) totals[r] = _mm512_fnmadd_ps(product, _mm512_maskz_loadu_ps(used, l->x_sum + r * l->groups + g), totals[r]);
    }
}

INLINE VNNI void multiply_outputs(const int rows, const Linear *l, int64_t n0, int64_t outputs, float *restrict sums) {
    const int shift = __builtin_ctzll((uint64_t)l->c.block);
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i block_of_lane = _mm512_srl_epi32(_mm512_slli_epi32(lanes, 3), _mm_cvtsi32_si128(shift < 7 ? shift : 7));
    for (int64_t n = 0; n < outputs; n++) {
        const int64_t at = (n0 + n) * l->groups;
        __m512 totals[FEW];
        multiply_row(rows, l, l->c.packed + at * l->c.block / 2, l->c.scale + at, shift, block_of_lane, totals);
        take_zero_points(rows, l, l->c.scale + at, l->c.zero_point + at, totals);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) sums[r * OUTPUTS + n] = _mm512_reduce_add_ps(totals[r]);
    }
}

static VNNI void digits_task(void *context, int64_t index) {
    const Linear *l = context;
    const Call *c = &l->c;
    const int64_t n0 = index * OUTPUTS, outputs = least(OUTPUTS, c->outputs - n0);
    float sums[FEW * OUTPUTS];
    switch (c->rows) {
    case 1: multiply_outputs(1, l, n0, outputs, sums); break;
    case 2: multiply_outputs(2, l, n0, outputs, sums); break;
    case 3: multiply_outputs(3, l, n0, outputs, sums); break;
    case 4: multiply_outputs(4, l, n0, outputs, sums); break;
    }
    for (int64_t r = 0; r < c->rows; r++) {
        if (c->bias)
            for (int64_t n = 0; n < outputs; n++) sums[r * OUTPUTS + n] += c->bias[n0 + n];
        store_row(c->y, (int)c->dtype, r * c->outputs + n0, outputs, sums + r * OUTPUTS);
    }
}

#endif
