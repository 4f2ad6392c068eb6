// The kernels of one variant, over tasks of a job. Compiled once per instruction set with FS_TABLE naming the table.
// No standard library templates here: their out-of-line copies would be shared with code for other machines.
#include "activation.h"
#include "attention.h"
#include "rows.h"
#include "score.h"

namespace {

using namespace fs;

// --- linear: one task is a block of rows ------------------------------------------------------------------------

template <class Row>
Row matrix_row(const Linear& job, int64_t r) {
    const fs_matrix& w = *job.w;
    const Format& f = job.format;
    Row row;
    bind(row, f, bytes_at(w.data, r * f.data_bytes), bytes_at(w.scales, r * f.scale_bytes),
         bytes_at(w.biases, r * f.scale_bytes));
    return row;
}

inline void put(const Linear& job, int64_t row, int64_t token, float value) {
    job.y[token * job.w->rows + row] = job.bias ? value + job.bias[row] : value;
}

template <int R, class Row>
void linear_one_token(const Linear& job, int64_t row, int64_t last) {
    Row rows[R];
    const uint8_t* ahead[R];
    float out[R];
    for (int r = 0; r < R; r++) {
        rows[r] = matrix_row<Row>(job, row + r);
        ahead[r] = bytes_at(job.w->data, least(row + R + r, last) * job.format.data_bytes);
    }
    dots<R, 1>(rows, &job.x, job.format.columns, step_of(job.format, job.format.columns), out, ahead);
    for (int r = 0; r < R; r++) put(job, row + r, 0, out[r]);
}

template <int R, int C>
void linear_tile(const Linear& job, const RowF32* rows, int64_t row, int64_t token) {
    int64_t n = job.format.columns;
    const float* x[C];
    float out[R * C];
    for (int c = 0; c < C; c++) x[c] = job.x + (token + c) * n;
    dots<R, C>(rows, x, n, most(n, 16), out);
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) put(job, row + r, token + c, out[r * C + c]);
}

template <int C>
void linear_token_tile(const Linear& job, const RowF32* rows, int count, int64_t row, int64_t token) {
    int r = 0;
    for (; r + 2 <= count; r += 2) linear_tile<2, C>(job, rows + r, row + r, token);
    if (r < count) linear_tile<1, C>(job, rows + r, row + r, token);
}

template <class Row>
void linear_many_tokens(const Linear& job, int64_t row, int count, float* scratch) {
    RowF32 rows[kRowBlock];
    int64_t n = job.format.columns;
    for (int r = 0; r < count; r++) {
        decode_row(matrix_row<Row>(job, row + r), n, step_of(job.format, n), scratch + r * n);
        rows[r].p = scratch + r * n;
    }
    int64_t token = 0;
    for (; token + 3 <= job.tokens; token += 3) linear_token_tile<3>(job, rows, count, row, token);
    for (; token < job.tokens; token++) linear_token_tile<1>(job, rows, count, row, token);
}

template <class Row>
void linear_rows(const Linear& job, int64_t row, int64_t end, float* scratch) {
    if (job.tokens > 1) {
        for (; row < end; row += kRowBlock)
            linear_many_tokens<Row>(job, row, int(least(kRowBlock, end - row)), scratch);
        return;
    }
    for (; row + 4 <= end; row += 4) linear_one_token<4, Row>(job, row, job.w->rows - 1);
    for (; row < end; row++) linear_one_token<1, Row>(job, row, job.w->rows - 1);
}

void linear(const void* context, int64_t task, float* scratch) {
    const Linear& job = *(const Linear*)context;
    int64_t row = task * job.rows_per_task;
    with_row(job.format.dtype, [&](auto type) {
        linear_rows<decltype(type)>(job, row, least(row + job.rows_per_task, job.w->rows), scratch);
    });
}

// --- hidden: one task is a block of records ---------------------------------------------------------------------

inline float field_value(const Hidden& job, int64_t j, int64_t field) {
    if (field < 0) return 0.0f;
    int32_t dtype = job.format.group ? job.format.scale_dtype : job.format.dtype;
    return float_at(job.base + job.offsets[j] + field, dtype, 0);
}

