// Which absent records of a layer scores name, and in which order they are worth reading. Reads nothing, reserves nothing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "flashsparse.h"

namespace fs {

class Likely {
  public:
    // The records whose score is at least `least` (NaN is not): `fresh` those in no slot, `held` the others, ascending.
    void find(const fs_slots& table, const float* scores, float least) {
        const auto records = size_t(table.records);
        named_.resize(records);
        size_t count = 0, absent = 0, there = 0;
        for (size_t i = 0; i < records; i++) {  // no branches: which scores are high is not to be predicted
            named_[count] = int32_t(i);
            count += scores[i] >= least;
        }
        fresh.resize(count), held.resize(count);
        for (size_t i = 0; i < count; i++) {
            const bool in_slot = table.slot_of[named_[i]] >= 0;
            fresh[absent] = held[there] = named_[i];
            absent += !in_slot, there += in_slot;
        }
        fresh.resize(absent), held.resize(there);
    }

    // Leaves the `most` of `fresh` with the highest scores, of equal ones the lower; rank[i]: how many precede fresh[i].
    void order(const float* scores, size_t most) {
        keys_.resize(fresh.size()), rank.resize(fresh.size());
        for (size_t i = 0; i < fresh.size(); i++) keys_[i] = falling(scores[fresh[i]]) << 32 | i;
        std::sort(keys_.begin(), keys_.end());
        for (size_t i = 0; i < keys_.size(); i++) rank[size_t(keys_[i] & 0xffffffff)] = int32_t(i);
        if (fresh.size() <= most) return;
        size_t kept = 0;
        for (size_t i = 0; i < fresh.size(); i++)
            if (size_t(rank[i]) < most) fresh[kept] = fresh[i], rank[kept++] = rank[i];
        fresh.resize(kept), rank.resize(kept);
    }

    std::vector<int32_t> fresh, held, rank;

  private:
    // A number that is the smaller the higher the score, equal where scores are.
    static uint64_t falling(float score) {
        score += 0.0f;  // -0 is 0
        uint32_t bits;
        memcpy(&bits, &score, 4);
        return bits & 0x80000000 ? bits : ~(bits | 0x80000000);
    }

    std::vector<int32_t> named_;
    std::vector<uint64_t> keys_;
};

}  // namespace fs
