// Float vectors of the width the target has, from the compiler's vector extension, and 2^y on them.
//
// Each kernel is compiled once per instruction set with -DISA=name. Everything here sits in an unnamed namespace:
// otherwise the linker would keep one copy of an inline function, perhaps one the machine at hand cannot run.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define EXPORT(name) extern "C" __attribute__((visibility("default"))) void JOIN(name, ISA)

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

struct bf16 {
    uint16_t bits;
};

// Large, finite and exact in both formats: padding whose exponential is 0 and whose product with 0 is 0.
constexpr float LOWEST = -3.3895313892515355e38f;

inline vf all(float x) { return vf{} + x; }

inline vf load(const float* p) {
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}

inline vf load(const bf16* p) {
    vh bits;
    memcpy(&bits, p, sizeof bits);
#if defined(__AVX512BW__)
    // each number to the upper half of its lane, zeros below: one permutation instead of a widening and a shift
    const __m512i to = _mm512_set_epi16(
        15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0
    );
    return (vf)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, to, _mm512_castsi256_si512((__m256i)bits));
#elif defined(__AVX2__)
    return (vf)((vi)_mm256_cvtepu16_epi32((__m128i)bits) << 16);
#else
    return (vf)(__builtin_convertvector(bits, vu) << 16);
#endif
}

inline void store(float* p, vf x) { memcpy(p, &x, sizeof x); }

inline vh narrow(vf x) {
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    const vu bits = (vu)x;
    const vu even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const vu out = x == x ? even : vu{} + 0x7fc0u;
#if defined(__AVX512F__)
    return (vh)_mm512_cvtepi32_epi16((__m512i)out);
#else
    return __builtin_convertvector(out, vh);
#endif
#endif
}

inline void store(bf16* p, vf x) {
    const vh bits = narrow(x);
    memcpy(p, &bits, sizeof bits);
}

inline void set(float* p, float x) { *p = x; }
inline void set(bf16* p, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    p->bits = bits >> 16;
}

// The first n < W elements, then LOWEST.
template <class T>
inline vf load_part(const T* p, int64_t n) {
    T row[W];
    for (int i = 0; i < W; i++) set(row + i, LOWEST);
    memcpy(row, p, n * sizeof(T));
    return load(row);
}

// f(vector, offset) over n elements, two vectors a turn; the last vector is padded.
template <class T, class F>
inline void each(const T* p, int64_t n, F f) {
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        const vf x = load(p + i), y = load(p + i + W);
        f(x, i);
        f(y, i + W);
    }
    for (; i < n; i += W) f(n - i < W ? load_part(p + i, n - i) : load(p + i), i);
}

template <class T>
inline void store_part(T* p, vf x, int64_t n) {
    T row[W];
    store(row, x);
    memcpy(p, row, n * sizeof(T));
}

// Past the caches: saves reading the line that is about to be overwritten. p is aligned to a vector.
inline void stream(float* p, vf x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)x);
#elif defined(__x86_64__)
    _mm_stream_ps(p, (__m128)x);
#else
    store(p, x);
#endif
}

inline void stream(bf16* p, vf x) {
#if defined(__AVX512F__)
    _mm256_stream_si256((__m256i*)p, (__m256i)narrow(x));
#elif defined(__AVX2__)
    _mm_stream_si128((__m128i*)p, (__m128i)narrow(x));
#else
    store(p, x);
#endif
}

// Makes streamed stores visible to other threads.
inline void stream_end() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// a > b ? a : b, so b where either is NaN.
inline vf larger(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

inline float sum(vf x) {
    float part[W];
    store(part, x);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}

inline float largest(vf x) {
    float part[W];
    store(part, x);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] = part[i] > part[i + half] ? part[i] : part[i + half];
    return part[0];
}

// 2^y for y < 127, to 1.4 ulp; 0 below 2^-126, NaN stays NaN.
inline vf pow2(vf y) {
    y = larger(all(-127.f), y);
    const vf magic = all(12582912.f + 127.f);  // adding 1.5 * 2^23 leaves the nearest integer in the low bits
    const vf shifted = y + magic;
    const vf f = y - (shifted - magic);
    // minimax for the relative error on [-1/2, 1/2], 9e-8
    vf p = all(0x1.5bba08p-10f);
    p = p * f + 0x1.3cea8ap-7f;
    p = p * f + 0x1.c6b754p-5f;
    p = p * f + 0x1.ebf9bcp-3f;
    p = p * f + 0x1.62e42ap-1f;
    p = p * f + 1.f;
    return p * (vf)((vi)shifted << 23);  // the exponent is the integer + 127
}

}  // namespace