template <class Row>
Row record_row(const Hidden& job, int64_t j, int64_t at) {
    return field<Row>(job.format, job.base + job.offsets[j] + at);
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

// out[k] = field `at` of records j[0..count) . x, for one token.
template <class Row>
void record_dots(const Hidden& job, const int64_t* j, int count, int64_t at, float* out) {
    int64_t n = job.format.columns, step = step_of(job.format, n);
    Row rows[4];
    const uint8_t* ahead[4];
    int k = 0;
    for (; k + 4 <= count; k += 4) {
        for (int r = 0; r < 4; r++) {
            rows[r] = record_row<Row>(job, j[k + r], at);
            ahead[r] = job.base + job.offsets[least(j[k + r] + 4, job.n - 1)] + at;
        }
        dots<4, 1>(rows, &job.x, n, step, out + k, ahead);
    }
    for (; k < count; k++) {
        rows[0] = record_row<Row>(job, j[k], at);
        dots<1, 1>(rows, &job.x, n, step, out + k);
    }
}

template <class Row>
void hidden_one_token(const Hidden& job, int64_t first, int count) {
    const fs_record& record = *job.record;
    float gate[kRowBlock], up[kRowBlock];
    int64_t chosen[kRowBlock] = {0}, active[kRowBlock] = {0};
    int kept = 0, used = 0;
    for (int64_t j = first; j < first + count; j++) {
        job.hidden[job.cols[j]] = 0.0f;
        if (wanted(job, j, 0)) chosen[kept++] = j;
    }
    if (job.activated) {
        for (int k = 0; k < kept; k++) gate[k] = job.activated[job.ids[chosen[k]]];
    } else {
        Score score(record);
        record_dots<Row>(job, chosen, kept, score.row, gate);
        for (int k = 0; k < kept; k++)
            gate[k] = activate(gate[k] + field_value(job, chosen[k], score.bias), record.activation, record.param);
    }
    for (int k = 0; k < kept; k++) {
        if (gate[k] == 0.0f) continue;
        job.hidden[job.cols[chosen[k]]] = gate[k];
        active[used++] = chosen[k];
    }
    if (!record.gated) return;
    record_dots<Row>(job, active, used, record.up, up);
    for (int k = 0; k < used; k++) {
        float* value = job.hidden + job.cols[active[k]];
        *value = finish(job, *value, up[k] + field_value(job, active[k], record.up_bias));
    }
}

constexpr int kTokenBlock = 16;

// out[i] = row . x[tokens[i]]
inline void token_dots(const Hidden& job, RowF32 row, const int64_t* tokens, int count, float* out) {
    int64_t n = job.format.columns;
    const float* x[kTokenBlock];
    for (int i = 0; i < count; i++) x[i] = job.x + tokens[i] * n;
    int i = 0;
    for (; i + 4 <= count; i += 4) dots<1, 4>(&row, x + i, n, most(n, 16), out + i);
    for (; i < count; i++) dots<1, 1>(&row, x + i, n, most(n, 16), out + i);
}

// Replaces gate[t] by the hidden value for the `count` tokens of one record; `up` is its decoded up row.
inline void apply_up(const Hidden& job, int64_t j, RowF32 up, int64_t token, int count, float* gate) {
    int64_t active[kTokenBlock];
    float values[kTokenBlock];
    int used = 0;
    for (int t = 0; t < count; t++)
        if (gate[t] != 0.0f) active[used++] = token + t;
    token_dots(job, up, active, used, values);
    float bias = field_value(job, j, job.record->up_bias);
    for (int i = 0; i < used; i++) {
        float& value = gate[active[i] - token];
        value = finish(job, value, values[i] + bias);
    }
}

inline void gates_of(const Hidden& job, int64_t j, RowF32 row, int64_t token, int count, float* gate) {
    int64_t tokens[kTokenBlock];
    float values[kTokenBlock];
    int used = 0;
    for (int64_t t = token; t < token + count; t++) {
        gate[t - token] = 0.0f;
        if (wanted(job, j, t)) tokens[used++] = t;
    }
    if (job.activated) {
        for (int i = 0; i < used; i++) gate[tokens[i] - token] = job.activated[tokens[i] * job.neurons + job.ids[j]];
        return;
    }
    token_dots(job, row, tokens, used, values);
    float bias = field_value(job, j, Score(*job.record).bias);
    for (int i = 0; i < used; i++)
        gate[tokens[i] - token] = activate(values[i] + bias, job.record->activation, job.record->param);
}

template <class Row>
void hidden_many_tokens(const Hidden& job, int64_t first, int count, float* scratch) {
    int64_t n = job.format.columns;
    bool gated = job.record->gated;
    RowF32 score[kRowBlock], up[kRowBlock];
    for (int k = 0; k < count; k++) {
        score[k].p = scratch + (2 * k) * n, up[k].p = scratch + (2 * k + 1) * n;
        if (!job.activated)
            decode_row(record_row<Row>(job, first + k, Score(*job.record).row), n, step_of(job.format, n), scratch + 2 * k * n);
        if (gated)
            decode_row(record_row<Row>(job, first + k, job.record->up), n, step_of(job.format, n), scratch + (2 * k + 1) * n);
    }
    for (int64_t token = 0; token < job.tokens; token += kTokenBlock) {
        int block = int(least(kTokenBlock, job.tokens - token));
        for (int k = 0; k < count; k++) {
            float gate[kTokenBlock];
            gates_of(job, first + k, score[k], token, block, gate);
            if (gated) apply_up(job, first + k, up[k], token, block, gate);
            for (int t = 0; t < block; t++)
                job.hidden[(token + t) * job.ldh + job.cols[first + k]] = gate[t] == 0.0f ? 0.0f : gate[t];
        }
    }
}

void hidden(const void* context, int64_t task, float* scratch) {
    const Hidden& job = *(const Hidden*)context;
    int64_t first = task * kRowBlock;
    int count = int(least(kRowBlock, job.n - first));
    with_row(job.format.dtype, [&](auto type) {
        using Row = decltype(type);
        if (job.tokens == 1) hidden_one_token<Row>(job, first, count);
        else hidden_many_tokens<Row>(job, first, count, scratch);
    });
}

// --- down: one task is a block of columns -----------------------------------------------------------------------

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

template <class Row>
void down_one_token(const Down& job, int64_t begin, int64_t n) {
    int64_t step = step_of(job.format, n);
    Row rows[4];
    const uint8_t* ahead[4];
    float weights[4];
    int used = 0;
    for (int64_t j = 0; j < job.n; j++) {
        float weight = job.hidden[job.cols[j]];
        if (weight == 0.0f) continue;
        weights[used] = weight;
        rows[used] = down_row<Row>(job, j, begin);
        ahead[used++] = job.base + job.offsets[least(j + 4, job.n - 1)] + job.record->down + Row::bytes(begin);
        if (used < 4) continue;
        weighted<4>(rows, weights, n, step, job.y + begin, ahead);
        used = 0;
    }
    weighted_many(rows, weights, used, n, step, job.y + begin);
}

template <class Row>
void down_many_tokens(const Down& job, int64_t begin, int64_t n, float* scratch) {
    for (int64_t first = 0; first < job.n; first += kRowBlock) {
        int count = int(least(kRowBlock, job.n - first));
        for (int k = 0; k < count; k++)
            decode_row(down_row<Row>(job, first + k, begin), n, step_of(job.format, n), scratch + k * n);
        for (int64_t t = 0; t < job.tokens; t++) {
            RowF32 rows[kRowBlock];
            float weights[kRowBlock];
            int used = 0;
            for (int k = 0; k < count; k++) {
                float weight = job.hidden[t * job.ldh + job.cols[first + k]];
                if (weight != 0.0f) weights[used] = weight, rows[used++].p = scratch + k * n;
            }
            weighted_many(rows, weights, used, n, most(n, 16), job.y + t * job.format.columns + begin);
        }
    }
}

void down(const void* context, int64_t task, float* scratch) {
    const Down& job = *(const Down*)context;
    int64_t begin = task * job.columns_per_task;
    int64_t n = least(job.columns_per_task, job.format.columns - begin);
    with_row(job.format.dtype, [&](auto type) {
        using Row = decltype(type);
        if (job.tokens == 1) down_one_token<Row>(job, begin, n);
        else down_many_tokens<Row>(job, begin, n, scratch);
    });
}

// --- read: one task is a block of a buffer ---------------------------------------------------------------------

void read(const void* context, int64_t task, float*) {
    typedef uint64_t Words __attribute__((vector_size(32)));
    const Reading& job = *(const Reading*)context;
    const uint8_t* p = job.buffer + task * job.block_bytes;
    const uint8_t* end = job.buffer + least((task + 1) * job.block_bytes, job.bytes);
    Words sums[8] = {};
    for (; p < end; p += sizeof sums)
        for (int i = 0; i < 8; i++) {
            Words words;
            memcpy(&words, p + i * 32, 32);
            sums[i] ^= words;
        }
    for (int i = 1; i < 8; i++) sums[0] ^= sums[i];
    __atomic_fetch_xor(job.total, sums[0][0] ^ sums[0][1] ^ sums[0][2] ^ sums[0][3], __ATOMIC_RELAXED);
}

// --- rows in and out --------------------------------------------------------------------------------------------

void decode(const Format& f, const void* data, const void* scales, const void* biases, float* out) {
    with_row(f.dtype, [&](auto type) {
        bind(type, f, data, scales, biases);
        decode_row(type, f.columns, step_of(f, f.columns), out);
    });
}

void encode(const float* values, int64_t n, int32_t dtype, void* out) {
    if (dtype == FS_F32) {
        memcpy(out, values, size_t(n) * 4);
        return;
    }
    auto* halves = (uint16_t*)out;
    int64_t i = 0;
    if (dtype == FS_F16) {
        for (; i + 8 <= n; i += 8) store_f16(halves + i, load(values + i));
        for (; i < n; i++) halves[i] = f32_to_f16(values[i]);
    }
    for (; i < n; i++) halves[i] = f32_to_bf16(values[i]);
}

}  // namespace

#if defined(FS_AVX2)
const fs::Kernels fs::avx2_kernels = {"avx2", linear, hidden, down, attention, score, score_input, read, decode, encode};
#else
const fs::Kernels fs::portable_kernels = {"portable", linear, hidden, down, attention, score, score_input, read, decode, encode};
#endif
