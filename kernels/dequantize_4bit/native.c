/* 4-bit dequantization: a table of 16 products for each block, then one lookup an element. Bound by memory: half a byte
is read and two to four are written for a weight. */

#include "dequantize_4bit/weight.h"

/* Elements to a task, a multiple of every block size. */
enum { TASK = 1 << 16 };

typedef struct {
    Weight weight;
    void *to;
    int dtype;
} Dequantize;

#if defined(__AVX512BW__) && !defined(REAL_DOUBLE)
/* Half the width, twice the lanes: 16-bit products are looked up as such. */
static void expand_halves(uint16_t *restrict to, int dtype, const Weight *w, int64_t start, int64_t count, const float *restrict scales) {
    /* Lane j of 32 takes byte j / 2, the even ones its high half. The lookup reads the low 5 bits of a lane: two copies
    of the table make it ignore the fifth. */
    const __m512i spread = _mm512_add_epi8(
        _mm512_broadcast_i32x4(_mm_set_epi8(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0)),
        _mm512_set_epi64(0x0C0C0C0C0C0C0C0C, 0x0C0C0C0C0C0C0C0C, 0x0808080808080808, 0x0808080808080808, 0x0404040404040404, 0x0404040404040404, 0, 0));
    const __m512i shift = _mm512_set1_epi32(4);
    for (int64_t at = 0; at < count; at += w->block) {
        const int64_t stop = at + w->block < count ? at + w->block : count;
        uint16_t halves[16];
        for (int i = 0; i < 16; i++) {
            const float product = w->values[i] * scales[at / w->block];
            halves[i] = dtype == BFLOAT16 ? to_bfloat16(product) : to_float16(product);
        }
        const __m512i values = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)halves));
        int64_t i = at;
        for (; i + 32 <= stop; i += 32) {
            __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(w->packed + (start + i) / 2)));
            __m512i codes = _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, spread), shift);
            _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(codes, values));
        }
        for (; i < stop; i++) to[i] = halves[code_of(w->packed, start + i)];
    }
}
#else
static void expand_halves(uint16_t *restrict to, int dtype, const Weight *w, int64_t start, int64_t count, const float *restrict scales) {
    real buffer[MOST_BLOCK];
    for (int64_t at = 0; at < count; at += MOST_BLOCK) {
        int64_t part = at + MOST_BLOCK < count ? MOST_BLOCK : count - at;
        expand(buffer, w, start + at, part, scales + at / w->block);
        store_row(to, dtype, at, part, buffer);
    }
}
#endif

static void dequantize_task(void *context, int64_t index) {
    const Dequantize *d = context;
    const Weight *w = &d->weight;
    const int64_t start = index * TASK, end = start + TASK < w->count ? start + TASK : w->count;
    float decoded[TASK / 32];
    const float *scales = scales_of(w, start / w->block, (end - start + w->block - 1) / w->block, decoded);
    if (d->dtype == REAL)
        expand((real *)d->to + start, w, start, end - start, scales);
    else
        expand_halves((uint16_t *)d->to + start, d->dtype, w, start, end - start, scales);
}

/* to: `count` elements of `dtype`. The rest is the weight: see weight.h. */
void EXPORT(dequantize_4bit)(const uint8_t *packed, const void *absmax, const float *values, const float *map, const float *nested, const float *offset,
                             int64_t block, int64_t count, void *to, int64_t dtype, int64_t threads) {
    Dequantize d = {weight_of(packed, absmax, values, map, nested, offset, block, count), to, (int)dtype};
    parallel(dequantize_task, &d, (count + TASK - 1) / TASK, threads);
}
