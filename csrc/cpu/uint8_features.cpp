// Features that a store keeps as uint8 with a step for every channel, made float16 again.
#include "cpu/tile.h"

namespace m3em {
namespace M3EM_ISA {

namespace {

constexpr int64_t block = 1 << 16; // numbers, whose steps stay in the second-level cache
#if defined(__AVX2__)
constexpr int64_t ahead = 4096; // bytes: a processor looks ahead within a page of this size only
#endif

// steps[i] for each of `count` numbers from number `start` of a frame on; `to` has room for 16 more.
void spread(const float *steps, int64_t positions, int64_t start, int64_t count, float *to) {
    int64_t c = start / positions, q = start % positions;
    for (int64_t done = 0; done < count; ++c, q = 0) {
        const int64_t run = positions - q < count - done ? positions - q : count - done;
        const float step = steps[c];
        // Whole vectors, past the end of the row too: the next row writes over what is too much.
        for (int64_t i = 0; i < run; i += 16)
            for (int64_t k = 0; k < 16; ++k)
                to[done + i + k] = step;
        done += run;
    }
}

void widen_one(uint8_t from, float step, f16 &to) { narrow(float(from) * step, to); }

#if defined(__AVX512F__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own header takes a register whose content does not matter for one that was forgotten.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
constexpr int64_t wide = 32;

void widen_wide(const uint8_t *from, const float *steps, f16 *to, bool stream) {
    __m256i half[2];
    for (int i = 0; i < 2; ++i) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + 16 * i));
        const __m512 x = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
        half[i] = _mm512_cvtps_ph(_mm512_mul_ps(x, _mm512_loadu_ps(steps + 16 * i)), _MM_FROUND_TO_NEAREST_INT);
    }
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1);
    if (stream)
        _mm512_stream_si512(reinterpret_cast<__m512i *>(to), both);
    else
        _mm512_storeu_si512(to, both);
}
#elif defined(__AVX2__)
constexpr int64_t wide = 32;

void widen_wide(const uint8_t *from, const float *steps, f16 *to, bool stream) {
    for (int i = 0; i < 2; ++i, from += 16, steps += 16, to += 16) {
        __m128i half[2];
        for (int k = 0; k < 2; ++k) {
            const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(from + 8 * k));
            const __m256 x = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
            half[k] = _mm256_cvtps_ph(_mm256_mul_ps(x, _mm256_loadu_ps(steps + 8 * k)), _MM_FROUND_TO_NEAREST_INT);
        }
        const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(half[0]), half[1], 1);
        if (stream)
            _mm256_stream_si256(reinterpret_cast<__m256i *>(to), both);
        else
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), both);
    }
}
#endif

void widen_run(const uint8_t *from, const float *steps, f16 *to, int64_t count, bool stream) {
    int64_t i = 0;
#if defined(__AVX2__)
    // Up to where a cache line begins.
    const int64_t head = int64_t(-(reinterpret_cast<uintptr_t>(to) / sizeof(f16)) % wide);
    for (; i < head && i < count; ++i)
        widen_one(from[i], steps[i], to[i]);
    for (; i + wide <= count; i += wide) {
        // Writing past the caches leaves the processor no time to see by itself what will be read.
        _mm_prefetch(reinterpret_cast<const char *>(from + i + ahead), _MM_HINT_T0);
        widen_wide(from + i, steps + i, to + i, stream);
    }
#else
    (void)stream;
#endif
    for (; i < count; ++i)
        widen_one(from[i], steps[i], to[i]);
}

} // namespace

void uint8_features(const Uint8Features &o) {
    const int64_t total = o.channels * o.positions;
    Scratch room((block + 16) * int64_t(sizeof(float)));
    room.check();
    float *steps = room.take<float>(block + 16);
    for (int64_t start = 0; start < total; start += block) {
        const int64_t count = total - start < block ? total - start : block;
        spread(o.steps, o.positions, start, count, steps);
        for (int64_t clip = 0; clip < o.clips; ++clip)
            for (int64_t i = 0; i < o.picked; ++i)
                widen_run(o.from[clip] + o.frames[i] * total + start, steps,
                          static_cast<f16 *>(o.to[clip]) + i * total + start, count, o.stream);
    }
#if defined(__AVX2__)
    if (o.stream)
        _mm_sfence();
#endif
}

} // namespace M3EM_ISA
} // namespace m3em
