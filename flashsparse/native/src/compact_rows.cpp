// Which rows of a gate may be active, from a copy of 8 + 4 bits: scores, their error bounds (docs/exact.md derives them)
// and the decision. Compiled once per instruction set, as kernels.cpp is; no standard library templates here.
#include "compact.h"

#include <math.h>

#include "rows.h"
#include "score_sums.h"

namespace {

using namespace fs;

// --- a token ----------------------------------------------------------------------------------------------------

// x ~ step * q with step = max |x| / 32767. NaN or Inf, or a step that would be subnormal: q is zero, the norms say it.
void input_group(const float* x, int64_t count, double rounding, int64_t g, int16_t* q, const CopyInput& in) {
    uint32_t top = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t magnitude = to_bits(x[i]) & 0x7fffffff;
        top = magnitude > top ? magnitude : top;
    }
    float step = from_bits(top) / 32767.0f;
    if (top >= 0x7f800000 || step < from_bits(0x00800000)) {
        float norm = top >= 0x7f800000 ? from_bits(0x7f800000) : 8.0f * from_bits(top);
        in.steps[g] = 0.0f, in.sums[g] = 0, in.norms[g] = norm, in.bounds[g] = 2.0f * norm;
        return;
    }
    float rest[kGroup] = {0};
    int32_t sum = 0;
    int64_t squares = 0;
    for (int64_t i = 0; i < count; i++) {
        float ratio = x[i] / step, rounded = (ratio + 12582912.0f) - 12582912.0f;  // half to even
        q[i] = int16_t(rounded), rest[i] = ratio - rounded;
    }
    double left = 0.0;
    for (int64_t i = 0; i < count; i++) {
        sum += q[i], squares += int64_t(q[i]) * q[i];
        left += double(rest[i]) * double(rest[i]);
    }
    double remainder = sqrt(left), norm = sqrt(double(squares)) + remainder;
    in.steps[g] = step, in.sums[g] = sum;
    in.norms[g] = float(norm * step), in.bounds[g] = float((remainder + rounding * norm) * step);
}

void input(const fs_compact& copy, const float* x, double rounding, int64_t token, const CopyInput& all) {
    int64_t groups = padded_groups(copy), at = token * groups;
    CopyInput in{all.q + at * kGroup, all.sums + at,   all.steps + at,
                 all.norms + at,      all.bounds + at, all.tiny + token};
    bool zero_token = true;
    for (int64_t g = 0; g * kGroup < copy.cols; g++) {
        int64_t first = g * kGroup;
        input_group(x + first, least(copy.cols - first, kGroup), rounding, g, in.q + first, in);
        zero_token = zero_token && in.norms[g] == 0.0f;
    }
    *in.tiny = zero_token ? 0.0 : double(copy.cols + 4096 * groups) * 0x1p-149;
}

// --- exact sums of a group's products ---------------------------------------------------------------------------

#if defined(FS_AVX2)

ALWAYS_INLINE __m256i products(__m256i weights, const int16_t* q) {
    return _mm256_madd_epi16(weights, _mm256_loadu_si256((const __m256i*)q));
}

ALWAYS_INLINE __m256i high_lanes(const int8_t* w, const int16_t* q) {
    __m256i total = _mm256_setzero_si256();
    for (int i = 0; i < kGroup; i += 16) {
        __m256i weights = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + i)));
        total = _mm256_add_epi32(total, products(weights, q + i));
    }
    return total;
}

ALWAYS_INLINE __m256i low_lanes(const uint8_t* w, const int16_t* q) {  // byte i: columns i and 32 + i
    __m256i total = _mm256_setzero_si256(), mask = _mm256_set1_epi16(15);
    for (int i = 0; i < 32; i += 16) {
        __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(w + i)));
        total = _mm256_add_epi32(total, products(_mm256_and_si256(bytes, mask), q + i));
        total = _mm256_add_epi32(total, products(_mm256_srli_epi16(bytes, 4), q + 32 + i));
    }
    return total;
}

ALWAYS_INLINE V high_sums(const int8_t* w, const int16_t* q) {
    auto at = [=](int g) ALWAYS_INLINE_LAMBDA { return high_lanes(w + g * kGroup, q + g * kGroup); };
    return _mm256_cvtepi32_ps(sums_of_eight<1 << 20>(at));
}

ALWAYS_INLINE V low_sums(const uint8_t* w, const int16_t* q, const int32_t* sums) {
    auto at = [=](int g) ALWAYS_INLINE_LAMBDA { return low_lanes(w + g * kGroup / 2, q + g * kGroup); };
    __m256i eights = _mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)sums), 3);
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(sums_of_eight<1 << 20>(at), eights));
}

