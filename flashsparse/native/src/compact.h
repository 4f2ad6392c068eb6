// What the dispatcher (compact.cpp) hands to a variant of the candidate search. Everything is integers or separate float
// products and sums in one order, so all variants and every way of cutting a call name the same candidates.
#pragma once

#include "flashsparse.h"

namespace fs {

constexpr int64_t kGroup = 64;       // columns that share a scale
constexpr int64_t kSide = 8;         // groups that are added side by side; a token's buffers are padded to a multiple
constexpr int64_t kCopyTokens = 16;  // tokens that share a pass over the copy; bounds their integer copies

inline int64_t groups_of(const fs_compact& copy) { return (copy.cols + kGroup - 1) / kGroup; }
inline int64_t padded_groups(const fs_compact& copy) { return (groups_of(copy) + kSide - 1) / kSide * kSide; }

// A block of tokens. With the groups padded: q [tokens, groups * 64], the others [tokens, groups].
// x ~ steps * q; sums: of a group's q; norms: at least |x|, bounds: at least |x - steps q| and what rounding takes.
// tiny [tokens]: what underflow takes.
struct CopyInput {
    int16_t* q;
    int32_t* sums;
    float *steps, *norms, *bounds;
    double* tiny;
};

struct Candidates {
    const fs_compact* copy;
    CopyInput input;
    double limit, slack;  // slack: the factor for rounding in the bound itself
    int64_t tokens, rows_per_task;
    uint8_t* mask;
    int64_t* refined;  // how often the low bits were read; updated atomically, or NULL
};

struct CompactKernels {
    void (*input)(const fs_compact&, const float* x, double rounding, int64_t token, const CopyInput&);
    void (*candidates)(const void* job, int64_t task, float* scratch);
};

extern const CompactKernels portable_compact;
#if defined(FS_HAVE_AVX2)
extern const CompactKernels avx2_compact;
#endif

}  // namespace fs
