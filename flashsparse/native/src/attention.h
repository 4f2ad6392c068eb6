// Causal attention over a stored cache, as a task of some tokens and some query heads of one key head.
// A row's order of operations depends on the number of keys it sees only. Part of kernels.cpp, compiled with it per variant.
#pragma once

#include "rows.h"

namespace {

using namespace fs;

// A task's query rows, the tokens' rows one after the other; each has its own range of keys and its own scores.
struct Queries {
    int count;
    const float* q[kQueryBlock];
    float* out[kQueryBlock];
    float* scores[kQueryBlock];
    int64_t low[kQueryBlock], high[kQueryBlock];  // keys low..high, both included
    int64_t kv_head;
};

Queries queries_of(const Attention& job, int64_t task, float* scratch) {
    int64_t group = job.heads / job.kv_heads, blocks = (group + job.head_block - 1) / job.head_block;
    int64_t kv_head = task % job.kv_heads, block = task / job.kv_heads % blocks, first = task / job.kv_heads / blocks;
    Queries all_of;
    all_of.count = 0, all_of.kv_head = kv_head;
    for (int64_t t = first * job.token_block; t < least((first + 1) * job.token_block, job.tokens); t++) {
        for (int64_t g = block * job.head_block; g < least((block + 1) * job.head_block, group); g++) {
            int i = all_of.count++;
            int64_t at = (t * job.heads + kv_head * group + g) * job.format.columns, position = job.offset + t;
            all_of.q[i] = job.q + at, all_of.out[i] = job.out + at;
            all_of.scores[i] = scratch + i * job.span;
            all_of.low[i] = job.window > 0 ? most(0, position - job.window + 1) : 0;
            all_of.high[i] = position;
        }
    }
    return all_of;
}

// Decodes keys or values `first`.. of one head into `rows`.
inline void decode_keys(const Attention& job, const uint8_t* from, int64_t kv_head, int64_t first, int count, float* rows) {
    int64_t n = job.format.columns;
    const uint8_t* p = from + (kv_head * job.capacity + first) * job.format.data_bytes;
    with_float(job.format.dtype, [&](auto type) {
        for (int k = 0; k < count; k++)
            decode_row(field<decltype(type)>(job.format, p + k * job.format.data_bytes), n, most(n, 16), rows + k * n);
    });
}

// One query: its keys and values are used as they are stored, in order. `ahead`: keys or values this much later.
constexpr int kAlone = 8, kFurther = 2 * kAlone;

template <class Row>
inline void stored_rows(const Attention& job, const uint8_t* from, int64_t kv_head, int64_t first, Row* rows, const uint8_t** ahead) {
    const uint8_t* p = from + (kv_head * job.capacity + first) * job.format.data_bytes;
    for (int k = 0; k < kAlone; k++) {
        rows[k] = field<Row>(job.format, p + k * job.format.data_bytes);
        ahead[k] = p + (k + kFurther) * job.format.data_bytes;
    }
}

template <class Row>
void score_alone(const Attention& job, const Queries& all_of) {
    int64_t n = job.format.columns, low = all_of.low[0], count = all_of.high[0] - low + 1, i = 0;
    float* scores = all_of.scores[0];
    Row rows[kAlone];
    const uint8_t* ahead[kAlone];
    for (; i + kAlone <= count; i += kAlone) {
        stored_rows(job, job.k, all_of.kv_head, low + i, rows, ahead);
        for (int half = 0; half < kAlone; half += 4) dots<4, 1>(rows + half, all_of.q, n, scores + i + half, ahead + half);
    }
    for (; i < count; i++) {
        Row row = field<Row>(job.format, job.k + (all_of.kv_head * job.capacity + low + i) * job.format.data_bytes);
        dots<1, 1>(&row, all_of.q, n, scores + i);
    }
    for (i = 0; i < count; i++) scores[i] *= job.scale;
}

template <class Row>
void sum_alone(const Attention& job, const Queries& all_of) {
    int64_t n = job.format.columns, low = all_of.low[0], count = all_of.high[0] - low + 1, i = 0;
    const float* weights = all_of.scores[0];
    Row rows[kAlone];
    const uint8_t* ahead[kAlone];
    for (; i + kAlone <= count; i += kAlone) {
        stored_rows(job, job.v, all_of.kv_head, low + i, rows, ahead);
        weighted<kAlone>(rows, weights + i, n, most(n, 16), all_of.out[0], ahead);
    }
    for (; i < count; i++) {
        Row row = field<Row>(job.format, job.v + (all_of.kv_head * job.capacity + low + i) * job.format.data_bytes);
        weighted<1>(&row, weights + i, n, most(n, 16), all_of.out[0]);
    }
}

// One token: all of its queries see the same keys, which are used as they are stored, two at a time.
constexpr int kShared = 2;

template <int C, class Row>
inline void score_two(const Attention& job, const Queries& all_of, const Row* keys, const uint8_t* const* ahead, int i,
                      int64_t at) {
    float out[kShared * C];
    dots<kShared, C>(keys, all_of.q + i, job.format.columns, out, ahead);
    for (int k = 0; k < kShared; k++)
        for (int c = 0; c < C; c++) all_of.scores[i + c][at + k] = out[k * C + c] * job.scale;
}

template <class Row>
void score_shared(const Attention& job, const Queries& all_of) {
    int64_t n = job.format.columns, size = job.format.data_bytes, low = all_of.low[0], count = all_of.high[0] - low + 1, k = 0;
    const uint8_t* p = job.k + (all_of.kv_head * job.capacity + low) * size;
    for (; k + kShared <= count; k += kShared) {
        Row keys[kShared] = {field<Row>(job.format, p + k * size), field<Row>(job.format, p + (k + 1) * size)};
        const uint8_t* ahead[kShared] = {p + (k + kFurther) * size, p + (k + kFurther + 1) * size};
        int i = 0;
        for (; i + 4 <= all_of.count; i += 4) score_two<4>(job, all_of, keys, i ? nullptr : ahead, i, k);
        for (; i < all_of.count; i++) score_two<1>(job, all_of, keys, i ? nullptr : ahead, i, k);
    }
    for (int i = 0; i < all_of.count && k < count; i++) {
        Row key = field<Row>(job.format, p + k * size);
        dots<1, 1>(&key, all_of.q + i, n, all_of.scores[i] + k);
        all_of.scores[i][k] *= job.scale;
    }
}

void score_keys(const Attention& job, const Queries& all_of, float* rows) {
    int64_t n = job.format.columns, last = all_of.high[all_of.count - 1];
    for (int64_t first = all_of.low[0]; first <= last; first += kKeyBlock) {
        int keys = int(least(kKeyBlock, last + 1 - first));
        decode_keys(job, job.k, all_of.kv_head, first, keys, rows);
        for (int k = 0; k < keys; k++) {
            int64_t key = first + k;
            int i = 0, end = all_of.count;  // low and high grow with the row: those that see this key are neighbours
            while (i < end && all_of.high[i] < key) i++;
            while (end > i && all_of.low[end - 1] > key) end--;
            RowF32 row{rows + k * n};
            float out[4];
            for (; i < end; i += 4) {
                int count = end - i < 4 ? end - i : 4;
                if (count == 4) dots<1, 4>(&row, all_of.q + i, n, out);
                else for (int c = 0; c < count; c++) dots<1, 1>(&row, all_of.q + i + c, n, out + c);
                for (int c = 0; c < count; c++) all_of.scores[i + c][key - all_of.low[i + c]] = out[c] * job.scale;
            }
        }
    }
}

float largest_of(const float* scores, int64_t n) {
    V most_of = all(scores[0]);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) most_of = maximum(most_of, load(scores + i));
    float lane[8];
    store(lane, most_of);
    for (int k = 1; k < 8; k++) lane[0] = lane[k] > lane[0] ? lane[k] : lane[0];
    for (; i < n; i++) lane[0] = scores[i] > lane[0] ? scores[i] : lane[0];
    return lane[0];
}

