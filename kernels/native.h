/* What the C kernels share.

Every kernels/<op>/native.c is compiled once for each instruction set (VARIANT: baseline, avx2, avx512) and for each type
of arithmetic (float, and double with REAL_DOUBLE), with flags and nothing else: no source names an instruction set
unless it uses its intrinsics behind a macro of the compiler. An exported function is `EXPORT(name)(…)`; all others are
static. Tensors are passed as addresses with a code for their dtype, sizes as int64_t.

No -ffast-math anywhere, linked least of all: it would flush denormals in the whole process.
*/
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#ifdef REAL_DOUBLE
typedef double real;
typedef int64_t integer;
#define REAL_NAME f64
#define REAL_BYTES 8
#else
typedef float real;
typedef int32_t integer;
#define REAL_NAME f32
#define REAL_BYTES 4
#endif

#define JOIN_(name, type, variant) name##_##type##_##variant
#define JOIN(name, type, variant) JOIN_(name, type, variant)
#define EXPORT(name) __attribute__((visibility("default"))) JOIN(name, REAL_NAME, VARIANT)
#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define LANES (VECTOR_BYTES / REAL_BYTES)

/* A vector register, and one at any address. */
typedef real vec __attribute__((vector_size(VECTOR_BYTES)));
typedef integer ivec __attribute__((vector_size(VECTOR_BYTES)));
typedef real vec_at __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));

#if defined(__SSE2__)
#include <immintrin.h>
#endif

INLINE vec load(const real *from) { return *(const vec_at *)from; }
INLINE void store(real *to, vec x) { *(vec_at *)to = x; }
INLINE vec broadcast(real x) { return x - (vec){}; }

/* mask ? a : b with a mask as a comparison of registers gives it; a > b ? a : b; a < b ? a : b (of a NaN they give b). */
INLINE vec choose(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }
#if defined(__AVX512F__) && defined(REAL_DOUBLE)
INLINE vec larger(vec a, vec b) { return (vec)_mm512_max_pd((__m512d)a, (__m512d)b); }
INLINE vec smaller(vec a, vec b) { return (vec)_mm512_min_pd((__m512d)a, (__m512d)b); }
#elif defined(__AVX512F__)
INLINE vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vec smaller(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__) && !defined(REAL_DOUBLE)
INLINE vec larger(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vec smaller(vec a, vec b) { return (vec)_mm256_min_ps((__m256)a, (__m256)b); }
#else
INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); }
INLINE vec smaller(vec a, vec b) { return choose(a < b, a, b); }
#endif
INLINE vec magnitude(vec x) { return larger(x, -x); }

/* The sum of the lanes. */
INLINE real sum_of(vec x) {
#if defined(__AVX512F__) && !defined(REAL_DOUBLE)
    return _mm512_reduce_add_ps((__m512)x);
#else
    real sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
#endif
}

/* ---- dtypes ---------------------------------------------------------------------------------------------------- */

/* The codes that kernels/c_library.py passes. REAL is the type of arithmetic, the others are widened on load. */
enum { REAL = 0, BFLOAT16 = 1, FLOAT16 = 2, FLOAT32 = 3 };

