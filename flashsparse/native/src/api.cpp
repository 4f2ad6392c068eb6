// The C interface of the kernels: chooses the variant, cuts a call into tasks, runs them on the workers.
// How a call is cut may depend on the number of threads; its result does not.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "activation.h"
#include "kernels.h"
#include "marks.h"
#include "numbers.h"
#include "timing.h"
#include "workers.h"

namespace {

using namespace fs;

bool runs(const Kernels* kernels) {
#if defined(FS_HAVE_AVX2)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (kernels == &avx2_kernels) return avx2;
#if defined(FS_HAVE_AVX512)
    if (kernels == &avx512_kernels)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
#endif
    return kernels == &portable_kernels;
}

// The best first.
constexpr const Kernels* kVariants[] = {
#if defined(FS_HAVE_AVX512)
    &avx512_kernels,
#endif
#if defined(FS_HAVE_AVX2)
    &avx2_kernels,
#endif
    &portable_kernels};

const Kernels* best() {
    for (const Kernels* kernels : kVariants)
        if (runs(kernels)) return kernels;
    return &portable_kernels;
}

std::atomic<const Kernels*>& chosen() {
    static std::atomic<const Kernels*> kernels{best()};
    return kernels;
}

int64_t float_bytes(int32_t dtype) { return dtype == FS_F32 ? 4 : 2; }

int64_t bits_of(int32_t dtype) {
    constexpr int64_t bits[] = {32, 16, 16, 8, 4, 1, 2, 3};
    return bits[dtype];
}

Format format_of(int64_t columns, int32_t dtype, int32_t scale_dtype, int32_t group) {
    if (dtype < FS_Q8) return {columns, dtype, dtype, 0, columns * float_bytes(dtype), 0};
    return {columns, dtype, scale_dtype, group, columns * bits_of(dtype) / 8, columns / group * float_bytes(scale_dtype)};
}

Format format_of(const fs_matrix& w) { return format_of(w.cols, w.dtype, w.scale_dtype, w.group_size); }
Format format_of(const fs_record& r) { return format_of(r.d, r.dtype, r.scale_dtype, r.group_size); }

constexpr int64_t kPageBytes = 4096;  // or a part of a page, where they are larger

int64_t pieces(int64_t total, int64_t size) { return (total + size - 1) / size; }
int64_t round_up(int64_t n, int64_t multiple) { return pieces(n, multiple) * multiple; }
int64_t between(int64_t low, int64_t n, int64_t high) { return n < low ? low : n > high ? high : n; }

// A block of tokens in fixed point, for quantized weights; nothing for others. Holds what `of` returns.
class FixedBlock {
  public:
    FixedBlock(const Format& format, int64_t tokens) : format_(format) {
        if (!format.group) return;
        // One more than needed: tokens a multiple of 4096 bytes apart would compete for the same cache lines.
        groups_ = round_up(format.columns / format.group, 8) + 1, bytes_ = chosen().load()->fixed_bytes(format);
        digits_.resize(size_t(tokens * groups_ * bytes_) + 64);
        parts_.resize(size_t(2 * tokens * groups_));
    }

    Fixed of(const float* x, int64_t tokens) {
        if (!format_.group) return {};
        float *steps = parts_.data(), *sums = steps + int64_t(parts_.size() / 2);
        // Loads that cross cache lines would cost a tenth of the products' speed.
        auto* digits = digits_.data() + (64 - reinterpret_cast<uintptr_t>(digits_.data()) % 64);
        for (int64_t t = 0; t < tokens; t++)
            chosen().load()->fix(format_, x + t * format_.columns, digits + t * groups_ * bytes_,
                                 steps + t * groups_, sums + t * groups_);
        return {digits, steps, sums, groups_};
    }

