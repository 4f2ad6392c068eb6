// What the dispatcher (api.cpp) hands to a kernel variant: one struct per call, and a table of the variant's functions.
#pragma once

#include "flashsparse.h"

namespace fs {

// How a stored vector of `columns` values is decoded. size: bytes of one vector's words, of its scales and of its biases.
struct Format {
    int64_t columns;
    int32_t dtype, scale_dtype, group;  // group 0: not quantized
    int64_t data_bytes, scale_bytes;
};

// Tokens in fixed point (fixed.h), each of `groups` groups, padded with zeros to a multiple of eight: digits in the
// variant's order, steps and sums one a group.
struct Fixed {
    const int8_t* digits;
    const float *steps, *sums;
    int64_t groups;
};

struct Linear {
    const fs_matrix* w;
    Format format;
    const float *bias, *x;
    int64_t tokens, rows_per_task;
    float* y;
    Fixed fixed;          // x again, for quantized matrices
    const float* packed;  // and for others with several tokens: chunk by chunk [tokens, kChunk], filled up with zeros
};

// A block of tokens as integers: q [tokens, groups * group size] in the variant's order, steps and sums [tokens, groups];
// `groups` is padded with zeros to a multiple of eight.
struct Scoring {
    const fs_matrix* w;
    Format format;
    const float* bias;
    const int8_t* q;
    const float *steps, *sums;
    int64_t tokens, groups, rows_per_task;
    float* out;
};

struct Hidden {
    const fs_record* record;
    Format format;
    const uint8_t* base;
    const int64_t* offsets;
    const int32_t *ids, *cols;
    int64_t n;
    const float* x;
    int64_t tokens;
    const float* activated;
    const uint8_t* mask;
    int64_t neurons;
    float* hidden;
    int64_t ldh;
    Fixed fixed;  // x again, for quantized records
};

struct Down {
    const fs_record* record;
    Format format;
    const uint8_t* base;
    const int64_t* offsets;
    const int32_t* cols;
    int64_t n;
    const float* hidden;
    int64_t ldh, tokens, columns_per_task;
    float* y;
};

struct Attention {
    const float* q;
    const uint8_t *k, *v;
    Format format;  // of one key or value, columns = head size
    int64_t tokens, heads, kv_heads, capacity, offset, window;
    int64_t head_block, token_block, span;  // rows of a task; the most keys one of its rows sees
    float scale;
    float* out;
};

// A buffer's exclusive or, block by block; the blocks' are joined in `total`, atomically.
struct Reading {
    const uint8_t* buffer;
    int64_t bytes, block_bytes;
    uint64_t* total;
};

constexpr int kRowBlock = 8;     // records, or quantized rows, that several tokens use together
constexpr int kDownBlock = 32;   // records whose down vectors several tokens use together
constexpr int kPanel = 48;       // rows decoded together for many tokens, by chunks of columns
constexpr int kChunk = 512;
constexpr int kFixedTokens = 32; // tokens held in fixed point together
constexpr int kPackedTokens = 64;  // tokens that rows are decoded for once
constexpr int kPanelScratch = kPanel * kChunk + kPanel * kPackedTokens * 8;
constexpr int kKeyBlock = 8;     // keys or values decoded together
constexpr int kQueryBlock = 8;   // query rows (tokens times heads of one key head) of an attention task

struct Kernels {
    const char* name;
    void (*linear)(const void* job, int64_t task, float* scratch);     // scratch: kPanelScratch
    void (*hidden)(const void* job, int64_t task, float* scratch);     // scratch: 2 * kRowBlock * columns
    void (*down)(const void* job, int64_t task, float* scratch);       // scratch: kDownBlock * columns_per_task
    void (*attention)(const void* job, int64_t task, float* scratch);  // scratch: kQueryBlock * span + kKeyBlock * columns
    void (*score)(const void* job, int64_t task, float* scratch);      // scratch: none
    void (*score_input)(const Format&, const float* x, int8_t* q, float* steps, float* sums);  // outputs come as zeros
    int64_t (*fixed_bytes)(const Format&);  // of one group's digits
    void (*fix)(const Format&, const float* x, int8_t* digits, float* steps, float* sums);
    void (*read)(const void* job, int64_t task, float* scratch);       // scratch: none
    void (*decode)(const Format&, const void* data, const void* scales, const void* biases, float* out);
    void (*encode)(const float* values, int64_t n, int32_t dtype, void* out);
};

extern const Kernels portable_kernels;
#if defined(FS_HAVE_AVX2)
extern const Kernels avx2_kernels;
#endif
#if defined(FS_HAVE_AVX512)
extern const Kernels avx512_kernels;  // gives the bits of avx2_kernels (down.h: where float scales are 2^-102 or more)
#endif

}  // namespace fs
