// Stored vectors as eight-lane sources, and the two loops over them: dot products and weighted sums.
// A dot product's order depends on its length only: eight lanes over steps of eight columns, the rest padded with zeros,
// one fixed final sum. It is the same whether one row or token is worked on or many. Quantized ones: fixed.h.
#pragma once

#include <stddef.h>

#include "kernels.h"
#include "simd.h"

namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct RowF32 {
    const float* p;
    void group(int64_t) {}
    V at(int64_t i) const { return load(p + i); }
    float one(int64_t i) const { return p[i]; }
    static constexpr int64_t bytes(int64_t i) { return i * 4; }
};

struct RowF16 {
    const uint16_t* p;
    void group(int64_t) {}
    V at(int64_t i) const { return load_f16(p + i); }
    float one(int64_t i) const { return decode_f16(p[i]); }
    static constexpr int64_t bytes(int64_t i) { return i * 2; }
};

struct RowBF16 {
    const uint16_t* p;
    void group(int64_t) {}
    V at(int64_t i) const { return load_bf16(p + i); }
    float one(int64_t i) const { return bf16_to_f32(p[i]); }
    static constexpr int64_t bytes(int64_t i) { return i * 2; }
};

inline float float_at(const uint8_t* p, int32_t dtype, int64_t i) {
    if (dtype == FS_F32) return ((const float*)p)[i];
    uint16_t value = ((const uint16_t*)p)[i];
    return dtype == FS_F16 ? decode_f16(value) : bf16_to_f32(value);
}

template <int bits>
struct RowQ {
    const uint8_t *p, *scales, *biases;
    int32_t scale_dtype;
    V scale, bias;
    void group(int64_t g) {
        scale = all(float_at(scales, scale_dtype, g));
        bias = all(float_at(biases, scale_dtype, g));
    }
    V at(int64_t i) const { return madd(bits == 8 ? load_u8(p + i) : load_u4(p + i / 2), scale, bias); }
    float one(int64_t) const { return 0.0f; }  // a quantized row is a whole number of groups: never asked
    static constexpr int64_t bytes(int64_t i) { return i * bits / 8; }
};

using fs::Format;

inline const uint8_t* bytes_at(const void* p, int64_t offset) { return (const uint8_t*)p + offset; }

inline void bind(RowF32& row, const Format&, const void* data, const void*, const void*) { row.p = (const float*)data; }
inline void bind(RowF16& row, const Format&, const void* data, const void*, const void*) { row.p = (const uint16_t*)data; }
inline void bind(RowBF16& row, const Format&, const void* data, const void*, const void*) { row.p = (const uint16_t*)data; }
template <int bits>
inline void bind(RowQ<bits>& row, const Format& f, const void* data, const void* scales, const void* biases) {
    row = {(const uint8_t*)data, (const uint8_t*)scales, (const uint8_t*)biases, f.scale_dtype, zero(), zero()};
}

// The vector of a record's field: words, scales and biases back to back.
template <class Row>
inline Row field(const Format& f, const uint8_t* p) {
    Row row;
    bind(row, f, p, p + f.data_bytes, p + f.data_bytes + f.scale_bytes);
    return row;
}

inline int64_t step_of(const Format& f, int64_t columns) { return f.group ? f.group : columns < 16 ? 16 : columns; }

// Calls f with a value of the row type that `dtype` names, which is not quantized.
template <class F>
inline void with_float(int32_t dtype, F&& f) {
    switch (dtype) {
        case FS_F32: return f(RowF32{});
        case FS_F16: return f(RowF16{});
        default: return f(RowBF16{});
    }
}

template <int n>
struct Number {
    static constexpr int value = n;
};

// Calls f with the bits, 8 or 4, and the group size as types.
template <class F>
inline void with_fixed(const Format& format, F&& f) {
    auto sized = [&](auto bits) {
        if (format.group == 32) return f(bits, Number<32>{});
        if (format.group == 64) return f(bits, Number<64>{});
        return f(bits, Number<128>{});
    };
    if (format.dtype == FS_Q8) return sized(Number<8>{});
    return sized(Number<4>{});
}

// Calls f with a value of the row type that `dtype` names.
template <class F>
inline void with_row(int32_t dtype, F&& f) {
    switch (dtype) {
        case FS_F32: return f(RowF32{});
        case FS_F16: return f(RowF16{});
        case FS_BF16: return f(RowBF16{});
        case FS_Q8: return f(RowQ<8>{});
        default: return f(RowQ<4>{});
    }
}