#else

inline V high_sums(const int8_t* w, const int16_t* q) {
    float out[kSide];
    for (int g = 0; g < kSide; g++) {
        int32_t total = 0;
        for (int i = 0; i < kGroup; i++) total += int32_t(w[g * kGroup + i]) * int32_t(q[g * kGroup + i]);
        out[g] = float(total);
    }
    return load(out);
}

inline V low_sums(const uint8_t* w, const int16_t* q, const int32_t* sums) {
    float out[kSide];
    for (int g = 0; g < kSide; g++, w += kGroup / 2, q += kGroup) {
        int32_t total = 0;
        for (int i = 0; i < kGroup / 2; i++) total += int32_t(w[i] & 15) * q[i] + int32_t(w[i] >> 4) * q[kGroup / 2 + i];
        out[g] = float(total - 8 * sums[g]);
    }
    return load(out);
}

#endif

// --- a row ------------------------------------------------------------------------------------------------------

struct Sums {
    V score = zero(), norms = zero(), bounds = zero();
};

struct Row {
    const int8_t* high;
    const uint8_t* low;
    const uint16_t* scales;
    const float* errors;
    int64_t groups;
};

inline Row row_of(const fs_compact& copy, int64_t row) {
    int64_t groups = groups_of(copy);
    return {copy.high + row * groups * kGroup, copy.low + row * groups * kGroup / 2, copy.scales + row * groups,
            copy.errors + 3 * row, groups};
}

inline CopyInput token_of(const Candidates& job, int64_t token) {
    int64_t at = token * padded_groups(*job.copy);
    const CopyInput& in = job.input;
    return {in.q + at * kGroup, in.sums + at, in.steps + at, in.norms + at, in.bounds + at, in.tiny + token};
}

ALWAYS_INLINE void add_high(Sums& sums, const int8_t* high, V scale, const CopyInput& in, int64_t g) {
    sums.score = add(sums.score, mul(mul(scale, high_sums(high, in.q + g * kGroup)), load(in.steps + g)));
    sums.norms = add(sums.norms, mul(scale, load(in.norms + g)));
    sums.bounds = add(sums.bounds, mul(scale, load(in.bounds + g)));
}

// The last groups, fewer than eight, with zeros behind them.
template <class T>
struct Tail {
    T values[kSide * kGroup * sizeof(T)] = {0};
    uint16_t scales[kSide] = {0};
    Tail(const T* from, const uint16_t* scale, int64_t count, int64_t values_of_a_group) {
        memcpy(values, from, size_t(count * values_of_a_group) * sizeof(T));
        memcpy(scales, scale, size_t(count) * 2);
    }
};

// R rows side by side: as many streams from memory. The rows R further on are fetched meanwhile.
template <int R>
void high_pass(const Row* rows, const CopyInput& in, Sums* sums) {
    int64_t g = 0, groups = rows[0].groups;
    Sums total[R];
    for (; g + kSide <= groups; g += kSide) {
        for (int r = 0; r < R; r++) {
            prefetch_stretch<kSide * kGroup>((const uint8_t*)rows[r].high + (R * groups + g) * kGroup);
            add_high(total[r], rows[r].high + g * kGroup, load_bf16(rows[r].scales + g), in, g);
        }
    }
    for (int r = 0; r < R; r++) {
        if (g < groups) {
            Tail<int8_t> tail(rows[r].high + g * kGroup, rows[r].scales + g, groups - g, kGroup);
            add_high(total[r], tail.values, load_bf16(tail.scales), in, g);
        }
        sums[r] = total[r];
    }
}

ALWAYS_INLINE V low_terms(const uint8_t* low, V scale, const CopyInput& in, int64_t g) {
    return mul(mul(scale, low_sums(low, in.q + g * kGroup, in.sums + g)), load(in.steps + g));
}

float low_pass(const Row& row, const CopyInput& in) {
    V total = zero();
    int64_t g = 0;
    for (; g + kSide <= row.groups; g += kSide)
        total = add(total, low_terms(row.low + g * kGroup / 2, load_bf16(row.scales + g), in, g));
    if (g < row.groups) {
        Tail<uint8_t> tail(row.low + g * kGroup / 2, row.scales + g, row.groups - g, kGroup / 2);
        total = add(total, low_terms(tail.values, load_bf16(tail.scales), in, g));
    }
    return sum(total) * 0.0625f;
}