// exp(score - max) in place; returns the sum, whose order depends on the number of keys only.
float softmax(float* scores, int64_t n) {
    float largest = largest_of(scores, n);
    V total = zero(), shift = all(-largest);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        V e = exp_nonpositive(add(load(scores + i), shift));
        store(scores + i, e);
        total = add(total, e);
    }
    if (i < n) {
        float rest[8] = {0};
        memcpy(rest, scores + i, size_t(n - i) * 4);
        store(rest, exp_nonpositive(add(load(rest), shift)));
        for (int64_t k = n - i; k < 8; k++) rest[k] = 0.0f;
        total = add(total, load(rest));
        memcpy(scores + i, rest, size_t(n - i) * 4);
    }
    return sum(total);
}

void sum_values(const Attention& job, const Queries& all_of, float* rows) {
    int64_t n = job.format.columns, last = all_of.high[all_of.count - 1];
    for (int64_t first = all_of.low[0]; first <= last; first += kKeyBlock) {
        int keys = int(least(kKeyBlock, last + 1 - first));
        decode_keys(job, job.v, all_of.kv_head, first, keys, rows);
        for (int i = 0; i < all_of.count; i++) {
            int64_t begin = most(first, all_of.low[i]), end = least(first + keys - 1, all_of.high[i]) + 1;
            RowF32 seen[kKeyBlock];
            for (int64_t k = begin; k < end; k++) seen[k - begin].p = rows + (k - first) * n;
            if (begin < end)
                weighted_many<kKeyBlock>(seen, all_of.scores[i] + begin - all_of.low[i], int(end - begin), n, most(n, 16), all_of.out[i]);
        }
    }
}

void attention(const void* context, int64_t task, float* scratch) {
    const Attention& job = *(const Attention*)context;
    float* rows = scratch;
    Queries all_of = queries_of(job, task, scratch + kKeyBlock * job.format.columns);
    float sums[kQueryBlock];
    bool alone = all_of.count == 1;
    if (alone) with_float(job.format.dtype, [&](auto type) { score_alone<decltype(type)>(job, all_of); });
    else if (job.tokens == 1) with_float(job.format.dtype, [&](auto type) { score_shared<decltype(type)>(job, all_of); });
    else score_keys(job, all_of, rows);
    for (int i = 0; i < all_of.count; i++) {
        sums[i] = softmax(all_of.scores[i], all_of.high[i] - all_of.low[i] + 1);
        memset(all_of.out[i], 0, size_t(job.format.columns) * 4);
    }
    if (alone) with_float(job.format.dtype, [&](auto type) { sum_alone<decltype(type)>(job, all_of); });
    else sum_values(job, all_of, rows);
    for (int i = 0; i < all_of.count; i++)
        for (int64_t k = 0; k < job.format.columns; k++) all_of.out[i][k] /= sums[i];
}

}  // namespace
