// The integer part of a score, where instruction sets differ: the sums of eight groups' products, exact.
// Weights are a little-endian bit stream. `place` is where a variant wants value i of a token, so that the weights it
// takes out of a stretch of bytes at once meet neighbouring values.
#pragma once

#include "simd.h"

// The loop's pieces must not become calls that pass vectors through memory.
#define ALWAYS_INLINE_LAMBDA __attribute__((always_inline))
#define ALWAYS_INLINE inline ALWAYS_INLINE_LAMBDA

namespace {

#if defined(FS_AVX2)

// A vector of weight words (32 bytes; of 3-bit values 24) holds `values`, 32 to a plane: plane k of 1, 2 and 4 bits is
// the k-th value of each byte. 16-bit lane l of the planes' products adds values from the l-th sixteenth of them.
template <int bits>
struct Words {
    static constexpr int planes = bits == 3 ? 2 : 8 / bits, values = 32 * planes, bytes = values * bits / 8;
};

template <int bits, int group>
inline int64_t place(int64_t i) {
    using W = Words<bits>;
    int64_t first = i / W::values * W::values, r = i % W::values;
    if (bits != 3) return first + r % W::planes * 32 + r / W::planes;
    return first + (r & 2) * 16 + r / 4 * 2 + (r & 1);  // planes: values 0, 1, 4, 5, ... and 2, 3, 6, 7, ...
}

// Planes k and k + half are taken from the words and from the words shifted by four, where both lie k * bits too high.
// No sum of a lane exceeds 8 * 127 * 4 of 1 bit, 12 * 127 * 4 of 2 bits, 15 * 127 * 4 of 4 bits: int16 holds all.
template <int bits>
ALWAYS_INLINE __m256i plane_products(const uint8_t* words, const int8_t* q) {
    constexpr int half = 4 / bits;
    __m256i low = _mm256_loadu_si256((const __m256i*)words), high = _mm256_srli_epi16(low, 4);
    __m256i total = _mm256_setzero_si256();
    for (int k = 0; k < half; k++) {
        __m256i mask = _mm256_set1_epi8(((1 << bits) - 1) << (k * bits));
        __m256i x0 = _mm256_loadu_si256((const __m256i*)(q + 32 * k));
        __m256i x1 = _mm256_loadu_si256((const __m256i*)(q + 32 * (k + half)));
        __m256i products = _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_and_si256(low, mask), x0),
                                            _mm256_maddubs_epi16(_mm256_and_si256(high, mask), x1));
        total = k ? _mm256_add_epi16(total, _mm256_srai_epi16(products, k * bits)) : products;
    }
    return total;
}

// Two 3-bit values at bits 0 and 3 of each 16-bit lane become its two bytes.
ALWAYS_INLINE __m256i pair_bytes(__m256i lanes) {
    __m256i first = _mm256_and_si256(lanes, _mm256_set1_epi16(7));
    __m256i second = _mm256_and_si256(_mm256_slli_epi16(lanes, 5), _mm256_set1_epi16(0x700));
    return _mm256_or_si256(first, second);
}

template <>
ALWAYS_INLINE __m256i plane_products<3>(const uint8_t* words, const int8_t* q) {
    // Three bytes, eight values, to each 32-bit lane, then twelve bits, four values, to each half of it.
    __m256i all_words = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)words)),
                                                _mm_loadu_si128((const __m128i*)(words + 8)), 1);
    __m256i spread = _mm256_setr_epi8(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11,  //
                                      4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12, 13, 14, 14, 15);
    __m256i pairs = _mm256_shuffle_epi8(all_words, spread);
    __m256i fours = _mm256_blend_epi16(pairs, _mm256_srli_epi16(pairs, 4), 0xaa);
    __m256i x0 = _mm256_loadu_si256((const __m256i*)q), x1 = _mm256_loadu_si256((const __m256i*)(q + 32));
    return _mm256_add_epi16(_mm256_maddubs_epi16(pair_bytes(fours), x0),
                            _mm256_maddubs_epi16(pair_bytes(_mm256_srli_epi16(fours, 6)), x1));
}

template <int bits>
ALWAYS_INLINE __m256i wide_products(const uint8_t* words, const int8_t* q) {
    return _mm256_madd_epi16(plane_products<bits>(words, q), _mm256_set1_epi16(1));
}

// Sums of neighbouring lanes, a's before b's in each half. Lanes are at most `bound`.
template <int bound>
ALWAYS_INLINE __m256i pair_sums(__m256i a, __m256i b) {
    if (bound > 32767) return _mm256_hadd_epi32(a, b);
    return _mm256_madd_epi16(_mm256_packs_epi32(a, b), _mm256_set1_epi16(1));
}

// In each half: lane i becomes the sum of that half's four lanes of vector first + i.
template <int bound, class Vector>
ALWAYS_INLINE __m256i sums_of_four(const Vector& at, int first) {
    return pair_sums<2 * bound>(pair_sums<bound>(at(first), at(first + 1)), pair_sums<bound>(at(first + 2), at(first + 3)));
}

