// The sparse FFN's hidden values over records, as tasks of some records. Part of kernels.cpp, compiled with it per variant.
#pragma once

#include "activation.h"
#include "fixed.h"

namespace {

using namespace fs;

constexpr int kTokens = 64;  // tokens that are looked at together: enough that several of them need the record

inline float field_value(const Hidden& job, int64_t j, int64_t field) {
    if (field < 0) return 0.0f;
    int32_t dtype = job.format.group ? job.format.scale_dtype : job.format.dtype;
    return float_at(job.base + job.offsets[j] + field, dtype, 0);
}

inline bool wanted(const Hidden& job, int64_t j, int64_t token) {
    return !job.mask || job.mask[token * job.neurons + job.ids[j]];
}

inline float finish(const Hidden& job, float gate, float up) {
    return job.record->activation == FS_DRELU ? gate * relu(up) : gate * up;
}

// The record's own pre-activation: the gate row, or without a gate the up row.
struct Score {
    int64_t row, bias;
    explicit Score(const fs_record& r) : row(r.gated ? r.gate : r.up), bias(r.gated ? r.gate_bias : r.up_bias) {}
};

// How a record's vectors are multiplied with tokens: `some` are R vectors side by side with the only token; `bind` makes
// one ready for `tokens`, which takes any list of them.
template <class Row>
struct FloatProducts {
    struct Vector {
        RowF32 row;
    };

    template <int R>
    static void some(const Hidden& job, const uint8_t* const* p, const uint8_t* const* ahead, float* out) {
        Row rows[R];
        for (int r = 0; r < R; r++) rows[r] = field<Row>(job.format, p[r]);
        dots<R, 1>(rows, &job.x, job.format.columns, out, ahead);
    }

    static Vector bind(const Hidden& job, const uint8_t* p, float* scratch) {
        decode_row(field<Row>(job.format, p), job.format.columns, step_of(job.format, job.format.columns), scratch);
        return {RowF32{scratch}};
    }

    static void tokens(const Hidden& job, const Vector& vector, const int64_t* tokens, int count, float* out) {
        int64_t n = job.format.columns;
        const float* x[kTokens];
        for (int i = 0; i < count; i++) x[i] = job.x + tokens[i] * n;
        int i = 0;
        for (; i + 8 <= count; i += 8) dots<1, 8>(&vector.row, x + i, n, out + i);
        for (; i + 4 <= count; i += 4) dots<1, 4>(&vector.row, x + i, n, out + i);
        for (; i + 2 <= count; i += 2) dots<1, 2>(&vector.row, x + i, n, out + i);
        if (i < count) dots<1, 1>(&vector.row, x + i, n, out + i);
    }
};

inline Quantized quantized_at(const Format& f, const uint8_t* p) { return {p, p + f.data_bytes, p + f.data_bytes + f.scale_bytes}; }

template <int bits, int group>
struct FixedProducts {
    using Vector = Quantized;

    template <int R>
    static void some(const Hidden& job, const uint8_t* const* p, const uint8_t* const* ahead, float* out) {
        Quantized rows[R];
        for (int r = 0; r < R; r++) rows[r] = quantized_at(job.format, p[r]);
        FixedToken x = fixed_token<bits, group>(job.fixed, 0);
        fixed_dots<bits, group, R, 1>(rows, job.format, &x, out, ahead);
    }

    static Vector bind(const Hidden& job, const uint8_t* p, float*) { return quantized_at(job.format, p); }

    static void tokens(const Hidden& job, const Vector& vector, const int64_t* tokens, int count, float* out) {
        FixedToken x[kTokens];
        for (int i = 0; i < count; i++) x[i] = fixed_token<bits, group>(job.fixed, tokens[i]);
        int i = 0;
        for (; i + 4 <= count; i += 4) fixed_dots<bits, group, 1, 4>(&vector, job.format, x + i, out + i);
        for (; i + 2 <= count; i += 2) fixed_dots<bits, group, 1, 2>(&vector, job.format, x + i, out + i);
        if (i < count) fixed_dots<bits, group, 1, 1>(&vector, job.format, x + i, out + i);
    }
};

// Field `at` of records j[0..count), count <= 4: what one step works on, or prefetches for the next.
struct Four {
    const uint8_t* p[4];
    int count;

