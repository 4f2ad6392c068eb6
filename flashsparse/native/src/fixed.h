// Dot products with 8- and 4-bit vectors in integers. A group of a token's values becomes fixed point: whole multiples
// of a power of two, cut into signed digits; a group's products with the stored numbers are exact sums of integers, and
// only the groups' shares are added as floats:
//     w . x = sum over groups of scale * step * (numbers . digits) + bias * sum(x).
// The values are multiples of 2^-22 of a power of two near the group's largest, about what a float sum with the largest
// keeps of the others. A product's order depends on its length only: it is the same whether one row
// or token is worked on or many. NaN or Inf in a token makes all its products NaN.
#pragma once

#include "rows.h"
#include "score_sums.h"

namespace {

using fs::Fixed;

constexpr int kGroups = 8;  // groups whose scales are decoded together

// 4 bits: three digits of 8 bits, group bytes each. 8 bits: digits of 11 and 12 bits, group 16-bit words each. A plane
// is what one shift takes out of a vector of words (at most 32 bytes): 4 bits two, of bytes; 8 bits two, of words.
template <int bits, int group>
struct Digits {
    static constexpr int words = group * bits / 8, vector = words < 32 ? words : 32;  // bytes
    static constexpr int size = group * (bits == 4 ? 3 : 4);                          // bytes of one group's digits
};

// Digit `digit` of values that one shift of the words meets, place by place; the loops are for the compiler's vectors.
template <int bits, int group>
inline void put_digits(const int32_t* values, int8_t* digits) {
    using D = Digits<bits, group>;
    constexpr int lanes = bits == 4 ? D::vector : D::vector / 2;
    auto* wide = (int16_t*)digits;
    for (int first = 0; first < group; first += 2 * lanes)
        for (int k = 0; k < 2; k++)
            for (int l = 0; l < lanes; l++) {
                int32_t value = values[first + 2 * l + k];
                int at = first + k * lanes + l;
                if (bits == 4) {
                    uint32_t shifted = uint32_t(value) + 0x808080;  // its bytes are the signed digits plus 128
                    digits[at] = int8_t(shifted >> 16 ^ 0x80);
                    digits[group + at] = int8_t(shifted >> 8 ^ 0x80);
                    digits[2 * group + at] = int8_t(shifted ^ 0x80);
                } else {
                    int32_t high = (value + 2048) >> 12;
                    wide[at] = int16_t(high), wide[group + at] = int16_t(value - high * 4096);
                }
            }
}

// One group: its digits, its step, and the sum of the values as they are represented.
template <int bits, int group>
void fix_group(const float* x, int8_t* digits, float* step, float* sum) {
    uint32_t top = 0;
    for (int i = 0; i < group; i++) {
        uint32_t magnitude = to_bits(x[i]) & 0x7fffffff;
        top = magnitude > top ? magnitude : top;
    }
    if (top >= 0x7f800000) {
        *step = *sum = from_bits(0x7fc00000);
        return;
    }
    int wanted = 21 - (int(top >> 23) - 127), power = wanted < 126 ? wanted : 126;
    *step = from_bits(uint32_t(127 - power) << 23);
    float up = from_bits(uint32_t(127 + power) << 23);
    int32_t values[group], total = 0;
    for (int i = 0; i < group; i++) {
        values[i] = int32_t((x[i] * up + 12582912.0f) - 12582912.0f);  // adding 1.5 * 2^23 rounds half to even
        total += values[i];
    }
    put_digits<bits, group>(values, digits);
    *sum = float(total) * *step;
}

template <int bits, int group>
void fix_token(const float* x, int64_t columns, int8_t* digits, float* steps, float* sums) {
    for (int64_t g = 0; g < columns / group; g++)
        fix_group<bits, group>(x + g * group, digits + g * Digits<bits, group>::size, steps + g, sums + g);
}

// A vector's words of one group, taken apart once for all tokens; times(d): the products with a token's digits, in eight
// partial sums. Integers stay within: 4 bits: 16-bit lanes 4 * 15 * 128, then 32-bit lanes 2^31 for groups of 128;
// 8 bits: 32-bit lanes 2^23.
template <int bits, int group>
struct Numbers;

#if defined(FS_AVX512)

// 32 bytes of words as one vector: as they are in its lower half, shifted right by `shift` in its upper half.
ALWAYS_INLINE __m512i both_planes(const uint8_t* words, int shift) {
    __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)words));
    return _mm512_srlv_epi64(twice, _mm512_setr_epi64(0, 0, 0, 0, shift, shift, shift, shift));
}

