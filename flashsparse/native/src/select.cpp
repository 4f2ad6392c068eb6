// Which neurons a score selects: per token by a threshold, by rank, or both; and the union over tokens.
// Works on one thread: a pass over the scores costs little beside computing them.
#include <cstdint>
#include <cstring>

#include "flashsparse.h"
#include "marks.h"
#include "timing.h"

namespace {

// Orders like the scores do: NaN above all, -0 equal to 0.
uint32_t rank_key(float score) {
    if (score != score) return UINT32_MAX;
    score += 0.0f;
    uint32_t bits;
    memcpy(&bits, &score, 4);
    return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

// The k-th largest key, 1 <= k <= n, found digit by digit from the top; *above: how many keys are larger.
uint32_t kth_largest(const float* scores, int64_t n, int64_t k, int64_t* above) {
    uint32_t found = 0, fixed = 0;
    *above = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        int64_t counts[256] = {0};
        for (int64_t i = 0; i < n; i++) {
            uint32_t key = rank_key(scores[i]);
            if ((key & fixed) == found) counts[key >> shift & 255]++;
        }
        uint32_t digit = 255;
        for (; *above + counts[digit] < k; digit--) *above += counts[digit];
        found |= digit << shift;
        fixed |= uint32_t(255) << shift;
    }
    return found;
}

void select_above(const float* scores, int64_t n, float threshold, uint8_t* mask) {
    for (int64_t i = 0; i < n; i++) mask[i] = !(scores[i] < threshold);
}

void keep_largest(const float* scores, int64_t n, int64_t k, uint8_t* mask) {
    int64_t above = 0;
    uint32_t last = kth_largest(scores, n, k, &above);
    int64_t equals = k - above;  // how many neurons with the last key have room
    for (int64_t i = 0; i < n; i++) {
        uint32_t key = rank_key(scores[i]);
        mask[i] &= key > last || (key == last && equals > 0);
        equals -= key == last;
    }
}

}  // namespace

extern "C" {

int64_t fs_select(const float* scores, int64_t T, int64_t I, float threshold, uint8_t* mask, int32_t* ids) {
    fs::Timed timed;
    select_above(scores, T * I, threshold, mask);
    return fs::numbers_of_any(mask, T, I, ids);
}

int64_t fs_select_topk(const float* scores, int64_t T, int64_t I, int64_t k, float threshold, uint8_t* mask,
                       int32_t* ids) {
    fs::Timed timed;
    select_above(scores, T * I, threshold, mask);
    for (int64_t t = 0; t < T && k < I; t++) keep_largest(scores + t * I, I, k, mask + t * I);
    return fs::numbers_of_any(mask, T, I, ids);
}

}  // extern "C"
