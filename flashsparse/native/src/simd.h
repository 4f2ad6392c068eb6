// Eight float32 lanes: AVX2 with FMA and F16C (also where AVX-512 is used beside it), or the compiler's vectors (SSE2,
// NEON, anything else).
// Both variants of a kernel share its source, so a kernel's order of operations is written once. `madd` is a product and
// a sum: one rounding with AVX2 and NEON, two elsewhere, and always the same within a variant.
#pragma once

#include "numbers.h"

#if defined(FS_AVX2)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

// Into the L2 cache: the L1 cache waits for few lines at a time, which bounds a kernel at half of the memory's rate.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

#if defined(FS_AVX2)

using V = __m256;

inline V zero() { return _mm256_setzero_ps(); }
inline V all(float value) { return _mm256_set1_ps(value); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V madd(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline float madd(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

inline V maximum(V floor, V v) { return _mm256_max_ps(floor, v); }  // NaN in v stays NaN

// v times 2^n, n held in the low bits of `biased` (a float of 1.5 * 2^23 + n).
inline V scale_by_power(V v, V biased) {
    __m256i n = _mm256_slli_epi32(_mm256_castps_si256(biased), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), n));
}

inline void store_f16(uint16_t* p, V v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }

inline float decode_f16(uint16_t h) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }
inline V load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

inline V load_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}

inline V load_u8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}

inline V load_u4(const uint8_t* p) {  // eight values in four bytes, the low half first
    int word;
    memcpy(&word, p, 4);
    __m256i values = _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    return _mm256_cvtepi32_ps(_mm256_and_si256(values, _mm256_set1_epi32(15)));
}

// Eight words; plane(k): bits 4k.. of each times 16^(k % 4), which spares most planes a shift.
struct NibbleWords {
    __m256i low, high;
    explicit NibbleWords(const uint8_t* p) : low(_mm256_loadu_si256((const __m256i*)p)), high(_mm256_srli_epi32(low, 16)) {}
    V plane(int k) const {
        return _mm256_cvtepi32_ps(_mm256_and_si256(k < 4 ? low : high, _mm256_set1_epi32(15 << (4 * (k % 4)))));
    }
};

#else

typedef float V __attribute__((vector_size(32)));
typedef uint32_t U __attribute__((vector_size(32)));
typedef int32_t I __attribute__((vector_size(32)));

inline U as_bits(V v) {
    U bits;
    memcpy(&bits, &v, 32);
    return bits;
}

inline V as_floats(U bits) {
    V v;
    memcpy(&v, &bits, 32);
    return v;
}

inline U all_bits(uint32_t b) { return U{b, b, b, b, b, b, b, b}; }
inline V all(float value) { return V{value, value, value, value, value, value, value, value}; }
inline V zero() { return all(0.0f); }

inline V load(const float* p) {
    V v;
    memcpy(&v, p, 32);
    return v;
}

inline void store(float* p, V v) { memcpy(p, &v, 32); }
inline V add(V a, V b) { return a + b; }
inline V mul(V a, V b) { return a * b; }

#if defined(__aarch64__)
inline V madd(V a, V b, V c) {
    float32x4_t x[2], y[2], z[2];
    memcpy(x, &a, 32), memcpy(y, &b, 32), memcpy(z, &c, 32);
    for (int i = 0; i < 2; i++) z[i] = vfmaq_f32(z[i], x[i], y[i]);
    memcpy(&c, z, 32);
    return c;
}
inline float madd(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
inline V madd(V a, V b, V c) { return a * b + c; }
inline float madd(float a, float b, float c) { return a * b + c; }
#endif

inline V maximum(V floor, V v) { return v < floor ? floor : v; }  // NaN in v stays NaN

// v times 2^n, n held in the low bits of `biased` (a float of 1.5 * 2^23 + n).
inline V scale_by_power(V v, V biased) {
    return as_floats(as_bits(v) + (as_bits(biased) << 23));
}

inline void store_f16(uint16_t* p, V v) {
    for (int i = 0; i < 8; i++) p[i] = f32_to_f16(v[i]);
}

inline float decode_f16(uint16_t h) { return f16_to_f32(h); }
inline V load_f16(const uint16_t* p) {
#if defined(__aarch64__)
    float values[8];
    for (int i = 0; i < 8; i += 4) vst1q_f32(values + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + i))));
    return load(values);
#else
    // f16_to_f32 on eight lanes, with masks made by shifts: compilers take comparisons of wide vectors apart.
    U half = {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
    U magnitude = (half & 0x7fff) << 13, special = (magnitude + (1u << 23)) & 0x10000000;
    U bits = magnitude + (112u << 23) + (special << 1 | special | special >> 1);  // Inf, NaN: 112 << 23 once more
    U small = as_bits(as_floats(bits + (1u << 23)) - as_floats(all_bits(113u << 23)));
    U normal = U(-I(magnitude >> 23) >> 31);
    return as_floats((bits & normal) | (small & ~normal) | (half & 0x8000) << 16);
#endif
}

inline V load_bf16(const uint16_t* p) {
    U bits = {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
    return as_floats(bits << 16);
}

inline V load_u8(const uint8_t* p) {
    I values = {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
    return __builtin_convertvector(values, V);
}

inline V load_u4(const uint8_t* p) {
    uint32_t word;
    memcpy(&word, p, 4);
    return __builtin_convertvector(I(all_bits(word) >> U{0, 4, 8, 12, 16, 20, 24, 28} & 15), V);
}

// Eight words; plane(k): bits 4k.. of each times 16^(k % 4), which spares most planes a shift.
struct NibbleWords {
    U low, high;
    explicit NibbleWords(const uint8_t* p) {
        memcpy(&low, p, 32);
        high = low >> 16;
    }
    V plane(int k) const { return __builtin_convertvector(I((k < 4 ? low : high) & (15u << (4 * (k % 4)))), V); }
};

#endif

// e^x for x <= 0, 2 ulp; below -86 it is e^-86. NaN stays NaN.
inline V exp_nonpositive(V x) {
    x = maximum(all(-86.0f), x);
    V biased = madd(x, all(1.44269504f), all(12582912.0f));  // adding 1.5 * 2^23 rounds to an integer
    V n = add(biased, all(-12582912.0f));
    V r = madd(n, all(-0.693359375f), x);
    r = madd(n, all(2.12194440e-4f), r);
    V p = all(1.9875691500e-4f);
    p = madd(p, r, all(1.3981999507e-3f));
    p = madd(p, r, all(8.3334519073e-3f));
    p = madd(p, r, all(4.1665795894e-2f));
    p = madd(p, r, all(1.6666665459e-1f));
    p = madd(p, r, all(5.0000001201e-1f));
    return scale_by_power(add(madd(mul(r, r), p, r), all(1.0f)), biased);
}

// The eight lanes' sum in one fixed order.
inline float sum(V v) {
    float lane[8];
    store(lane, v);
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

// out[i] = sum(v[i]) for four vectors, in the same order.
#if defined(FS_AVX2)
inline __m128 half_sums(V v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }

inline void sum_four(const V* v, float* out) {
    __m128 a = half_sums(v[0]), b = half_sums(v[1]), c = half_sums(v[2]), d = half_sums(v[3]);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(a, c), _mm_add_ps(b, d)));
}
#else
inline void sum_four(const V* v, float* out) {
    for (int i = 0; i < 4; i++) out[i] = sum(v[i]);
}
#endif

}  // namespace