ALWAYS_INLINE __m512i load_digits(const int8_t* x) { return _mm512_loadu_si512(x); }

// The lanes of AVX2's sums: each half of a vector has products of one plane.
ALWAYS_INLINE __m256i join_planes(__m512i v) {
    return _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
}

template <int group>
struct Numbers<4, group> {
    __m512i a, b;  // groups of 128 fill both

    ALWAYS_INLINE explicit Numbers(const uint8_t* words) {
        const __m512i mask = _mm512_set1_epi8(15);
        a = _mm512_and_si512(both_planes(words, 4), mask);
        if constexpr (group == 128) b = _mm512_and_si512(both_planes(words + 32, 4), mask);
    }

    ALWAYS_INLINE __m512i add_digit(__m512i total, const int8_t* x) const {
        total = _mm512_dpbusd_epi32(total, a, load_digits(x));
        if constexpr (group == 128) total = _mm512_dpbusd_epi32(total, b, load_digits(x + 64));
        return total;
    }

    ALWAYS_INLINE V times(const int8_t* x) const {
        __m512i total = add_digit(_mm512_setzero_si512(), x);
        total = add_digit(_mm512_slli_epi32(total, 8), x + group);
        return _mm256_cvtepi32_ps(join_planes(add_digit(_mm512_slli_epi32(total, 8), x + 2 * group)));
    }
};

template <>
struct Numbers<4, 32> {
    __m256i a;

    ALWAYS_INLINE explicit Numbers(const uint8_t* words) {
        __m128i w = _mm_loadu_si128((const __m128i*)words);
        a = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(w, 4), w), _mm256_set1_epi8(15));
    }

    ALWAYS_INLINE __m256i add_digit(__m256i total, const int8_t* x) const {
        return _mm256_dpbusd_epi32(total, a, _mm256_loadu_si256((const __m256i*)x));
    }

    ALWAYS_INLINE V times(const int8_t* x) const {
        __m256i total = add_digit(_mm256_setzero_si256(), x);
        total = add_digit(_mm256_slli_epi32(total, 8), x + 32);
        return _mm256_cvtepi32_ps(add_digit(_mm256_slli_epi32(total, 8), x + 64));
    }
};

template <int group>
struct Numbers<8, group> {
    static constexpr int vectors = group / 32;
    __m512i planes[vectors];

    ALWAYS_INLINE explicit Numbers(const uint8_t* words) {
        for (int i = 0; i < vectors; i++)
            planes[i] = _mm512_and_si512(both_planes(words + 32 * i, 8), _mm512_set1_epi16(255));
    }

    ALWAYS_INLINE V digit(const int8_t* x) const {
        __m512i total = _mm512_setzero_si512();
        for (int i = 0; i < vectors; i++) total = _mm512_dpwssd_epi32(total, planes[i], load_digits(x + 64 * i));
        return _mm256_cvtepi32_ps(join_planes(total));
    }

    ALWAYS_INLINE V times(const int8_t* x) const { return madd(digit(x), all(4096.0f), digit(x + 2 * group)); }
};

#elif defined(FS_AVX2)

ALWAYS_INLINE __m256i load_words(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }

// Planes are members, not an array: compilers keep an array that a loop walks in memory.
template <int group>
struct Numbers<4, group> {
    __m256i a, b, c, d;  // groups of 32 fill a, of 64 a and b