  private:
    Format format_;
    int64_t groups_ = 0, bytes_ = 0;
    std::vector<int8_t> digits_;
    std::vector<float> parts_;
};

// Several tokens for products with plain floats, by chunks of columns; see Linear.
std::vector<float> packed(const float* x, int64_t columns, int64_t tokens) {
    std::vector<float> out(size_t(tokens * round_up(columns, kChunk)));
    for (int64_t first = 0; first < columns; first += kChunk)
        for (int64_t t = 0; t < tokens; t++)
            memcpy(out.data() + first * tokens + t * kChunk, x + t * columns + first,
                   sizeof(float) * size_t(std::min<int64_t>(kChunk, columns - first)));
    return out;
}

constexpr int64_t kScoreTokens = 16;  // tokens that share a pass over a low-bit matrix; bounds their integer copies

// Waking a thread costs some microseconds: products smaller than this run on the caller.
bool small(int64_t rows, int64_t columns, int64_t tokens) { return rows * columns * tokens < 32768; }

// About 64 KiB of weights a task for one token, so that threads share the work evenly; row blocks for many tokens.
int64_t rows_per_task(const Format& f, int64_t rows, int64_t tokens) {
    if (small(rows, f.columns, tokens)) return rows > 0 ? rows : 1;
    if (tokens > 1) return kPanel;
    return round_up(between(4, 65536 / (f.data_bytes + 1), 1024), 4);
}

// Whole groups and cache lines; for one token a slice per thread, so that it passes over all records once, for many
// what leaves their sums in the L2 cache.
int64_t columns_per_task(const Format& f, int64_t n, int64_t tokens, int threads) {
    if (small(n, f.columns, tokens)) return f.columns;
    int64_t unit = f.group > 64 ? f.group : 64;
    return round_up(tokens > 1 ? 256 : pieces(f.columns, threads), unit);
}

}  // namespace

