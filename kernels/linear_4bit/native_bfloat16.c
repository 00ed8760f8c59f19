/* A linear layer over a 4-bit weight for bfloat16 rows, on processors that multiply bfloat16: y = x Wᵀ + bias.

x is taken as it is. The weight is rounded to bfloat16 (in a handful of rows its code, otherwise its product with the
absmax), each pair of products is added to a float32 sum. vdpbf16ps does 32 of them where a float vector does 16. */

#include <stdlib.h>

#include "dequantize_4bit/weight.h"

#if defined(__AVX512BW__) && !defined(REAL_DOUBLE)

typedef uint16_t element;
typedef __m512bh operand;
#define STEP 32
#define TARGET __attribute__((target("avx512bf16")))
#define ROWS 6

INLINE TARGET operand operand_at(const element *from) { return (operand)_mm512_loadu_si512(from); }
INLINE TARGET vec accumulate(vec sum, operand x, operand w) { return (vec)_mm512_dpbf16_ps((__m512)sum, x, w); }

#include "linear_4bit/groups.h"

/* Two copies of the table, because a lookup among 32 reads one bit more than a code has. */
INLINE TARGET __m512i table_of(const float *values) {
    const __m512 table = _mm512_loadu_ps(values);
    return (__m512i)_mm512_cvtne2ps_pbh(table, table);
}

INLINE TARGET operand look_up_group(__m512i codes, int j, __m512i table) {
    return (operand)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * j), table);
}

static void widen_x(element *restrict to, const Linear *l, int64_t row, int64_t from, int64_t count) {
    const element *x = (const element *)l->x + row * l->inputs + from;
    for (int64_t k = 0; k < count; k += GROUP) spread(to + k, x + k);
}

/* The products of a group's codes and its one or two absmax: the lower lanes hold the codes of its first half, and read
the lower half of the table. */
static TARGET void widen_weight(element *restrict to, const Linear *l, int64_t row, int64_t from, int64_t count, const float *restrict scales, int64_t first) {
    const int shift = __builtin_ctzll((uint64_t)l->weight.block);
    const __m512 values = _mm512_loadu_ps(l->weight.values);
    const __m512i low_bits = _mm512_set1_epi16(15), half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    for (int64_t k = 0; k < count; k += GROUP) {
        const int64_t at = row * l->inputs + from + k;
        const __m512i codes = _mm512_loadu_si512(l->weight.packed + at / 2);
        const __m512 low = _mm512_mul_ps(values, _mm512_set1_ps(scales[(at >> shift) - first]));
        const __m512 high = _mm512_mul_ps(values, _mm512_set1_ps(scales[((at + GROUP / 2) >> shift) - first]));
        const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(high, low);
#pragma GCC unroll 4
        for (int j = 0; j < LOOKUPS; j++) {
            const __m512i index = _mm512_ternarylogic_epi32(_mm512_srli_epi16(codes, 4 * j), low_bits, half, 0xEA);
            _mm512_storeu_si512(to + k + j * STEP, _mm512_permutexvar_epi16(index, table));
        }
    }
}

#include "linear_4bit/tiles.h"
#include "linear_4bit/few.h"

/* As `linear_4bit` of native.c, for rows of bfloat16, inputs in whole groups and blocks of 64 or more. */
void EXPORT(linear_4bit_bfloat16)(const uint8_t *packed, const void *absmax, const float *values, const float *map, const float *nested, const float *offset, int64_t block,
                                  const void *x, const real *bias, void *y, int64_t rows, int64_t inputs, int64_t outputs, int64_t threads) {
    Weight weight = weight_of(packed, absmax, values, map, nested, offset, block, inputs * outputs);
    Linear l = {.weight = weight, .x = x, .y = y, .bias = bias, .rows = rows, .inputs = inputs, .outputs = outputs, .dtype = BFLOAT16};
    if (suits_few(&l))
        multiply_few(&l, threads);
    else
        multiply_tiles(&l, threads);
}

#endif
