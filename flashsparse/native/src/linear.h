// Products with a stored matrix, as tasks of some rows: one token, or many. Part of kernels.cpp, compiled with it per variant.
// Many tokens go in blocks through tiles of rows and tokens whose sums stay in registers, with plain floats over a chunk of
// columns; between chunks they wait in memory, so that the order is the one of a single row and token.
#pragma once

#include "fixed.h"

namespace {

using namespace fs;

constexpr int kTileTokens = 4;
constexpr int kTileRows = 2;

inline void put(const Linear& job, int64_t row, int64_t token, float value) {
    job.y[token * job.w->rows + row] = job.bias ? value + job.bias[row] : value;
}

template <int R>
inline void addresses_ahead(const Linear& job, int64_t row, const uint8_t** ahead) {
    for (int r = 0; r < R; r++) ahead[r] = bytes_at(job.w->data, least(row + R + r, job.w->rows - 1) * job.format.data_bytes);
}

// --- plain floats -----------------------------------------------------------------------------------------------

template <class Row>
Row matrix_row(const Linear& job, int64_t r) {
    Row row;
    bind(row, job.format, bytes_at(job.w->data, r * job.format.data_bytes), nullptr, nullptr);
    return row;
}

template <int R, class Row>
void float_one_token(const Linear& job, int64_t row) {
    Row rows[R];
    const uint8_t* ahead[R];
    float out[R];
    for (int r = 0; r < R; r++) rows[r] = matrix_row<Row>(job, row + r);
    addresses_ahead<R>(job, row, ahead);
    dots<R, 1>(rows, &job.x, job.format.columns, out, ahead);
    for (int r = 0; r < R; r++) put(job, row + r, 0, out[r]);
}

// Adds rows . x over one chunk to the tile's sums, which are `stride` vectors of eight apart from row to row.
template <int R, int C>
inline void add_tile(const float* const* rows, const float* const* x, int64_t n, float* waiting, int64_t stride) {
    V sums[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sums[r][c] = load(waiting + 8 * (r * stride + c));
    for (int64_t k = 0; k < n; k += 8) {
        V w[R];
        for (int r = 0; r < R; r++) w[r] = load(rows[r] + k);
        for (int c = 0; c < C; c++) {
            V values = load(x[c] + k);
            for (int r = 0; r < R; r++) sums[r][c] = madd(w[r], values, sums[r][c]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(waiting + 8 * (r * stride + c), sums[r][c]);
}

// One chunk: `count` rows and C tokens, each kChunk apart, n columns.
template <int C>
inline void add_token_tile(const float* rows, int count, const float* x, int64_t n, float* waiting) {
    const float* tokens[C];
    for (int c = 0; c < C; c++) tokens[c] = x + c * kChunk;
    int r = 0;
    for (; r + 3 <= count; r += 3) {
        const float* three[3] = {rows + r * kChunk, rows + (r + 1) * kChunk, rows + (r + 2) * kChunk};
        add_tile<3, C>(three, tokens, n, waiting + 8 * r * kPackedTokens, kPackedTokens);
    }
    for (; r < count; r++) {
        const float* one = rows + r * kChunk;
        add_tile<1, C>(&one, tokens, n, waiting + 8 * r * kPackedTokens, kPackedTokens);
    }
}

// Decodes a chunk of a row, filled up with zeros to a multiple of eight.
template <class Row>
inline void decode_chunk(Row row, int64_t first, int64_t n, float* out) {
    int64_t whole = n / 8 * 8;
    for (int64_t k = 0; k < whole; k += 8) store(out + k, row.at(first + k));
    if (whole < n) store(out + whole, zero());
    for (int64_t k = whole; k < n; k++) out[k] = row.one(first + k);
}

// All of the job's tokens, at most kPackedTokens; scratch: the decoded chunk, then the sums [kPanel, kPackedTokens, 8].
template <class Row>
void float_block(const Linear& job, int64_t row, int count, float* scratch) {
    float* waiting = scratch + kPanel * kChunk;
    int64_t columns = job.format.columns, tokens = job.tokens;
    memset(waiting, 0, sizeof(float) * size_t(kPanel * kPackedTokens * 8));
    for (int64_t first = 0; first < columns; first += kChunk) {
        int64_t n = least(kChunk, columns - first), padded = (n + 7) / 8 * 8, t = 0;
        const float* x = job.packed + first * tokens;
        for (int r = 0; r < count; r++) decode_chunk(matrix_row<Row>(job, row + r), first, n, scratch + r * kChunk);
        for (; t + kTileTokens <= tokens; t += kTileTokens)
            add_token_tile<kTileTokens>(scratch, count, x + t * kChunk, padded, waiting + 8 * t);
        for (; t < tokens; t++) add_token_tile<1>(scratch, count, x + t * kChunk, padded, waiting + 8 * t);
    }
    for (int r = 0; r < count; r++)
        for (int64_t t = 0; t < tokens; t++) put(job, row + r, t, sum(load(waiting + 8 * (r * kPackedTokens + t))));
}

template <class Row>
void float_rows(const Linear& job, int64_t row, int64_t end, float* scratch) {
    if (job.tokens > 1) {
        for (; row < end; row += kPanel)
            float_block<Row>(job, row, int(least(kPanel, end - row)), scratch);
        return;
    }
    for (; row + 4 <= end; row += 4) float_one_token<4, Row>(job, row);
    for (; row < end; row++) float_one_token<1, Row>(job, row);
}

// --- quantized --------------------------------------------------------------------------------------------------

inline Quantized quantized_row(const Linear& job, int64_t r) {
    int64_t parts = r * job.format.scale_bytes;
    return {bytes_at(job.w->data, r * job.format.data_bytes), bytes_at(job.w->scales, parts), bytes_at(job.w->biases, parts)};
}

template <int bits, int group, int R>
void fixed_one_token(const Linear& job, int64_t row) {
    Quantized rows[R];
    const uint8_t* ahead[R];
    float out[R];
    for (int r = 0; r < R; r++) rows[r] = quantized_row(job, row + r);
    addresses_ahead<R>(job, row, ahead);
    FixedToken x = fixed_token<bits, group>(job.fixed, 0);
    fixed_dots<bits, group, R, 1>(rows, job.format, &x, out, ahead);
    for (int r = 0; r < R; r++) put(job, row + r, 0, out[r]);
}

// R rows side by side read the tokens' digits once, which no L1 cache holds.
template <int bits, int group, int R, int C>
void fixed_tile(const Linear& job, int64_t row, int64_t token, const FixedToken* x) {
    Quantized rows[R];
    float out[R * C];
    for (int r = 0; r < R; r++) rows[r] = quantized_row(job, row + r);
    fixed_dots<bits, group, R, C>(rows, job.format, x, out);
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) put(job, row + r, token + c, out[r * C + c]);
}

template <int bits, int group, int C>
void fixed_tokens(const Linear& job, int64_t row, int64_t end, int64_t token) {
    FixedToken x[C];
    for (int c = 0; c < C; c++) x[c] = fixed_token<bits, group>(job.fixed, token + c);
    for (; row + kTileRows <= end; row += kTileRows) fixed_tile<bits, group, kTileRows, C>(job, row, token, x);
    for (; row < end; row++) fixed_tile<bits, group, 1, C>(job, row, token, x);
}

template <int bits, int group>
void fixed_rows(const Linear& job, int64_t row, int64_t end) {
    if (job.tokens > 1) {
        int64_t token = 0;
        for (; token + kTileTokens <= job.tokens; token += kTileTokens) fixed_tokens<bits, group, kTileTokens>(job, row, end, token);
        for (; token < job.tokens; token++) fixed_tokens<bits, group, 1>(job, row, end, token);
        return;
    }
    for (; row + 4 <= end; row += 4) fixed_one_token<bits, group, 4>(job, row);
    for (; row < end; row++) fixed_one_token<bits, group, 1>(job, row);
}

void linear(const void* context, int64_t task, float* scratch) {
    const Linear& job = *(const Linear*)context;
    int64_t row = task * job.rows_per_task, end = least(row + job.rows_per_task, job.w->rows);
    if (job.format.group) {
        with_fixed(job.format, [&](auto bits, auto group) {
            fixed_rows<decltype(bits)::value, decltype(group)::value>(job, row, end);
        });
        return;
    }
    with_float(job.format.dtype, [&](auto type) { float_rows<decltype(type)>(job, row, end, scratch); });
}

}  // namespace
