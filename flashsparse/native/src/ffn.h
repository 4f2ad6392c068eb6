// The sparse FFN over records: hidden values as tasks of some records, the down sums as tasks of some columns. Part of
// kernels.cpp, compiled with it per variant.
#pragma once

#include "activation.h"
#include "fixed.h"

namespace {

using namespace fs;

constexpr int kTokens = 64;  // tokens that are looked at together: enough that several of them need the record

// --- hidden: one task is a block of records ---------------------------------------------------------------------

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

// --- down: one task is a block of columns -----------------------------------------------------------------------

// The next records, at most four, whose hidden value of the only token is not zero.
struct Weighted {
    int64_t j[4] = {0};
    float weights[4];
    int count = 0;

    Weighted(const Down& job, int64_t* from) {
        for (; *from < job.n && count < 4; ++*from)
            if (float weight = job.hidden[job.cols[*from]]; weight != 0.0f) weights[count] = weight, j[count++] = *from;
    }
};

// The down vector of record j from column `begin` on, which is a multiple of the group.
template <class Row>
Row down_row(const Down& job, int64_t j, int64_t begin) {
    const Format& f = job.format;
    const uint8_t* p = job.base + job.offsets[j] + job.record->down;
    const uint8_t *scales = p + f.data_bytes, *biases = scales + f.scale_bytes;
    int64_t skip = f.group ? begin / f.group * (f.scale_dtype == FS_F32 ? 4 : 2) : 0;
    Row row;
    bind(row, f, p + Row::bytes(begin), scales + skip, biases + skip);
    return row;
}

// 4 bits: in eight words lie columns 0, 8, ..., 56 of 64, in their next bits 1, 9, ..., 57: so y is worked on with its
// columns in this order, and no number changes its lane.
inline void exchange(const float* from, int64_t n, bool back, float* to) {
    for (int64_t block = 0; block < n; block += 64)
        for (int k = 0; k < 8; k++)
            for (int l = 0; l < 8; l++) {
                int64_t planes = block + 8 * k + l, columns = block + 8 * l + k;
                to[back ? columns : planes] = from[back ? planes : columns];
            }
}

// Eight groups' scales and biases of a row; scales[k]: over 16^k, for what NibbleWords::plane makes larger.
struct EightGroups {
    float scales[4][kGroups], biases[kGroups];

    void load_from(const Quantized& row, int32_t dtype, int64_t g, int count) {
        V scale = eight_parts(row.scales, dtype, g, count);
        for (int k = 0; k < 4; k++, scale = mul(scale, all(0.0625f))) store(scales[k], scale);
        store(biases, eight_parts(row.biases, dtype, g, count));
    }
};

#if defined(FS_AVX512)

// y += weights[0] * rows[0] + ... for the 64 columns whose words begin at `words`. A group has 16 values: they are worked
// out once and looked up, two planes at a time; the same bits as one by one where scales are 2^-102 or more.
template <int R>
ALWAYS_INLINE void add_columns(const Quantized* rows, const EightGroups* parts, const float* weights, int64_t words,
                               int64_t g, float* y) {
    const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i planes = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(4), 1);
    __m512 total[4];
    for (int i = 0; i < 4; i++) total[i] = _mm512_loadu_ps(y + 16 * i);
    for (int r = 0; r < R; r++) {
        __m512 values = _mm512_fmadd_ps(numbers, _mm512_set1_ps(parts[r].scales[0][g]), _mm512_set1_ps(parts[r].biases[g]));
        __m256i eight = _mm256_loadu_si256((const __m256i*)(rows[r].words + words));
        __m512i two = _mm512_srlv_epi32(_mm512_broadcast_i64x4(eight), planes);
        __m512 weight = _mm512_set1_ps(weights[r]);
        for (int i = 0; i < 4; i++)  // the lookup takes an index's low four bits
            total[i] = _mm512_fmadd_ps(weight, _mm512_permutexvar_ps(_mm512_srli_epi32(two, 8 * i), values), total[i]);
    }
    for (int i = 0; i < 4; i++) _mm512_storeu_ps(y + 16 * i, total[i]);
}

#else

template <int R>
ALWAYS_INLINE void add_columns(const Quantized* rows, const EightGroups* parts, const float* weights, int64_t words,
                               int64_t g, float* y) {
    V total[8];
    for (int i = 0; i < 8; i++) total[i] = load(y + 8 * i);
    for (int r = 0; r < R; r++) {
        NibbleWords eight(rows[r].words + words);
        V bias = all(parts[r].biases[g]), factor = all(weights[r]);
        for (int i = 0; i < 8; i++)
            total[i] = madd(factor, madd(eight.plane(i), all(parts[r].scales[i % 4][g]), bias), total[i]);
    }
    for (int i = 0; i < 8; i++) store(y + 8 * i, total[i]);
}

#endif