enum Verdict : uint8_t { kOut = 0, kCandidate = 1, kOpen = 2 };

// What the high bits tell of a row, and what is left to compare when they leave it open: the row's score with the low
// bits' share, `partial` + share, against `room`.
struct Judged {
    Verdict verdict;
    double partial, room;
};

Judged judge(const Candidates& job, const Row& row, int64_t number, const CopyInput& in, const Sums& sums) {
    double norms = sum(sums.norms), rounding = double(row.errors[2]) * sum(sums.bounds);
    double magnitude = double(row.errors[2]) * norms;
    if (!(magnitude < 0x1p126)) return {kCandidate, 0.0, 0.0};  // sums may overflow, or something is not finite
    double score = double(sum(sums.score)) + (job.copy->bias ? double(job.copy->bias[number]) : 0.0);
    double tiny = row.errors[2] == 0.0f ? 0.0 : *in.tiny;  // a row of zeros has none
    double coarse = (double(row.errors[0]) * norms + rounding) * job.slack + tiny;
    double fine = (double(row.errors[1]) * norms + rounding) * job.slack + tiny;
    if (score + coarse <= job.limit) return {kOut, 0.0, 0.0};
    if (score - coarse > job.limit) return {kCandidate, 0.0, 0.0};
    return {kOpen, score, job.limit - fine};
}

inline bool refine(const Row& row, const CopyInput& in, const Judged& open) {
    return !(open.partial + double(low_pass(row, in)) <= open.room);
}

constexpr int kRows = 4;         // rows side by side
constexpr int64_t kBatch = 32;  // rows of one token whose low bits are fetched while others are judged

// What one token's rows leave open, until it is looked at again.
struct Opened {
    int64_t rows[kBatch], count = 0;
    Judged judged[kBatch];
};

template <int R>
void judge_rows(const Candidates& job, int64_t first, const CopyInput& in, Opened& opened) {
    Row rows[R];
    Sums sums[R];
    for (int r = 0; r < R; r++) rows[r] = row_of(*job.copy, first + r);
    high_pass<R>(rows, in, sums);
    for (int r = 0; r < R; r++) {
        Judged judged = judge(job, rows[r], first + r, in, sums[r]);
        job.mask[first + r] = judged.verdict == kCandidate;
        if (judged.verdict != kOpen) continue;
        for (int64_t i = 0; i < rows[r].groups * kGroup / 2; i += 64) __builtin_prefetch(rows[r].low + i);
        opened.rows[opened.count] = first + r, opened.judged[opened.count++] = judged;
    }
}

int64_t one_token(const Candidates& job, int64_t row, int64_t end) {
    Opened opened;
    CopyInput in = token_of(job, 0);
    for (; row + kRows <= end; row += kRows) judge_rows<kRows>(job, row, in, opened);
    for (; row < end; row++) judge_rows<1>(job, row, in, opened);
    for (int64_t i = 0; i < opened.count; i++)
        job.mask[opened.rows[i]] = refine(row_of(*job.copy, opened.rows[i]), in, opened.judged[i]);
    return opened.count;
}

int64_t many_tokens(const Candidates& job, int64_t first, int64_t end) {
    int64_t refined = 0;
    for (int64_t r = first; r < end; r++) {
        Row row = row_of(*job.copy, r);
        for (int64_t t = 0; t < job.tokens; t++) {
            CopyInput in = token_of(job, t);
            Sums sums;
            high_pass<1>(&row, in, &sums);
            Judged judged = judge(job, row, r, in, sums);
            bool open = judged.verdict == kOpen;
            job.mask[t * job.copy->rows + r] = open ? refine(row, in, judged) : judged.verdict == kCandidate;
            refined += open;
        }
    }
    return refined;
}

void candidates(const void* context, int64_t task, float*) {
    const Candidates& job = *(const Candidates*)context;
    int64_t row = task * job.rows_per_task, end = least(row + job.rows_per_task, job.copy->rows), refined = 0;
    if (job.tokens > 1) refined = many_tokens(job, row, end);
    else
        for (; row < end; row += kBatch) refined += one_token(job, row, least(row + kBatch, end));
    if (job.refined) __atomic_fetch_add(job.refined, refined, __ATOMIC_RELAXED);
}

}  // namespace

#if defined(FS_AVX2)
const fs::CompactKernels fs::avx2_compact = {input, candidates};
#else
const fs::CompactKernels fs::portable_compact = {input, candidates};
#endif
