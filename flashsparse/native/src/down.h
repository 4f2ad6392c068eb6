// The sparse FFN's down sums over records, as tasks of some columns. Part of kernels.cpp, compiled with it per variant.
#pragma once

#include "fixed.h"

namespace {

using namespace fs;

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