    Four(const Hidden& job, const int64_t* j, int64_t n, int64_t at) : count(int(least(4, n))) {
        for (int r = 0; r < 4 && count > 0; r++) p[r] = job.base + job.offsets[j[least(r, count - 1)]] + at;
    }
};

// The vectors of `some` times the only token.
template <class Products>
inline void four_dots(const Hidden& job, const Four& some, const Four& next, float* out) {
    const uint8_t* const* ahead = next.count ? next.p : nullptr;
    if (some.count == 4) return Products::template some<4>(job, some.p, ahead, out);
    for (int k = 0; k < some.count; k++) Products::template some<1>(job, some.p + k, ahead ? ahead + k : nullptr, out + k);
}

// The records after a task's: its thread's next ones, most often.
inline Four following(const Hidden& job, int64_t first, int64_t at) {
    int64_t j[4] = {first, first + 1, first + 2, first + 3};
    return Four(job, j, job.n - first, at);
}

// Activated gates of the records `chosen`; those that are not zero go into hidden and their records into `active`.
template <class Products>
int hidden_gates(const Hidden& job, const int64_t* chosen, int kept, int64_t end, int64_t* active) {
    Score score(*job.record);
    int used = 0;
    for (int k = 0; k < kept; k += 4) {
        int count = int(least(4, kept - k));
        float gate[4];
        if (job.activated) {
            for (int i = 0; i < count; i++) gate[i] = job.activated[job.ids[chosen[k + i]]];
        } else {
            Four next = kept - k > 4                ? Four(job, chosen + k + 4, kept - k - 4, score.row)
                        : job.record->gated && used ? Four(job, active, used, job.record->up)
                                                    : following(job, end, score.row);
            four_dots<Products>(job, Four(job, chosen + k, count, score.row), next, gate);
            for (int i = 0; i < count; i++)
                gate[i] = activate(gate[i] + field_value(job, chosen[k + i], score.bias), job.record->activation, job.record->param);
        }
        for (int i = 0; i < count; i++) {
            if (gate[i] == 0.0f) continue;
            job.hidden[job.cols[chosen[k + i]]] = gate[i];
            active[used++] = chosen[k + i];
        }
    }
    return used;
}

template <class Products>
void hidden_one_token(const Hidden& job, int64_t first, int count) {
    const fs_record& record = *job.record;
    int64_t chosen[kRowBlock] = {0}, active[kRowBlock] = {0}, end = first + count;
    int kept = 0;
    for (int64_t j = first; j < end; j++) {
        job.hidden[job.cols[j]] = 0.0f;
        if (wanted(job, j, 0)) chosen[kept++] = j;
    }
    int used = hidden_gates<Products>(job, chosen, kept, end, active);
    for (int k = 0; k < used && record.gated; k += 4) {
        Four some(job, active + k, used - k, record.up);
        Four next = used - k > 4 ? Four(job, active + k + 4, used - k - 4, record.up)
                                 : following(job, end, job.activated ? record.up : record.gate);
        float up[4];
        four_dots<Products>(job, some, next, up);
        for (int i = 0; i < some.count; i++) {
            float* value = job.hidden + job.cols[active[k + i]];
            *value = finish(job, *value, up[i] + field_value(job, active[k + i], record.up_bias));
        }
    }
}

// Replaces gate[t] by the hidden value for the `count` tokens of one record; `up` is its up row.
template <class Products, class Vector>
inline void apply_up(const Hidden& job, int64_t j, const Vector& up, int64_t token, int count, float* gate) {
    int64_t active[kTokens];
    float values[kTokens];
    int used = 0;
    for (int t = 0; t < count; t++)
        if (gate[t] != 0.0f) active[used++] = token + t;
    Products::tokens(job, up, active, used, values);
    float bias = field_value(job, j, job.record->up_bias);
    for (int i = 0; i < used; i++) {
        float& value = gate[active[i] - token];
        value = finish(job, value, values[i] + bias);
    }
}

template <class Products, class Vector>
inline void gates_of(const Hidden& job, int64_t j, const Vector& row, int64_t token, int count, float* gate) {
    int64_t tokens[kTokens];
    float values[kTokens];
    int used = 0;
    for (int64_t t = token; t < token + count; t++) {
        gate[t - token] = 0.0f;
        if (wanted(job, j, t)) tokens[used++] = t;
    }
    if (job.activated) {
        for (int i = 0; i < used; i++) gate[tokens[i] - token] = job.activated[tokens[i] * job.neurons + job.ids[j]];
        return;
    }
    Products::tokens(job, row, tokens, used, values);
    float bias = field_value(job, j, Score(*job.record).bias);
    for (int i = 0; i < used; i++)
        gate[tokens[i] - token] = activate(values[i] + bias, job.record->activation, job.record->param);
}

template <class Products>
void hidden_many_tokens(const Hidden& job, int64_t first, int count, float* scratch) {
    int64_t n = job.format.columns;
    bool gated = job.record->gated;
    typename Products::Vector score[kRowBlock], up[kRowBlock];
    for (int k = 0; k < count; k++) {
        const uint8_t* p = job.base + job.offsets[first + k];
        if (!job.activated) score[k] = Products::bind(job, p + Score(*job.record).row, scratch + 2 * k * n);
        if (gated) up[k] = Products::bind(job, p + job.record->up, scratch + (2 * k + 1) * n);
    }
    for (int64_t token = 0; token < job.tokens; token += kTokens) {
        int block = int(least(kTokens, job.tokens - token));
        for (int k = 0; k < count; k++) {
            float gate[kTokens];
            gates_of<Products>(job, first + k, score[k], token, block, gate);
            if (gated) apply_up<Products>(job, first + k, up[k], token, block, gate);
            for (int t = 0; t < block; t++)
                job.hidden[(token + t) * job.ldh + job.cols[first + k]] = gate[t] == 0.0f ? 0.0f : gate[t];
        }
    }
}

template <class Products>
void hidden_of(const Hidden& job, int64_t first, int count, float* scratch) {
    if (job.tokens == 1) hidden_one_token<Products>(job, first, count);
    else hidden_many_tokens<Products>(job, first, count, scratch);
}

void hidden(const void* context, int64_t task, float* scratch) {
    const Hidden& job = *(const Hidden*)context;
    int64_t first = task * kRowBlock;
    int count = int(least(kRowBlock, job.n - first));
    if (job.format.group) {
        with_fixed(job.format, [&](auto bits, auto group) {
            hidden_of<FixedProducts<decltype(bits)::value, decltype(group)::value>>(job, first, count, scratch);
        });
        return;
    }
    with_float(job.format.dtype, [&](auto type) { hidden_of<FloatProducts<decltype(type)>>(job, first, count, scratch); });
}

}  // namespace