extern "C" {

int32_t fs_abi_version(void) { return FS_ABI_VERSION; }

const char* fs_isa(void) { return chosen().load()->name; }

int32_t fs_set_isa(const char* name) {
    for (const Kernels* kernels : kVariants) {
        if (strcmp(name, kernels->name) != 0 || !runs(kernels)) continue;
        chosen() = kernels;
        return 0;
    }
    return -1;
}

fs_workers* fs_workers_create(int32_t threads) {
    try {
        return new fs_workers(threads > 1 ? threads : 1);
    } catch (...) {
        return nullptr;
    }
}

void fs_workers_stop(fs_workers* workers) { workers->stop(); }
void fs_workers_destroy(fs_workers* workers) { delete workers; }

uint64_t fs_memory_read(fs_workers* workers, const void* buffer, int64_t bytes) {
    uint64_t total = 0;
    Reading job{(const uint8_t*)buffer, bytes, int64_t(1) << 20, &total};
    workers->run(chosen().load()->read, &job, pieces(bytes, job.block_bytes), 0);
    return total;
}

void fs_touch(void* buffer, int64_t bytes) {
    auto* at = (uint8_t*)buffer;
    const volatile uint8_t zero = 0;
    const uint8_t nothing = zero;  // that it is nothing is not to be known: some compilers leave out what writes a constant 0
    for (int64_t i = 0; i < bytes; i += kPageBytes) __atomic_fetch_or(at + i, nothing, __ATOMIC_RELAXED);
}

void fs_linear(fs_workers* workers, const fs_matrix* w, const float* bias, const float* x, int64_t n_tokens, float* y) {
    Timed timed;
    if (n_tokens <= 0) return;
    Format format = format_of(*w);
    int64_t block = between(1, n_tokens, format.group ? kFixedTokens : kPackedTokens);
    FixedBlock fixed(format, block);
    for (int64_t token = 0; token < n_tokens; token += block) {
        int64_t tokens = between(1, n_tokens - token, block);
        const float* some = x + token * w->cols;
        std::vector<float> chunks;
        if (n_tokens > 1 && !format.group) chunks = packed(some, w->cols, tokens);
        Linear job{w, format, bias, some, tokens, rows_per_task(format, w->rows, tokens),
                   y + token * w->rows, fixed.of(some, tokens), chunks.data()};
        size_t scratch = tokens > 1 && !format.group ? kPanelScratch : 0;
        workers->run(chosen().load()->linear, &job, pieces(w->rows, job.rows_per_task), scratch);
    }
}

void fs_score(fs_workers* workers, const fs_matrix* w, const float* bias, const float* x, int64_t T, float* out) {
    Timed timed;
    Scoring job{w, format_of(*w), bias, nullptr, nullptr, nullptr, 0, round_up(w->cols / w->group_size, 8), 0, out};
    int64_t block = between(1, T, kScoreTokens), columns = job.groups * w->group_size;
    std::vector<int8_t> q(size_t(block * columns));
    std::vector<float> parts(size_t(2 * block * job.groups));
    float *steps = parts.data(), *sums = steps + block * job.groups;
    job.q = q.data(), job.steps = steps, job.sums = sums;
    for (int64_t token = 0; token < T; token += block) {
        if (token > 0) {
            std::fill(q.begin(), q.end(), int8_t(0));
            std::fill(parts.begin(), parts.end(), 0.0f);
        }
        job.tokens = between(1, T - token, block), job.out = out + token * w->rows;
        for (int64_t t = 0; t < job.tokens; t++)
            chosen().load()->score_input(job.format, x + (token + t) * w->cols, q.data() + t * columns,
                                         steps + t * job.groups, sums + t * job.groups);
        job.rows_per_task = rows_per_task(job.format, w->rows, job.tokens);
        workers->run(chosen().load()->score, &job, pieces(w->rows, job.rows_per_task), 0);
    }
}

void fs_gather(const fs_matrix* w, const int32_t* ids, int64_t n, float* out) {
    Timed timed;
    Format format = format_of(*w);
    auto row = [](const void* p, int64_t offset) { return (const uint8_t*)p + offset; };
    for (int64_t i = 0; i < n; i++)
        chosen().load()->decode(format, row(w->data, ids[i] * format.data_bytes),
                                row(w->scales, ids[i] * format.scale_bytes),
                                row(w->biases, ids[i] * format.scale_bytes), out + i * w->cols);
}

void fs_attention(fs_workers* workers, const float* q, const void* k, const void* v, int32_t kv_dtype, int64_t T,
                  int64_t H, int64_t KVH, int64_t hd, int64_t capacity, int64_t offset, int64_t window, float scale,
                  float* out) {
    Timed timed;
    if (T <= 0) return;
    int64_t group = H / KVH, head_block = between(1, group, kQueryBlock), token_block = kQueryBlock / head_block;
    int64_t span = window > 0 && window < offset + T ? window : offset + T;
    Attention job{q, (const uint8_t*)k, (const uint8_t*)v, format_of(hd, kv_dtype, kv_dtype, 0), T, H, KVH,
                  capacity, offset, window, head_block, token_block, span, scale, out};
    // Scratch grows in steps, not by a key on every decode step, and never beyond what the full cache takes.
    int64_t room = between(span, round_up(span, 1024), window > 0 && window < capacity ? window : capacity);
    workers->run(chosen().load()->attention, &job, KVH * pieces(group, head_block) * pieces(T, token_block),
                 size_t(kQueryBlock * room + kKeyBlock * hd));
}

void fs_kv_append(const float* k, void* cache, int32_t kv_dtype, int64_t T, int64_t KVH, int64_t hd, int64_t capacity,
                  int64_t offset) {
    Timed timed;
    int64_t size = float_bytes(kv_dtype);
    for (int64_t t = 0; t < T; t++)
        for (int64_t h = 0; h < KVH; h++)
            chosen().load()->encode(k + (t * KVH + h) * hd, hd, kv_dtype,
                                    (uint8_t*)cache + (h * capacity + offset + t) * hd * size);
}

void fs_activate(float* g, int64_t n, int32_t activation, float param) {
    Timed timed;
    for (int64_t i = 0; i < n; i++) g[i] = activate(g[i], activation, param);
}

int64_t fs_active(const float* activated, int64_t T, int64_t I, int32_t* ids) {
    Timed timed;
    return fs::numbers_of_any(activated, T, I, ids);
}

void fs_ffn_hidden(fs_workers* workers, const fs_record* record, const uint8_t* base, const int64_t* offsets,
                   const int32_t* ids, const int32_t* cols, int64_t n, const float* x, int64_t T,
                   const float* activated, const uint8_t* mask, int64_t I, float* hidden, int64_t ldh) {
    Timed timed;
    if (T <= 0) return;
    Format format = format_of(*record);
    int64_t block = format.group ? between(1, T, kFixedTokens) : T;
    FixedBlock fixed(format, block);
    for (int64_t token = 0; token < T; token += block) {
        int64_t tokens = between(1, T - token, block), at = token * I;
        const float* some = x + token * record->d;
        Hidden job{record, format, base, offsets, ids, cols, n, some, tokens, activated ? activated + at : nullptr,
                   mask ? mask + at : nullptr, I, hidden + token * ldh, ldh, fixed.of(some, tokens)};
        size_t scratch = tokens > 1 && !format.group ? size_t(2 * kRowBlock * record->d) : 0;
        workers->run(chosen().load()->hidden, &job, pieces(n, kRowBlock), scratch);
    }
}

void fs_ffn_down(fs_workers* workers, const fs_record* record, const uint8_t* base, const int64_t* offsets,
                 const int32_t* cols, int64_t n, const float* hidden, int64_t ldh, int64_t T, float* y) {
    Timed timed;
    if (T <= 0 || n <= 0) return;
    Down job{record, format_of(*record), base, offsets, cols, n, hidden, ldh, T, 0, y};
    job.columns_per_task = columns_per_task(job.format, n, T, workers->threads());
    workers->run(chosen().load()->down, &job, pieces(record->d, job.columns_per_task),
                 size_t(between(1, n, kDownBlock) * job.columns_per_task));
}

}  // extern "C"
