/* Products of bytes with AVX-512 VNNI: what the kernels for 8-bit and 4-bit weights share. */
#pragma once

#include <stdlib.h>

#include "native.h"

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static __attribute__((unused)) void *aligned(int64_t bytes) { return aligned_alloc(64, (size_t)(bytes / 64 + 1) * 64); }

#if defined(__AVX512BW__)

#define VNNI __attribute__((target("avx512vnni")))

/* The variant avx512 promises less than these kernels need. */
INLINE int has_vnni(void) { return __builtin_cpu_supports("avx512vnni"); }

/* 16 rows of 16 numbers of 4 bytes: rows become columns. */
INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    /* r[4 q + c] has, in its four quarters, columns c, c + 4, c + 8 and c + 12 of rows 4 q … 4 q + 3. */
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        const __m512i a = _mm512_shuffle_i32x4(r[c], r[c + 4], 0x88), b = _mm512_shuffle_i32x4(r[c + 8], r[c + 12], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(r[c], r[c + 4], 0xDD), e = _mm512_shuffle_i32x4(r[c + 8], r[c + 12], 0xDD);
        t[c] = _mm512_shuffle_i32x4(a, b, 0x88);
        t[c + 8] = _mm512_shuffle_i32x4(a, b, 0xDD);
        t[c + 4] = _mm512_shuffle_i32x4(d, e, 0x88);
        t[c + 12] = _mm512_shuffle_i32x4(d, e, 0xDD);
    }
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

/* The sums of the lanes of four registers of integers. */
INLINE void sum_four(int32_t *restrict sums, const __m512i *restrict totals) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(totals[0], totals[1]), _mm512_unpackhi_epi32(totals[0], totals[1]));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(totals[2], totals[3]), _mm512_unpackhi_epi32(totals[2], totals[3]));
    const __m512i abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
    _mm_storeu_si128((__m128i *)sums, _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}

#endif
