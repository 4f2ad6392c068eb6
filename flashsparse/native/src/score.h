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
        if (top < 0x7f800000 && step >= from_bits(0x00800000)) {
            steps[g] = step;
            sums[g] = round_group<bits, group>(x + first, step, first, q);
        }
    }
}

ALWAYS_INLINE V group_terms(V step, V sum, V scale, V bias, V products) {
    return mul(step, add(mul(scale, products), mul(bias, sum)));
}

struct ScoredRow {
    const uint8_t *words, *scales, *biases;
};

inline ScoredRow scored_row(const Scoring& job, int64_t r) {
    int64_t parts = r * job.format.scale_bytes;
    return {bytes_at(job.w->data, r * job.format.data_bytes), bytes_at(job.w->scales, parts),
            bytes_at(job.w->biases, parts)};
}

// Eight scales or biases from group g on. The type is tested here, once for hundreds of values, not compiled in.
ALWAYS_INLINE V parts_at(const uint8_t* parts, int32_t dtype, int64_t g) {
    if (dtype == FS_F16) return load_f16((const uint16_t*)parts + g);
    if (dtype == FS_F32) return load((const float*)parts + g);
    return load_bf16((const uint16_t*)parts + g);
}

// The last groups of a row, fewer than eight. `inside`: reading eight stays inside the matrix; otherwise they are copied.
// The groups beyond meet zeros of the token; their scales are cleared, since they need not be finite.
template <int bits, int group>
ALWAYS_INLINE V last_terms(ScoredRow row, int32_t dtype, int64_t g, int count, bool inside, const int8_t* q, V step, V sum) {
    constexpr int bytes = group * bits / 8;
    const uint8_t* words = row.words + g * bytes;
    if (inside) {
        V scale = first_lanes(parts_at(row.scales, dtype, g), count), bias = first_lanes(parts_at(row.biases, dtype, g), count);
        return group_terms(step, sum, scale, bias, eight_groups<bits, group>(words, q));
    }
    uint8_t copy[kLanes * bytes] = {0};
    float scale[kLanes] = {0}, bias[kLanes] = {0};
    memcpy(copy, words, size_t(count * bytes));
    for (int i = 0; i < count; i++) {
        scale[i] = float_at(row.scales, dtype, g + i);
        bias[i] = float_at(row.biases, dtype, g + i);
    }
    return group_terms(step, sum, load(scale), load(bias), eight_groups<bits, group>(copy, q));
}

// R rows side by side share the token's values and hide each other's latencies.
template <int bits, int group, int R>
inline void score_tile(const Scoring& job, int64_t first, int64_t token) {
    constexpr int bytes = group * bits / 8;
    int64_t groups = job.format.columns / group, whole = groups / kLanes * kLanes;
    const int8_t* q = job.q + token * job.groups * group;
    const float *steps = job.steps + token * job.groups, *sums = job.sums + token * job.groups;
    int32_t dtype = job.format.scale_dtype;
    ScoredRow rows[R];
    V total[R];
    for (int r = 0; r < R; r++) rows[r] = scored_row(job, first + r), total[r] = zero();
    for (int64_t g = 0; g < whole; g += kLanes) {
        V step = load(steps + g), sum = load(sums + g);
        for (int r = 0; r < R; r++) {
            prefetch_stretch<kLanes * bytes>(rows[r].words + R * job.format.data_bytes + g * bytes);
            V products = eight_groups<bits, group>(rows[r].words + g * bytes, q + g * group);
            V scale = parts_at(rows[r].scales, dtype, g), bias = parts_at(rows[r].biases, dtype, g);
            total[r] = add(total[r], group_terms(step, sum, scale, bias, products));
        }
    }
    for (int r = 0; r < R && whole < groups; r++) {
        bool inside = (job.w->rows - 1 - first - r) * groups >= whole + kLanes - groups;
        total[r] = add(total[r], last_terms<bits, group>(rows[r], dtype, whole, int(groups - whole), inside,
                                                         q + whole * group, load(steps + whole), load(sums + whole)));
    }
    float* out = job.out + token * job.w->rows + first;
    for (int r = 0; r < R; r++) out[r] = job.bias ? sum(total[r]) + job.bias[first + r] : sum(total[r]);
}

template <int bits, int group>
void score_rows(const Scoring& job, int64_t row, int64_t end) {
    for (; row + 4 <= end; row += 4)
        for (int64_t t = 0; t < job.tokens; t++) score_tile<bits, group, 4>(job, row, t);
    for (; row < end; row++)
        for (int64_t t = 0; t < job.tokens; t++) score_tile<bits, group, 1>(job, row, t);
}

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
        score_rows<decltype(bits)::value, decltype(group)::value>(job, row, end);
    });
}

void score_input(const Format& format, const float* x, int8_t* q, float* steps, float* sums) {
    with_layout(format, [&](auto bits, auto group) {
        round_token<decltype(bits)::value, decltype(group)::value>(x, format.columns, q, steps, sums);
    });
}

}  // namespace