template <int bound, class Vector>
ALWAYS_INLINE __m256i sums_of_eight(const Vector& at) {
    __m256i low = sums_of_four<bound>(at, 0), high = sums_of_four<bound>(at, 4);
    return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

template <int bits, int group>
ALWAYS_INLINE V eight_groups(const uint8_t* words, const int8_t* q) {
    using W = Words<bits>;
    constexpr int vectors = 8 * group / W::values, bound = ((1 << bits) - 1) * 127 * W::values / 8;
    auto at = [=](int i) ALWAYS_INLINE_LAMBDA { return wide_products<bits>(words + i * W::bytes, q + i * W::values); };
    __m256i sums;
    if constexpr (vectors == 1) sums = at(0);
    else if constexpr (vectors == 2) sums = _mm256_permute4x64_epi64(pair_sums<bound>(at(0), at(1)), 0xd8);
    else if constexpr (vectors == 4)
        sums = _mm256_permutevar8x32_epi32(sums_of_four<bound>(at, 0), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    else if constexpr (vectors == 8) sums = sums_of_eight<bound>(at);
    else {
        auto two = [=](int i) ALWAYS_INLINE_LAMBDA { return _mm256_add_epi32(at(2 * i), at(2 * i + 1)); };
        sums = sums_of_eight<2 * bound>(two);
    }
    return _mm256_cvtepi32_ps(sums);
}

// v with the lanes from `count` on cleared, whatever they hold.
inline V first_lanes(V v, int count) {
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane)));
}

#else

// The k-th values of a group's bytes lie together; 3-bit values stay in order.
template <int bits, int group>
inline int64_t place(int64_t i) {
    if (bits == 3) return i;
    constexpr int planes = 8 / bits, bytes = group / planes;
    int64_t r = i % group;
    return i - r + r % planes * bytes + r / planes;
}

// Vectors of n bytes, and their bytes widened.
template <int n>
struct Bytes {
    typedef uint8_t Unsigned __attribute__((vector_size(n)));
    typedef int8_t Signed __attribute__((vector_size(n)));
    typedef uint16_t Pairs __attribute__((vector_size(n)));
    typedef int16_t Wide __attribute__((vector_size(2 * n)));
};

// Eight 3-bit values of three bytes, one to a byte.
inline uint64_t spread_eight(const uint8_t* p) {
    uint64_t v = uint64_t(p[0] | p[1] << 8 | p[2] << 16);
    v = (v | v << 20) & 0x00000fff00000fff;
    v = (v | v << 10) & 0x003f003f003f003f;
    return (v | v << 5) & 0x0707070707070707;
}

// `bytes` bytes of `planes` values each, times the planes of q. int16 holds a lane's sum: at most 15240.
template <int bits, int planes, int bytes>
inline int32_t byte_products(const uint8_t* words, const int8_t* q) {
    constexpr int width = bytes < 16 ? bytes : 16;
    using B = Bytes<width>;
    typename B::Wide total = {};
    for (int i = 0; i < bytes; i += width) {
        typename B::Pairs pairs;
        memcpy(&pairs, words + i, width);
        for (int k = 0; k < planes; k++, pairs = pairs >> bits) {
            typename B::Pairs kept = pairs & uint16_t(((1 << bits) - 1) * 0x101);
            typename B::Unsigned weights;
            typename B::Signed x;
            memcpy(&weights, &kept, width);
            memcpy(&x, q + k * bytes + i, width);
            total += __builtin_convertvector(weights, typename B::Wide) * __builtin_convertvector(x, typename B::Wide);
        }
    }
    int16_t lanes[width];
    memcpy(lanes, &total, sizeof lanes);
    int32_t sum = 0;
    for (int i = 0; i < width; i++) sum += lanes[i];
    return sum;
}

template <int bits, int group>
inline int32_t group_products(const uint8_t* words, const int8_t* q) {
    if constexpr (bits != 3) return byte_products<bits, 8 / bits, group * bits / 8>(words, q);
    uint8_t values[group];
    for (int i = 0; i < group / 8; i++) {
        uint64_t eight = spread_eight(words + 3 * i);
        memcpy(values + 8 * i, &eight, 8);
    }
    return byte_products<bits, 1, group>(values, q);
}

template <int bits, int group>
inline V eight_groups(const uint8_t* words, const int8_t* q) {
    float sums[8];
    for (int g = 0; g < 8; g++) sums[g] = float(group_products<bits, group>(words + g * (group * bits / 8), q + g * group));
    return load(sums);
}

// v with the lanes from `count` on cleared, whatever they hold.
inline V first_lanes(V v, int count) {
    float lane[8];
    store(lane, v);
    for (int i = count; i < 8; i++) lane[i] = 0.0f;
    return load(lane);
}

#endif

template <int bytes>
ALWAYS_INLINE void prefetch_stretch(const uint8_t* p) {
    for (int i = 0; i < bytes; i += 64) prefetch(p + i);
}

}  // namespace