INLINE float float_of_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE uint32_t bits_of_float(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

INLINE float from_bfloat16(uint16_t x) { return float_of_bits((uint32_t)x << 16); }

/* To nearest, ties to even; NaN stays NaN. */
INLINE uint16_t to_bfloat16(float x) {
    uint32_t bits = bits_of_float(x), rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(x == x ? rounded : 0x7FC0);
}

INLINE float from_float16(uint16_t x) {
    uint32_t sign = (uint32_t)(x & 0x8000) << 16, magnitude = (uint32_t)(x & 0x7FFF) << 13;
    /* The product with 2^112 rebiases the exponent, and normalises denormals on the way. */
    float finite = float_of_bits(magnitude) * 0x1p112f;
    uint32_t bits = (x & 0x7C00) == 0x7C00 ? magnitude | 0x7F800000 : bits_of_float(finite);
    return float_of_bits(sign | bits);
}

INLINE uint16_t to_float16(float x) {
    uint32_t bits = bits_of_float(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7FFFFFFF;
    /* Normal results round in the integer; denormal ones round in the addition of 0.5, whose last bit is 2^-24. */
    uint32_t normal = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    uint32_t denormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3F000000;
    uint32_t half = magnitude < 0x38800000 ? denormal : normal;
    half = magnitude >= 0x477FF000 ? 0x7C00 : half;
    half = magnitude > 0x7F800000 ? 0x7E00 : half;
    return (uint16_t)(sign | half);
}

/* x[offset … offset + count) as `real`. */
INLINE void load_row(real *restrict to, const void *restrict x, int dtype, int64_t offset, int64_t count) {
    if (dtype == REAL) {
        memcpy(to, (const real *)x + offset, (size_t)count * sizeof(real));
    } else if (dtype == BFLOAT16) {
        const uint16_t *from = (const uint16_t *)x + offset;
#pragma omp simd
        for (int64_t i = 0; i < count; i++) to[i] = (real)from_bfloat16(from[i]);
    } else if (dtype == FLOAT16) {
        const uint16_t *from = (const uint16_t *)x + offset;
#pragma omp simd
        for (int64_t i = 0; i < count; i++) to[i] = (real)from_float16(from[i]);
    } else {
        const float *from = (const float *)x + offset;
#pragma omp simd
        for (int64_t i = 0; i < count; i++) to[i] = (real)from[i];
    }
}

/* Where the elements of a row can be read as `real`: in place, or in `buffer`, into which they are widened. */
INLINE const real *row_of(real *restrict buffer, const void *restrict x, int dtype, int64_t offset, int64_t count) {
    if (dtype == REAL) return (const real *)x + offset;
    load_row(buffer, x, dtype, offset, count);
    return buffer;
}

INLINE void store_row(void *restrict x, int dtype, int64_t offset, int64_t count, const real *restrict from) {
    if (dtype == REAL) {
        memcpy((real *)x + offset, from, (size_t)count * sizeof(real));
    } else if (dtype == BFLOAT16) {
        uint16_t *to = (uint16_t *)x + offset;
#pragma omp simd
        for (int64_t i = 0; i < count; i++) to[i] = to_bfloat16((float)from[i]);
    } else if (dtype == FLOAT16) {
        uint16_t *to = (uint16_t *)x + offset;
#pragma omp simd
        for (int64_t i = 0; i < count; i++) to[i] = to_float16((float)from[i]);
    } else {
        float *to = (float *)x + offset;
#pragma omp simd
        for (int64_t i = 0; i < count; i++) to[i] = (float)from[i];
    }
}

/* ---- exponentials ------------------------------------------------------------------------------------------------ */

#define LOG2_E ((real)1.4426950408889634074)

/* 2^x for use in simd loops, for x in the range of normal numbers; of NaN it makes anything. Relative error below 2e-8
before rounding in float, 2e-16 in double. */
INLINE real exp2_inside(real x) {
#ifdef REAL_DOUBLE
    const real magic = 0x1.8p52;
#else
    const real magic = 0x1.8p23f;
#endif
    /* Adding 1.5 · 2^mantissa rounds to an integer, which then stands in the low bits. */
    real shifted = x + magic, f = x - (shifted - magic), p;
#ifdef REAL_DOUBLE
    p = 1.3691488853904128881e-12;
    p = p * f + 2.5678435993488205141e-11;
    p = p * f + 4.4455382718708114976e-10;
    p = p * f + 7.0549116208011233299e-9;
    p = p * f + 1.0178086009239699728e-7;
    p = p * f + 1.3215486790144309488e-6;
    p = p * f + 1.5252733804059840280e-5;
    p = p * f + 1.5403530393381609954e-4;
    p = p * f + 1.3333558146428443423e-3;
    p = p * f + 9.6181291076284771619e-3;
    p = p * f + 5.5504108664821579953e-2;
    p = p * f + 2.4022650695910071233e-1;
    p = p * f + 6.9314718055994530942e-1;
    p = p * f + 1;
    integer exponent, bits;
    memcpy(&exponent, &shifted, 8);
    memcpy(&bits, &p, 8);
    bits += (integer)((uint64_t)exponent << 52);
    memcpy(&p, &bits, 8);
#else
    p = 1.535336188319500e-4f;
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1;
    integer exponent, bits;
    memcpy(&exponent, &shifted, 4);
    memcpy(&bits, &p, 4);
    bits += (integer)((uint32_t)exponent << 23);
    memcpy(&p, &bits, 4);
#endif
    return p;
}

/* 2^x for use in simd loops. Below the range of normal numbers the result is 0, above it infinity; NaN stays NaN. */
INLINE real exp2_of(real x) {
#ifdef REAL_DOUBLE
    const real lowest = -1022, highest = 1023.9999999999998;
#else
    const real lowest = -126, highest = 127.99999f;
#endif
    real clamped = x < lowest ? lowest : x;
    clamped = clamped > highest ? highest : clamped;
    real p = exp2_inside(clamped);
    p = x < lowest ? 0 : p;
    p = x > highest ? (real)__builtin_inf() : p;
    return x == x ? p : x;
}

INLINE real exp_of(real x) { return exp2_of(x * LOG2_E); }
/* 1 / (1 + exp(−x)) for a product with x, which brings NaN back: of NaN it makes anything. A fifth cheaper. */
INLINE real logistic_of(real x) {
#ifdef REAL_DOUBLE
    const real reach = 708;
#else
    const real reach = 87;
#endif
    real bounded = x > reach ? reach : x;
    bounded = bounded < -reach ? -reach : bounded;
    const real p = 1 / (1 + exp2_inside(bounded * -LOG2_E));
    return x < -reach ? 0 : p;
}
INLINE real sigmoid_of(real x) { return 1 / (1 + exp_of(-x)); }

/* ---- memory ------------------------------------------------------------------------------------------------------ */

/* Ask for huge pages under a large result: writing 50 MB of fresh memory in pages of 4 KB costs more than computing it.
A hint, and nothing where the system has none. */
static __attribute__((unused)) void expect_writes(void *data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 1 << 21, first = ((uintptr_t)data + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t)data + (uintptr_t)bytes) / page * page;
    if (data && bytes >= 1 << 22 && end > first) madvise((void *)first, end - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

/* Float results of so many bytes are written past the caches, which they would fill: a line that is overwritten as a
whole need not be read before. Others see them after `end_stream`. */
enum { STREAM_FROM = 1 << 22 };

/* A register past the caches; the address is a multiple of its size. */
INLINE void stream(real *to, vec x) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i *)to, (__m512i)x);
#elif defined(__AVX2__)
    _mm256_stream_si256((__m256i *)to, (__m256i)x);
#elif defined(__SSE2__)
    _mm_stream_si128((__m128i *)to, (__m128i)x);
#else
    store(to, x);
#endif
}

