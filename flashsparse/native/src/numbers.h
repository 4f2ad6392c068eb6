// Scalar conversions between float32 and the 16-bit types. Everything is internal to a translation unit: the kernels
// are compiled once per instruction set, and a shared inline function could carry AVX2 code into the portable variant.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

inline float bf16_to_f32(uint16_t h) { return from_bits(uint32_t(h) << 16); }

inline float f16_to_f32(uint16_t h) {
    uint32_t magnitude = uint32_t(h & 0x7fff) << 13, exponent = magnitude & 0x0f800000;
    uint32_t bits = magnitude + (112u << 23);             // rebias
    if (exponent == 0x0f800000) bits += 112u << 23;       // Inf, NaN
    float value = from_bits(bits);
    if (exponent == 0) value = from_bits(bits + (1u << 23)) - from_bits(113u << 23);  // subnormal: renormalize
    return from_bits(to_bits(value) | uint32_t(h & 0x8000) << 16);
}

inline uint16_t f32_to_bf16(float value) {
    uint32_t bits = to_bits(value);
    if (value != value) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t f32_to_f16(float value) {
    uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return uint16_t(sign | 0x7e00 | (bits >> 13 & 0x3ff));
    if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above round to Inf
    if (bits < 0x38800000)  // below the smallest normal: the addition rounds at the subnormals' spacing
        return uint16_t(sign | (to_bits(from_bits(bits) + 0.5f) - to_bits(0.5f)));
    bits += 0xfff + (bits >> 13 & 1);
    return uint16_t(sign | (bits - (112u << 23)) >> 13);
}

}  // namespace