    ALWAYS_INLINE explicit Numbers(const uint8_t* words) {
        const __m256i mask = _mm256_set1_epi8(15);
        if constexpr (group == 32) {
            __m128i w = _mm_loadu_si128((const __m128i*)words);
            a = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(w, 4), w), mask);
        } else {
            __m256i w = load_words(words);
            a = _mm256_and_si256(w, mask), b = _mm256_and_si256(_mm256_srli_epi16(w, 4), mask);
        }
        if constexpr (group == 128) {
            __m256i w = load_words(words + 32);
            c = _mm256_and_si256(w, mask), d = _mm256_and_si256(_mm256_srli_epi16(w, 4), mask);
        }
    }

    ALWAYS_INLINE __m256i digit(const int8_t* x) const {
        __m256i total = _mm256_maddubs_epi16(a, load_words(x));
        if constexpr (group > 32) total = _mm256_add_epi16(total, _mm256_maddubs_epi16(b, load_words(x + 32)));
        if constexpr (group > 64)
            total = _mm256_add_epi16(total, _mm256_add_epi16(_mm256_maddubs_epi16(c, load_words(x + 64)),
                                                             _mm256_maddubs_epi16(d, load_words(x + 96))));
        return total;
    }

    ALWAYS_INLINE V times(const int8_t* x) const {
        const __m256i ones = _mm256_set1_epi16(1), bytes = _mm256_set1_epi16(256);
        __m256i high = _mm256_slli_epi32(_mm256_madd_epi16(digit(x), ones), 16);
        __m256i middle = _mm256_madd_epi16(digit(x + group), bytes), low = _mm256_madd_epi16(digit(x + 2 * group), ones);
        return _mm256_cvtepi32_ps(_mm256_add_epi32(high, _mm256_add_epi32(middle, low)));
    }
};

// Two words' vectors: 64 numbers.
struct Bytes64 {
    __m256i a, b, c, d;

    ALWAYS_INLINE explicit Bytes64(const uint8_t* words, bool second) {
        const __m256i mask = _mm256_set1_epi16(255);
        __m256i w = load_words(words);
        a = _mm256_and_si256(w, mask), b = _mm256_srli_epi16(w, 8);
        if (second) w = load_words(words + 32), c = _mm256_and_si256(w, mask), d = _mm256_srli_epi16(w, 8);
    }

    ALWAYS_INLINE __m256i digit(const int8_t* x, bool second) const {
        __m256i total = _mm256_add_epi32(_mm256_madd_epi16(a, load_words(x)), _mm256_madd_epi16(b, load_words(x + 32)));
        if (!second) return total;
        return _mm256_add_epi32(total, _mm256_add_epi32(_mm256_madd_epi16(c, load_words(x + 64)),
                                                        _mm256_madd_epi16(d, load_words(x + 96))));
    }
};

template <int group>
struct Numbers<8, group> {
    Bytes64 first, rest;  // groups of 32 fill half of the first, groups of 128 both

    ALWAYS_INLINE explicit Numbers(const uint8_t* words)
        : first(words, group > 32), rest(group == 128 ? words + 64 : words, group == 128) {}

    ALWAYS_INLINE V digit(const int8_t* x) const {
        __m256i total = first.digit(x, group > 32);
        if constexpr (group == 128) total = _mm256_add_epi32(total, rest.digit(x + 128, true));
        return _mm256_cvtepi32_ps(total);
    }

    ALWAYS_INLINE V times(const int8_t* x) const { return madd(digit(x), all(4096.0f), digit(x + 2 * group)); }
};

#else

// Eight numbers at a time, widened.
template <int group>
struct Numbers<4, group> {
    const uint8_t* words;
    explicit Numbers(const uint8_t* p) : words(p) {}

    V times(const int8_t* d) const {
        typedef uint8_t Bytes __attribute__((vector_size(8)));
        typedef int8_t Signed __attribute__((vector_size(8)));
        constexpr int vector = Digits<4, group>::vector;
        I total[3] = {};
        for (int j = 0; j < group / 2; j += 8) {
            Bytes w;
            memcpy(&w, words + j, 8);
            for (int k = 0; k < 2; k++, w = w >> 4) {
                I numbers = __builtin_convertvector(w & uint8_t(15), I);
                for (int digit = 0; digit < 3; digit++) {
                    Signed x;
                    memcpy(&x, d + digit * group + (j / vector * 2 + k) * vector + j % vector, 8);
                    total[digit] += numbers * __builtin_convertvector(x, I);
                }
            }
        }
        return __builtin_convertvector(total[0] * 65536 + total[1] * 256 + total[2], V);
    }
};

template <int group>
struct Numbers<8, group> {
    const uint8_t* words;
    explicit Numbers(const uint8_t* p) : words(p) {}