// y += weights[0] * rows[0] + ..., one addition after the other, y exchanged; n columns, groups of 64 or 128.
template <int group, int R>
inline void add_nibbles(const Quantized* rows, const float* weights, int32_t dtype, int64_t n, float* y,
                        const Quantized* next) {
    constexpr int columns = group * kGroups;
    int64_t part = dtype == FS_F32 ? 4 : 2;
    EightGroups parts[R];
    for (int64_t first = 0; first < n; first += columns) {
        int64_t end = least(first + columns, n);
        for (int r = 0; r < R; r++) {
            parts[r].load_from(rows[r], dtype, first / group, int((end - first) / group));
            prefetch_stretch<columns / 2>(next[r].words + first / 2);
            prefetch(next[r].scales + first / group * part);
            prefetch(next[r].biases + first / group * part);
        }
        for (int64_t k = first; k < end; k += 64) add_columns<R>(rows, parts, weights, k / 2, (k - first) / group, y + k);
    }
}

inline Quantized quantized_down(const Down& job, int64_t j, int64_t begin) {
    const Format& f = job.format;
    const uint8_t* p = job.base + job.offsets[j] + job.record->down;
    int64_t skip = begin / f.group * (f.scale_dtype == FS_F32 ? 4 : 2);
    return {p + begin / 2, p + f.data_bytes + skip, p + f.data_bytes + f.scale_bytes + skip};
}

template <int group>
void nibbles_one_token(const Down& job, int64_t begin, int64_t n, float* y) {
    exchange(job.y + begin, n, false, y);
    int64_t j = 0;
    Weighted now(job, &j), next = now;
    for (; now.count == 4; now = next) {
        next = Weighted(job, &j);
        Quantized rows[4], ahead[4];
        for (int r = 0; r < 4; r++) {
            rows[r] = quantized_down(job, now.j[r], begin);
            ahead[r] = quantized_down(job, next.j[r], begin);
        }
        add_nibbles<group, 4>(rows, now.weights, job.format.scale_dtype, n, y, ahead);
    }
    for (int r = 0; r < now.count; r++) {
        Quantized row = quantized_down(job, now.j[r], begin);
        add_nibbles<group, 1>(&row, now.weights + r, job.format.scale_dtype, n, y, &row);
    }
    exchange(y, n, true, job.y + begin);
}

template <class Row>
void down_one_token(const Down& job, int64_t begin, int64_t n) {
    int64_t step = step_of(job.format, n), j = 0;
    Weighted now(job, &j), next = now;
    for (; now.count == 4; now = next) {
        next = Weighted(job, &j);
        Row rows[4];
        const uint8_t* ahead[4];
        for (int r = 0; r < 4; r++) {
            rows[r] = down_row<Row>(job, now.j[r], begin);
            ahead[r] = job.base + job.offsets[next.j[r]] + job.record->down + Row::bytes(begin);
        }
        weighted<4>(rows, now.weights, n, step, job.y + begin, ahead);
    }
    for (int r = 0; r < now.count; r++) {
        Row row = down_row<Row>(job, now.j[r], begin);
        weighted<1>(&row, now.weights + r, n, step, job.y + begin);
    }
}

template <class Row>
void down_many_tokens(const Down& job, int64_t begin, int64_t n, float* scratch) {
    for (int64_t first = 0; first < job.n; first += kDownBlock) {
        int count = int(least(kDownBlock, job.n - first));
        for (int k = 0; k < count; k++)
            decode_row(down_row<Row>(job, first + k, begin), n, step_of(job.format, n), scratch + k * n);
        for (int64_t t = 0; t < job.tokens; t++) {
            RowF32 rows[kDownBlock];
            float weights[kDownBlock];
            int used = 0;
            for (int k = 0; k < count; k++) {
                float weight = job.hidden[t * job.ldh + job.cols[first + k]];
                if (weight != 0.0f) weights[used] = weight, rows[used++].p = scratch + k * n;
            }
            weighted_many<4>(rows, weights, used, n, most(n, 16), job.y + t * job.format.columns + begin);
        }
    }
}

void down(const void* context, int64_t task, float* scratch) {
    const Down& job = *(const Down*)context;
    int64_t begin = task * job.columns_per_task;
    int64_t n = least(job.columns_per_task, job.format.columns - begin);
    if (job.tokens == 1 && job.format.dtype == FS_Q4 && job.format.group == 64) return nibbles_one_token<64>(job, begin, n, scratch);
    if (job.tokens == 1 && job.format.dtype == FS_Q4 && job.format.group == 128) return nibbles_one_token<128>(job, begin, n, scratch);
    with_row(job.format.dtype, [&](auto type) {
        using Row = decltype(type);
        if (job.tokens == 1) down_one_token<Row>(job, begin, n);
        else down_many_tokens<Row>(job, begin, n, scratch);
    });
}

}  // namespace
