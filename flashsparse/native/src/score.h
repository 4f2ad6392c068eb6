// Scores from weights of 1 to 4 bits: tokens rounded to int8 per group, products in integers, groups added as floats.
// A group's integer sum is exact and its share of the score takes no fused operation, so that every variant and every
// way of cutting a call gives the same bits: lane l of eight adds the groups l, l + 8, ..., then one fixed final sum.
#pragma once

#include "rows.h"
#include "score_sums.h"

namespace {

using fs::Scoring;

constexpr int kLanes = 8;  // groups that are added side by side; a token's buffers are padded to a multiple

// One group of a token: its integers into q, by the variant's order. Returns their sum.
template <int bits, int group>
inline float round_group(const float* x, float step, int64_t first, int8_t* q) {
    int sum = 0;
    for (int i = 0; i < group; i++) {
        float rounded = (x[i] / step + 12582912.0f) - 12582912.0f;  // adding 1.5 * 2^23 rounds half to even
        q[place<bits, group>(first + i)] = int8_t(rounded);
        sum += int(rounded);
    }
    return float(sum);
}

// x ~ step * q in every group, step = max |x| / 127. A group that is zero or whose step is subnormal counts as zero.
// NaN or Inf makes the step NaN, and so all scores of the token. q, steps and sums come as zeros.
template <int bits, int group>
void round_token(const float* x, int64_t columns, int8_t* q, float* steps, float* sums) {
    for (int64_t first = 0, g = 0; first < columns; first += group, g++) {
        uint32_t top = 0;
        for (int i = 0; i < group; i++) {
            uint32_t magnitude = to_bits(x[first + i]) & 0x7fffffff;
            top = magnitude > top ? magnitude : top;
        }
        float step = from_bits(top) / 127.0f;
        if (top >= 0x7f800000) steps[g] = from_bits(0x7fc00000);
        else if (step >= from_bits(0x00800000)) steps[g] = step, sums[g] = round_group<bits, group>(x + first, step, first, q);
    }
}

inline V group_terms(V step, V sum, V scale, V bias, V products) {
    return mul(step, add(mul(scale, products), mul(bias, sum)));
}

// The last groups of a row, fewer than eight: copied, because reading on could leave the matrix.
template <int bits, int group, class Scales>
V last_groups(const uint8_t* words, Scales scales, Scales biases, int64_t g, int count, const int8_t* q, V step, V sum) {
    constexpr int bytes = group * bits / 8;
    uint8_t copy[kLanes * bytes] = {0};
    float scale[kLanes] = {0}, bias[kLanes] = {0};
    memcpy(copy, words + g * bytes, size_t(count * bytes));
    for (int i = 0; i < count; i++) scale[i] = scales.one(g + i), bias[i] = biases.one(g + i);
    return group_terms(step, sum, load(scale), load(bias), eight_groups<bits, group>(copy, q));
}

template <int bits, int group, class Scales>
float score_row(const Scoring& job, int64_t row, int64_t token) {
    const Format& f = job.format;
    int64_t groups = f.columns / group, whole = groups / kLanes * kLanes;
    const uint8_t* words = bytes_at(job.w->data, row * f.data_bytes);
    Scales scales, biases;
    bind(scales, f, bytes_at(job.w->scales, row * f.scale_bytes), nullptr, nullptr);
    bind(biases, f, bytes_at(job.w->biases, row * f.scale_bytes), nullptr, nullptr);
    const int8_t* q = job.q + token * job.groups * group;
    const float *steps = job.steps + token * job.groups, *sums = job.sums + token * job.groups;
    V total = zero();
    for (int64_t g = 0; g < whole; g += kLanes) {
        V products = eight_groups<bits, group>(words + g * (group * bits / 8), q + g * group);
        total = add(total, group_terms(load(steps + g), load(sums + g), scales.at(g), biases.at(g), products));
    }
    if (whole < groups)
        total = add(total, last_groups<bits, group>(words, scales, biases, whole, int(groups - whole), q + whole * group,
                                                    load(steps + whole), load(sums + whole)));
    return sum(total);
}

template <int bits, int group, class Scales>
void score_rows(const Scoring& job, int64_t row, int64_t end) {
    for (; row < end; row++)
        for (int64_t t = 0; t < job.tokens; t++) {
            float value = score_row<bits, group, Scales>(job, row, t);
            job.out[t * job.w->rows + row] = job.bias ? value + job.bias[row] : value;
        }
}

template <int n>
struct Number {
    static constexpr int value = n;
};

// Calls f with the bits and the group size as types.
template <class F>
inline void with_layout(const Format& format, F&& f) {
    auto sized = [&](auto bits) {
        if (format.group == 32) return f(bits, Number<32>{});
        if (format.group == 64) return f(bits, Number<64>{});
        return f(bits, Number<128>{});
    };
    switch (format.dtype) {
        case FS_Q1: return sized(Number<1>{});
        case FS_Q2: return sized(Number<2>{});
        case FS_Q3: return sized(Number<3>{});
        default: return sized(Number<4>{});
    }
}

void score(const void* context, int64_t task, float*) {
    const Scoring& job = *(const Scoring*)context;
    int64_t row = task * job.rows_per_task, end = least(row + job.rows_per_task, job.w->rows);
    with_layout(job.format, [&](auto bits, auto group) {
        constexpr int b = decltype(bits)::value, size = decltype(group)::value;
        if (job.format.scale_dtype == FS_F32) score_rows<b, size, RowF32>(job, row, end);
        else if (job.format.scale_dtype == FS_F16) score_rows<b, size, RowF16>(job, row, end);
        else score_rows<b, size, RowBF16>(job, row, end);
    });
}

void score_input(const Format& format, const float* x, int8_t* q, float* steps, float* sums) {
    with_layout(format, [&](auto bits, auto group) {
        round_token<decltype(bits)::value, decltype(group)::value>(x, format.columns, q, steps, sums);
    });
}

}  // namespace
