// What the read pool keeps of a batch of requests, and the memory that its threads read several records into.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <condition_variable>
#include <numeric>
#include <utility>
#include <vector>

#include "flashsparse.h"
#include "together.h"

constexpr size_t kHugePage = 2 << 20;

struct Batch {
    Batch(const fs_read* first, int64_t n, const int32_t* run_firsts, int64_t runs, bool for_later)
        : reads(first, first + n), firsts(run_firsts, run_firsts + runs + 1), order(size_t(runs)), waiting(runs),
          later(for_later) {
        std::iota(order.begin(), order.end(), 0);
        places.reserve(reads.size());
        for (const fs_read& read : reads) {
            auto at = reinterpret_cast<uintptr_t>(read.dest);
            places.push_back({at, at + uintptr_t(read.length)});
            begin = std::min(begin, places.back().first), end = std::max(end, places.back().second);
        }
    }
    std::vector<fs_read> reads;
    std::vector<int32_t> firsts;  // the first read of each request, and the number of reads
    std::vector<int32_t> order;   // of the requests: those from `next` on are waiting
    std::vector<int32_t> done;    // finished reads, not yet taken
    int64_t next = 0, waiting, in_flight = 0;  // requests
    const bool later;  // begun only while no other batch has a waiting request
    size_t wanted = 1;  // finished reads that whoever takes waits for
    bool failed = false;
    fs_read_error error{};
    std::condition_variable changed;
    std::vector<std::pair<uintptr_t, uintptr_t>> places;  // destinations, first and last + 1; of all together:
    uintptr_t begin = UINTPTR_MAX, end = 0;
    bool ascending = false;  // the places are
    bool together = false;   // its requests are begun several at a time

    bool direct() const;  // every file's reads bypass the page cache
    bool overlaps(Batch& other);
    bool finished() const { return waiting == 0 && in_flight == 0; }
};

inline bool Batch::direct() const {
    for (size_t i = 0; i < reads.size(); i++)
        if ((i == 0 || reads[i].fd != reads[i - 1].fd) && !Together::direct(reads[i].fd)) return false;
    return true;
}

// `each` bytes for every thread, not one of them touched before it is used; 0 where the system has none to give.
struct Staging {
    Staging(int threads, int64_t bytes) : each(bytes), total(size_t(threads) * size_t(bytes) + kHugePage) {
        void* at = mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED) each = 0;
        else memory = static_cast<uint8_t*>(at);
#ifdef MADV_HUGEPAGE
        // A direct read into a huge page is one transfer, not one for each small page.
        size_t inside = total - kHugePage - (total - kHugePage) % kHugePage;
        if (memory && inside) madvise(aligned(), inside, MADV_HUGEPAGE);
#endif
    }
    ~Staging() {
        if (memory) munmap(memory, total);
    }
    Staging(const Staging&) = delete;
    Staging& operator=(const Staging&) = delete;

    uint8_t* aligned() const {
        return memory + (kHugePage - reinterpret_cast<uintptr_t>(memory) % kHugePage) % kHugePage;
    }
    uint8_t* of(int index) const { return memory ? aligned() + int64_t(index) * each : nullptr; }

    int64_t each;
    size_t total;
    uint8_t* memory = nullptr;
};

// Layers have slots of their own, so that batches seldom come near each other: places are sorted only where they do, those
// of the smaller batch.
inline bool Batch::overlaps(Batch& other) {
    if (end <= other.begin || other.end <= begin) return false;
    Batch& few = places.size() < other.places.size() ? *this : other;
    if (!few.ascending) std::sort(few.places.begin(), few.places.end());
    few.ascending = true;
    auto meets = [&](const std::pair<uintptr_t, uintptr_t>& place) {
        auto ends_later = [](const auto& of, uintptr_t at) { return of.second <= at; };
        auto found = std::lower_bound(few.places.begin(), few.places.end(), place.first, ends_later);
        return found != few.places.end() && found->first < place.second;
    };
    const Batch& many = &few == this ? other : *this;
    return std::any_of(many.places.begin(), many.places.end(), meets);
}
