/* What the 4-bit linear kernels share.

The file that includes this defines
    element, STEP                       what the operands are made of, and how many of them are in a vector
    operand, operand_at(from)           such a vector, and the one at an address
    accumulate(sum, x, w)               sum + the products of two of them, lane by lane
    TARGET                              an attribute of the functions that use them, or nothing
*/
#pragma once

typedef struct {
    Weight weight;
    const void *x;
    void *y;
    const real *bias;
    element *panel; /* x as the kernel wants it */
    int64_t rows, inputs, outputs;
    int dtype;
    int grouped; /* whether the operands are in the order of `spread` */
} Linear;

/* 64 bytes are a GROUP of 128 codes. Shifted right by 4 j bits, each lane of STEP has one code of the group in its low
bits, which are all that a lookup in a register reads: element j ^ 1 of the lane's codes, for the first code of a byte is
in its high half. */
enum { GROUP = 128, LOOKUPS = GROUP / STEP };

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static __attribute__((unused)) void *aligned(int64_t bytes) { return aligned_alloc(64, (size_t)(bytes / 64 + 1) * 64); }

/* A group of x in the order of the lookups. */
INLINE void spread(element *restrict to, const element *restrict x) {
    for (int j = 0; j < LOOKUPS; j++)
        for (int lane = 0; lane < STEP; lane++) to[j * STEP + lane] = x[LOOKUPS * lane + (j ^ 1)];
}

#if defined(__AVX512F__) && !defined(REAL_DOUBLE)
/* The absmax of a group, which has one, two or four of them, for each of 16 lanes: lane i holds the codes 8 i … 8 i + 7. */
typedef struct {
    __m512i block;
    __mmask8 used;
    int shift; /* log2 of the block size */
} Lanes;

INLINE Lanes lanes_of(int64_t block) {
    const int shift = __builtin_ctzll((uint64_t)block);
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const int blocks = shift < 7 ? GROUP >> shift : 1;
    return (Lanes){_mm512_srl_epi32(_mm512_slli_epi32(lanes, 3), _mm_cvtsi32_si128(shift < 7 ? shift : 7)), (__mmask8)((1 << blocks) - 1), shift};
}

INLINE __m512 scale_of(const Lanes *lanes, const float *absmax) {
    return _mm512_permutexvar_ps(lanes->block, _mm512_castps128_ps512(_mm_maskz_loadu_ps(lanes->used, absmax)));
}
#endif
