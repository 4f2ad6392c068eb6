// The C interface of the candidate search: prepares tokens, cuts the rows into tasks, collects the numbers.
#include "compact.h"

#include <cstring>
#include <vector>

#include "marks.h"
#include "timing.h"
#include "workers.h"

namespace {

using namespace fs;

const CompactKernels& kernels() {
#if defined(FS_HAVE_AVX2)
    if (strcmp(fs_isa(), "portable") != 0) return avx2_compact;
#endif
    return portable_compact;
}

// What rounding to float32 takes of a row's sum of magnitudes: in the exact gate, whose sums are no longer than
// cols / 8 + 16 operations deep (the sums of rows.h), and here; n u / (1 - n u) with n of both and some to spare.
double rounding_of(const fs_compact& copy) {
    double n = double(copy.cols / 8 + 16 + 2 * (groups_of(copy) / kSide + 16)), u = 0x1p-24;
    return n * u / (1.0 - n * u);
}

// A gate is left out when it is at most this: what the activation makes zero of, less the rounding of adding a bias.
double limit_of(int32_t activation, float param) {
    return activation == FS_FATRELU ? double(param) * (1.0 - 0x1p-22) : 0.0;
}

// About 64 KiB of the copy a task for one token; what is too small to wake a thread for is one task.
int64_t rows_per_task(const fs_compact& copy, int64_t tokens) {
    if (copy.rows * copy.cols * tokens < 32768) return copy.rows;
    int64_t fitting = 65536 / (groups_of(copy) * kGroup);
    return tokens > 1 || fitting < 8 ? 8 : fitting < 1024 ? fitting : 1024;
}

// The integer copies of a block of tokens and their parts.
struct Block {
    std::vector<int16_t> q;
    std::vector<int32_t> sums;
    std::vector<float> parts;
    std::vector<double> tiny;

    Block(int64_t tokens, int64_t groups)
        : q(size_t(tokens * groups * kGroup)),
          sums(size_t(tokens * groups)),
          parts(size_t(3 * tokens * groups)),
          tiny(size_t(tokens)) {}

    CopyInput input(int64_t tokens, int64_t groups) {
        float* p = parts.data();
        return {q.data(), sums.data(), p, p + tokens * groups, p + 2 * tokens * groups, tiny.data()};
    }

    void clear() {  // columns behind the last one, and groups of zeros, are not written
        std::memset(q.data(), 0, q.size() * sizeof(int16_t));
    }
};

}  // namespace

extern "C" {

int64_t fs_candidates(fs_workers* workers, const fs_compact* copy, const float* x, int64_t T, int32_t activation,
                      float param, uint8_t* mask, int32_t* ids, int64_t* refined) {
    fs::Timed timed;
    int64_t groups = padded_groups(*copy), step = T < kCopyTokens ? T : kCopyTokens;
    double rounding = rounding_of(*copy);
    Block block(step, groups);
    Candidates job{copy, block.input(step, groups), limit_of(activation, param), 1.0 + double(groups + 32) * 0x1p-23,
                   0, 0, nullptr, refined};
    if (refined) *refined = 0;
    for (int64_t token = 0; token < T; token += step) {
        if (token > 0) block.clear();
        job.tokens = T - token < step ? T - token : step, job.mask = mask + token * copy->rows;
        for (int64_t t = 0; t < job.tokens; t++) kernels().input(*copy, x + (token + t) * copy->cols, rounding, t, job.input);
        job.rows_per_task = rows_per_task(*copy, job.tokens);
        workers->run(kernels().candidates, &job, (copy->rows + job.rows_per_task - 1) / job.rows_per_task, 0);
    }
    return fs::numbers_of_any(mask, T, copy->rows, ids);
}

}  // extern "C"