/* `count` elements past the caches; the address is a multiple of 64. */
INLINE void stream_row(real *to, const real *from, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) stream(to + i, load(from + i));
    memcpy(to + i, from + i, (size_t)(count - i) * sizeof(real));
}

INLINE void end_stream(void) {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

/* ---- threads ----------------------------------------------------------------------------------------------------- */

typedef struct {
    void (*run)(void *context, int64_t index);
    void *context;
    int64_t count;
    atomic_llong next;
} Work;

static void *work_on(void *argument) {
    Work *work = argument;
    int64_t index;
    while ((index = atomic_fetch_add(&work->next, 1)) < work->count) work->run(work->context, index);
    return 0;
}

enum { MAX_THREADS = 256 };

/* run(context, 0 … count − 1) in any order on up to `threads` threads. What an index writes must not depend on the
others, and then the result does not depend on the number of threads. Threads are made for the call (some 20 µs each)
and joined: nothing survives that a fork could break. */
static __attribute__((unused)) void parallel(void (*run)(void *, int64_t), void *context, int64_t count, int64_t threads) {
    Work work = {run, context, count, 0};
    pthread_t helpers[MAX_THREADS];
    int started = 0;
    if (threads > count) threads = count;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    while (started < threads - 1 && !pthread_create(&helpers[started], 0, work_on, &work)) started++;
    work_on(&work);
    for (int i = 0; i < started; i++) pthread_join(helpers[i], 0);
}