    V times(const int8_t* d) const {
        typedef uint16_t Words __attribute__((vector_size(16)));
        typedef int16_t Signed __attribute__((vector_size(16)));
        I total[2] = {};
        for (int j = 0; j < group / 2; j += 8) {
            Words w;
            memcpy(&w, words + 2 * j, 16);
            for (int k = 0; k < 2; k++, w = w >> 8) {
                I numbers = __builtin_convertvector(w & uint16_t(255), I);
                for (int digit = 0; digit < 2; digit++) {
                    Signed x;
                    memcpy(&x, d + 2 * (digit * group + (j / 16 * 2 + k) * 16 + j % 16), 16);
                    total[digit] += numbers * __builtin_convertvector(x, I);
                }
            }
        }
        return madd(__builtin_convertvector(total[0], V), all(4096.0f), __builtin_convertvector(total[1], V));
    }
};

#endif

// A stored quantized vector, and one token's fixed point values.
struct Quantized {
    const uint8_t *words, *scales, *biases;
};

struct FixedToken {
    const int8_t* digits;
    const float *steps, *sums;
};

template <int bits, int group>
inline FixedToken fixed_token(const Fixed& x, int64_t token) {
    int64_t at = token * x.groups;
    return {x.digits + at * Digits<bits, group>::size, x.steps + at, x.sums + at};
}

// Scales or biases of groups g.. g + count - 1, count <= 8, then zeros.
ALWAYS_INLINE V eight_parts(const uint8_t* parts, int32_t dtype, int64_t g, int count) {
    if (count == kGroups && dtype == FS_F16) return load_f16((const uint16_t*)parts + g);
    if (count == kGroups && dtype == FS_BF16) return load_bf16((const uint16_t*)parts + g);
    float values[kGroups] = {0};
    for (int i = 0; i < count; i++) values[i] = float_at(parts, dtype, g + i);
    return load(values);
}

// Adds the shares of groups g.. (`count` <= 8) of R vectors and C tokens to products[r * C + c] and biases[r * C + c].
template <int bits, int group, int R, int C>
ALWAYS_INLINE void add_groups(const Quantized* rows, int32_t dtype, int64_t g, int count, const FixedToken* x, V* products,
                              V* biases) {
    using D = Digits<bits, group>;
    float units[R * C][kGroups];
    for (int r = 0; r < R; r++) {
        V scale = eight_parts(rows[r].scales, dtype, g, count), bias = eight_parts(rows[r].biases, dtype, g, count);
        for (int c = 0; c < C; c++) {
            store(units[r * C + c], mul(scale, load(x[c].steps + g)));
            biases[r * C + c] = madd(bias, load(x[c].sums + g), biases[r * C + c]);
        }
    }
    for (int k = 0; k < count; k++)
        for (int r = 0; r < R; r++) {
            Numbers<bits, group> numbers(rows[r].words + (g + k) * D::words);
            for (int c = 0; c < C; c++) {
                int i = r * C + c;
                products[i] = madd(numbers.times(x[c].digits + (g + k) * D::size), all(units[i][k]), products[i]);
            }
        }
}

// out[r * C + c] = rows[r] . x[c]; `ahead`: R addresses to prefetch meanwhile, or null.
template <int bits, int group, int R, int C>
inline void fixed_dots(const Quantized* rows, const Format& f, const FixedToken* x, float* out,
                       const uint8_t* const* ahead = nullptr) {
    constexpr int bytes = kGroups * Digits<bits, group>::words;
    int64_t g = 0, end = f.columns / group;
    V products[R * C], biases[R * C];
    for (int i = 0; i < R * C; i++) products[i] = biases[i] = zero();
    for (; g + kGroups <= end; g += kGroups) {
        for (int r = 0; ahead && r < R; r++) prefetch_stretch<bytes>(ahead[r] + g / kGroups * bytes);
        add_groups<bits, group, R, C>(rows, f.scale_dtype, g, kGroups, x, products, biases);
    }
    if (g < end) add_groups<bits, group, R, C>(rows, f.scale_dtype, g, int(end - g), x, products, biases);
    for (int i = 0; i < R * C; i++) out[i] = sum(add(products[i], biases[i]));
}

}  // namespace
