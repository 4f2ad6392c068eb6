// Requests for some records of a layer, and the batch that brings them: what rounds and reads ahead have in common.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <numeric>
#include <vector>

#include "rounds.h"

namespace fs {

using Numbers = std::vector<int32_t>;

inline int64_t clock_ns() {
    using namespace std::chrono;
    return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

// Callers number their batches from 1 on; these are the library's own.
inline int64_t next_batch() {
    static std::atomic<int64_t> last{0};
    return --last;
}

// Sizes change little between rounds, so that vectors allocate in the first ones only.
template <class T>
T* room(std::vector<T>& values, int64_t n) {
    values.resize(size_t(n));
    return values.data();
}

// The requests for some records of a home, in the order in which they begin.
struct Plan {
    // Records ids[i] into slots[i], ascending ids; notes where in its slot each will begin.
    void make(const fs_home& home, const int32_t* ids, const int32_t* slots, int64_t n) {
        reads.resize(size_t(n));
        firsts.resize(size_t(n) + 1);
        order.resize(size_t(n));
        std::iota(order.begin(), order.end(), 0);
        for (int64_t i = 0; i < n; i++) {
            int64_t position = home.data_offset + ids[i] * home.stride;
            int64_t start = position & -home.sector, need = position - start + home.record_bytes;
            int64_t length = (need + home.sector - 1) & -home.sector;
            home.begin[slots[i]] = position - start;
            reads[size_t(i)] = {start, length, need, home.slab + slots[i] * home.slot_bytes, home.fd, 0};
        }
        runs = fs_plan_reads(reads.data(), n, home.gap, home.longest, firsts.data(), &bytes);
    }

    // Begins requests in the order of the lowest rank[i] among their records; the ranks are 0 to n - 1.
    void rank(const Numbers& rank) {
        const size_t n = rank.size();
        run_of_.assign(n, -1);
        for (int64_t run = 0; run < runs; run++) {
            auto first = rank.begin() + firsts[size_t(run)], last = rank.begin() + firsts[size_t(run) + 1];
            run_of_[size_t(*std::min_element(first, last))] = int32_t(run);
        }
        moved_.clear(), begins_.clear(), order.clear();
        for (int32_t run : run_of_) {
            if (run < 0) continue;
            begins_.push_back(int32_t(moved_.size()));
            for (int32_t i = firsts[size_t(run)]; i < firsts[size_t(run) + 1]; i++)
                moved_.push_back(reads[size_t(i)]), order.push_back(i);
        }
        begins_.push_back(int32_t(n));
        reads.swap(moved_), firsts.swap(begins_);
    }

    // Requests and bytes of those that bring a read with kept[i], whole requests.
    void count(const std::vector<uint8_t>& kept, fs_tally& tally) const {
        for (int64_t run = 0; run < runs; run++) {
            auto first = kept.begin() + firsts[size_t(run)], last = kept.begin() + firsts[size_t(run) + 1];
            if (std::find(first, last, 1) == last) continue;
            const fs_read& end = reads[size_t(firsts[size_t(run) + 1]) - 1];
            tally.flash_reads++;
            tally.flash_bytes += end.offset + end.length - reads[size_t(firsts[size_t(run)])].offset;
        }
    }

    std::vector<fs_read> reads;
    Numbers firsts, order;  // order[i]: which of the records asked for read i brings
    int64_t runs = 0, bytes = 0;

  private:
    Numbers run_of_, begins_;  // scratch
    std::vector<fs_read> moved_;
};

// Reads in flight; released when it goes.
class Batch {
  public:
    Batch() = default;
    ~Batch() { release(); }
    Batch(const Batch&) = delete;
    Batch& operator=(const Batch&) = delete;

    int32_t submit(fs_pool* pool, const Plan& plan) {
        pool_ = pool, number_ = next_batch(), plan_ = &plan;
        auto n = int64_t(plan.reads.size());
        done_.resize(size_t(n));
        return fs_pool_submit(pool, number_, plan.reads.data(), n, plan.firsts.data(), plan.runs, 0) ? FS_NO_MEMORY : 0;
    }

    // Records that have arrived, ascending; none when all were taken or with an error's status.
    int32_t take(int64_t least, Numbers& arrived, fs_tally& tally) {
        int64_t began = clock_ns();
        int64_t count = fs_pool_take(pool_, number_, done_.data(), int64_t(done_.size()), least);
        tally.wait_ns += clock_ns() - began;
        arrived.clear();
        for (int64_t i = 0; i < count; i++) arrived.push_back(plan_->order[size_t(done_[size_t(i)])]);
        std::sort(arrived.begin(), arrived.end());
        if (count == -1) tell(tally);
        return count >= 0 ? FS_DONE : count == -1 ? FS_READ_FAILED : FS_POOL_STOPPED;
    }

    // Drops what nobody has begun of the records that are not `wanted`, which becomes what goes on.
    void keep(std::vector<uint8_t>& wanted, fs_tally& tally) {
        std::vector<uint8_t> kept(wanted.size());
        for (size_t i = 0; i < kept.size(); i++) kept[i] = wanted[size_t(plan_->order[i])];
        fs_pool_keep(pool_, number_, kept.data());
        plan_->count(kept, tally);
        for (size_t i = 0; i < kept.size(); i++) wanted[size_t(plan_->order[i])] = kept[i];
    }

    void forget() { number_ = 0; }  // the pool is gone

    void release() {
        if (number_) fs_pool_release(pool_, number_);
        number_ = 0;
    }

  private:
    void tell(fs_tally& tally) const {
        fs_read_error error{};
        fs_pool_error(pool_, number_, &error);
        const fs_read& read = plan_->reads[size_t(error.index)];
        tally.offset = read.offset, tally.need = read.need, tally.got = error.got, tally.error = error.error;
    }

    fs_pool* pool_ = nullptr;
    int64_t number_ = 0;
    const Plan* plan_ = nullptr;
    Numbers done_;
};

}  // namespace fs
