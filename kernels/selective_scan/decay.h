/* The exponentials of the selective scan, in registers of channels: its decays, softplus and the gate. */
#pragma once

#include "native.h"

/* decay(x) = 2^(x / DECAY_SCALE) for |x| ≤ DECAY_RANGE. The polynomials are least maximal fits with the value at 0 exact
and the slope there to 5e-9: the error of a slow decay is paid at every step of a long memory. Where a permutation looks
2^(i/16) up in a register, three terms reach 2e-9 (with 8 entries 3e-8, without a table six terms 2e-9). The entries are
bit patterns less i << 19 (i << 20), which the shifted exponent adds back.

It is the multipliers that are busy, not the adders. So x comes in the unit in which the polynomial, all of it times
2.2524…, begins with f³, and its first step is an addition; the entries hold 1 / 2.2524…, which times it is 1 to 3e-11. */
#ifdef REAL_DOUBLE
#define DECAY_SCALE 1
#define DECAY_RANGE 1021
INLINE vec decay(vec x) {
    vec shifted = x + 0x1.8p52, f = x - (shifted - 0x1.8p52);
    vec p = f * 1.3691488853904124e-12 + 2.5678435993488196e-11;
    p = p * f + 4.44553827187081e-10;
    p = p * f + 7.054911620801121e-09;
    p = p * f + 1.0178086009239696e-07;
    p = p * f + 1.3215486790144305e-06;
    p = p * f + 1.5252733804059838e-05;
    p = p * f + 1.5403530393381606e-04;
    p = p * f + 1.3333558146428441e-03;
    p = p * f + 9.618129107628477e-03;
    p = p * f + 5.5504108664821576e-02;
    p = p * f + 2.402265069591007e-01;
    p = p * f + 6.931471805599453e-01;
    p = p * f + 1;
    return (vec)((ivec)p + ((ivec)shifted << 52));
}
#elif defined(__AVX512F__)
#define DECAY_SCALE 0.5f
#define DECAY_RANGE (125 * DECAY_SCALE)
INLINE vec decay(vec x) {
    const ivec table = {0x3ee34f96, 0x3ee55ff3, 0x3ee7e260, 0x3ee96df5, 0x3ee728ed, 0x3ee524d6, 0x3ee36493, 0x3ee1eb24,
                        0x3ee0bbaa, 0x3edfd96e, 0x3edf47d9, 0x3edf0a7e, 0x3edf2519, 0x3edf9b8d, 0x3ee071eb, 0x3ee1ac74};
    /* Kept apart from the product that made x: a multiply-add would take the place of an addition. */
    __asm__("" : "+v"(x));
    vec shifted = x + 0x1.8p18f, f = x - (shifted - 0x1.8p18f);
    ivec power = (ivec)_mm512_permutexvar_epi32((__m512i)shifted, (__m512i)table) + ((ivec)shifted << 19);
    return (((f + 2.164435863494873f) * f + 3.1225197315216064f) * f + 2.2524218559265137f) * (vec)power;
}
#elif defined(__AVX2__)
#define DECAY_SCALE 0.5f
#define DECAY_RANGE (125 * DECAY_SCALE)
INLINE vec decay(vec x) {
    const ivec table = {0x3ee34f96, 0x3ee7e260, 0x3ee728ed, 0x3ee36493, 0x3ee0bbaa, 0x3edf47d9, 0x3edf2519, 0x3ee071eb};
    __asm__("" : "+x"(x));
    vec shifted = x + 0x1.8p19f, f = x - (shifted - 0x1.8p19f);
    ivec power = (ivec)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)shifted) + ((ivec)shifted << 20);
    return (((f + 2.1646461486816406f) * f + 3.1225197315216064f) * f + 2.2524218559265137f) * (vec)power;
}
#else
#define DECAY_SCALE 1
#define DECAY_RANGE 126
INLINE vec decay(vec x) {
    vec shifted = x + 0x1.8p23f, f = x - (shifted - 0x1.8p23f);
    vec p = f * 1.547625870e-4f + 1.340027071e-3f;
    p = p * f + 9.618004047e-3f;
    p = p * f + 5.550327787e-2f;
    p = p * f + 2.402265134e-1f;
    p = p * f + 6.931472063e-1f;
    p = p * f + 1;
    return (vec)((ivec)p + ((ivec)shifted << 23));
}
#endif

/* The same for any x: 0 below the range, infinity above it, NaN for NaN. */
INLINE vec decay_carefully(vec x) {
    real lanes[LANES];
    store(lanes, x);
#pragma omp simd
    for (int i = 0; i < LANES; i++) lanes[i] = exp2_of(lanes[i] / DECAY_SCALE);
    return load(lanes);
}

/* 1 / x for x that is neither 0 nor infinite nor near to either: a guess and a step of Newton, which divide nothing. */
INLINE vec inverse(vec x) {
#if defined(__AVX512F__) && !defined(REAL_DOUBLE)
    const vec guess = (vec)_mm512_rcp14_ps((__m512)x);
    return guess + guess * (1 - x * guess);
#else
    return 1 / x;
#endif
}

/* e^-|x|, at least 2^-DECAY_RANGE; NaN for NaN. */
INLINE vec fall(vec x) {
    return decay(larger(broadcast(-DECAY_RANGE), magnitude(x) * -(real)(LOG2_E * DECAY_SCALE)));
}

/* 1 / (1 + e^-x), and 0 where e^x is. */
INLINE vec sigmoid(vec x) {
    const vec range = broadcast(DECAY_RANGE), scaled = x * -(real)(LOG2_E * DECAY_SCALE);
    const vec result = inverse(1 + decay(smaller(range, larger(-range, scaled))));
    return choose(scaled > range, (vec){0}, result);
}

/* The slope of softplus, 1 / (1 + e^-x), with e = fall(x). */
INLINE vec slope_of_fall(vec x, vec e) {
    const vec zero = {0};
    return choose(x < zero, e, zero + 1) * inverse(1 + e);
}

/* log(1 + e^x) = max(x, 0) + 2 artanh(t), t = e^-|x| / (2 + e^-|x|) ≤ 1/3, with e = fall(x). In float the series of
artanh(t) / t is a least maximal fit, to 4e-9. */
INLINE vec softplus_of_fall(vec x, vec e) {
    vec t = e * inverse(e + 2), q = t * t;
#ifdef REAL_DOUBLE
    vec p = broadcast(1.0 / 33);
#pragma GCC unroll 16
    for (int k = 31; k > 1; k -= 2) p = p * q + 1.0 / k;
#else
    vec p = q * 0.14005999267101288f + 0.14000901579856873f;
    p = p * q + 0.2001076340675354f;
    p = p * q + 0.3333320915699005f;
#endif
    p = p * q + 1;
    return larger(x, (vec){0}) + 2 * t * p;
}

/* 2^x for any x: 0 below the range, infinity above it; NaN stays NaN. */
INLINE vec exponential_of_2(vec x) {
    const vec range = broadcast(DECAY_RANGE), zero = {0}, scaled = x * (real)DECAY_SCALE;
    const vec inside = decay(smaller(range, larger(-range, scaled)));
    return choose(scaled > range, zero + (real)__builtin_inf(), choose(scaled < -range, zero, inside));
}