// out[r * C + c] = rows[r] . x[c] for plain floats. `ahead`: R addresses to prefetch as the rows are walked, or null.
template <int R, int C, class Row>
inline void dots(const Row* source, const float* const* x, int64_t n, float* out, const uint8_t* const* ahead = nullptr) {
    Row rows[R];
    for (int r = 0; r < R; r++) rows[r] = source[r];
    V sums[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sums[r][c] = zero();
    auto add_eight = [&](int64_t k) __attribute__((always_inline)) {
        V w[R];
        for (int r = 0; r < R; r++) w[r] = rows[r].at(k);
        for (int c = 0; c < C; c++) {
            V values = load(x[c] + k);
            for (int r = 0; r < R; r++) sums[r][c] = madd(w[r], values, sums[r][c]);
        }
    };
    constexpr int line = int(512 / Row::bytes(8));  // columns of a cache line
    int64_t k = 0, whole = n / 8 * 8;
    for (; k + line <= n; k += line) {
        if (ahead)
            for (int r = 0; r < R; r++) prefetch(ahead[r] + Row::bytes(k));
        for (int i = 0; i < line; i += 8) add_eight(k + i);
    }
    for (; k < whole; k += 8) add_eight(k);
    if (whole < n) {
        for (int r = 0; r < R; r++) {
            float w[8] = {0};
            for (k = whole; k < n; k++) w[k - whole] = rows[r].one(k);
            for (int c = 0; c < C; c++) {
                float rest[8] = {0};
                memcpy(rest, x[c] + whole, size_t(n - whole) * 4);
                sums[r][c] = madd(load(w), load(rest), sums[r][c]);
            }
        }
    }
    if constexpr (R * C % 4 == 0) {
        for (int i = 0; i < R * C; i += 4) sum_four(&sums[0][0] + i, out + i);
    } else {
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) out[r * C + c] = sum(sums[r][c]);
    }
}

// y += weights[0] * rows[0] + weights[1] * rows[1] + ..., one addition after the other.
template <int R, class Row>
inline void weighted(const Row* source, const float* weights, int64_t n, int64_t step, float* y,
                     const uint8_t* const* ahead = nullptr) {
    Row rows[R];
    V factor[R];
    for (int r = 0; r < R; r++) rows[r] = source[r], factor[r] = all(weights[r]);
    constexpr int line = int(512 / Row::bytes(8));  // columns of a cache line
    int64_t whole = n / 8 * 8;
    for (int64_t i = 0, g = 0; i < whole; i += step, g++) {
        for (int r = 0; r < R; r++) rows[r].group(g);
        int64_t end = i + step < whole ? i + step : whole;
        for (int64_t first = i; first < end; first += line) {
            for (int r = 0; ahead && r < R; r++) prefetch(ahead[r] + Row::bytes(first));
            int64_t last = first + line < end ? first + line : end;
            for (int64_t k = first; k < last; k += 8) {
                V total = load(y + k);
                for (int r = 0; r < R; r++) total = madd(factor[r], rows[r].at(k), total);
                store(y + k, total);
            }
        }
    }
    for (int64_t k = whole; k < n; k++)
        for (int r = 0; r < R; r++) y[k] = madd(weights[r], rows[r].one(k), y[k]);
}

// The same for any number of rows, R at a time, then fewer.
template <int R, class Row>
inline void weighted_many(const Row* rows, const float* weights, int count, int64_t n, int64_t step, float* y) {
    int r = 0;
    for (; r + R <= count; r += R) weighted<R>(rows + r, weights + r, n, step, y);
    if constexpr (R > 1) weighted_many<R / 4 ? R / 4 : 1>(rows + r, weights + r, count - r, n, step, y);
}

template <class Row>
inline void decode_row(Row row, int64_t n, int64_t step, float* out) {
    int64_t whole = n / 8 * 8;
    for (int64_t i = 0, g = 0; i < whole; i += step, g++) {
        row.group(g);
        int64_t end = i + step < whole ? i + step : whole;
        for (int64_t k = i; k < end; k += 8) store(out + k, row.at(k));
    }
    for (int64_t k = whole; k < n; k++) out[k] = row.one(k);
}

}  // namespace
