// The compute threads: helpers spin for some microseconds after a run, then sleep.
#include "workers.h"

#include <algorithm>

#include "apart.h"

namespace {

constexpr int kSpins = 4000;  // some 20 to 100 microseconds: a decode step's pause between two products

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

uint64_t range(uint64_t begin, uint64_t end) { return begin << 32 | end; }
uint64_t begin_of(uint64_t tasks) { return tasks >> 32; }
uint64_t end_of(uint64_t tasks) { return tasks & 0xffffffff; }

}  // namespace

fs_workers::fs_workers(int threads) : scratch_(size_t(threads)), shares_(size_t(threads)) {
    for (int i = 1; i < threads; i++) helpers_.emplace_back([this, i] { help(i); });
}

fs_workers::~fs_workers() { stop(); }

void fs_workers::stop() {
    std::lock_guard<std::mutex> lock(caller_);
    stop_ = true;
    generation_++;
    { std::lock_guard<std::mutex> guard(sleep_); }
    wake_.notify_all();
    for (auto& helper : helpers_) helper.join();
    helpers_.clear();
    for (auto& memory : scratch_) std::vector<float>().swap(memory);
}

float* fs_workers::scratch(int index) {
    auto& memory = scratch_[size_t(index)];
    if (memory.size() < scratch_floats_ + 16) {
        std::vector<float>().swap(memory);  // freed before the larger one is made, not after
        memory.resize(scratch_floats_ + 16);
    }
    auto address = reinterpret_cast<uintptr_t>(memory.data());
    return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

void fs_workers::share_out(int64_t tasks) {
    auto count = uint64_t(tasks), threads = uint64_t(shares_.size());
    for (uint64_t i = 0; i < threads; i++)
        shares_[i].tasks.store(range(count * i / threads, count * (i + 1) / threads), std::memory_order_relaxed);
}

// Moves helpers off the processors that the caller and those before them are on, where there are enough for all.
void fs_workers::spread() {
    if (processors_ && shares_.size() > processors_) return;
    shares_[0].processor = fs::processor();
    for (size_t i = 1; i < shares_.size(); i++) {
        const int own = shares_[i].processor;
        auto same = [&](const Share& other) { return other.processor == own; };
        if (own < 0 || std::none_of(shares_.begin(), shares_.begin() + int64_t(i), same)) continue;
        shares_[i].processor = -1;
        std::vector<int> taken;
        for (const Share& other : shares_) taken.push_back(other.processor);
        fs::keep_off(helpers_[i - 1], taken);
    }
}

// The first task of a thread's own share, or -1.
int64_t fs_workers::next(int index) {
    auto& tasks = shares_[size_t(index)].tasks;
    for (uint64_t seen = tasks.load(); begin_of(seen) < end_of(seen);)
        if (tasks.compare_exchange_weak(seen, range(begin_of(seen) + 1, end_of(seen)))) return int64_t(begin_of(seen));
    return -1;
}

// Moves the second half of another thread's share into this thread's, which is empty. Equal words mean equal tasks left,
// so an exchange that succeeds late is right all the same.
bool fs_workers::take_over(int index) {
    int count = int(shares_.size());
    for (int k = 1; k < count; k++) {
        auto& tasks = shares_[size_t((index + k) % count)].tasks;
        for (uint64_t seen = tasks.load(); begin_of(seen) < end_of(seen);) {
            uint64_t middle = begin_of(seen) + (end_of(seen) - begin_of(seen)) / 2;
            if (!tasks.compare_exchange_weak(seen, range(begin_of(seen), middle))) continue;
            shares_[size_t(index)].tasks.store(range(middle, end_of(seen)));
            return true;
        }
    }
    return false;
}

void fs_workers::work(int index) {
    float* memory = scratch(index);
    do {
        for (int64_t task; (task = next(index)) >= 0;) function_(context_, task, memory);
    } while (take_over(index));
}

void fs_workers::run(Task function, const void* context, int64_t tasks, size_t scratch_floats) {
    if (tasks <= 0) return;
    std::lock_guard<std::mutex> lock(caller_);
    function_ = function, context_ = context, scratch_floats_ = scratch_floats;
    share_out(tasks);
    if (tasks == 1 || helpers_.empty()) return work(0);
    spread();
    open_ = true;
    generation_++;
    if (sleepers_ > 0) {
        { std::lock_guard<std::mutex> guard(sleep_); }
        wake_.notify_all();
    }
    work(0);
    // A helper that joins late either sees the closed door or is seen here: both sides are sequentially consistent.
    open_ = false;
    for (int spins = 0; joined_ > 0; spins++) {
        if (spins < kSpins) relax();
        else std::this_thread::yield();
    }
}

bool fs_workers::wait_for_work(uint64_t seen) {
    for (int i = 0; i < kSpins; i++) {
        if (stop_ || generation_ != seen) return !stop_;
        relax();
    }
    std::unique_lock<std::mutex> lock(sleep_);
    sleepers_++;
    wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
    sleepers_--;
    return !stop_;
}

void fs_workers::help(int index) {
    for (uint64_t seen = 0; wait_for_work(seen);) {
        seen = generation_;
        joined_++;
        shares_[size_t(index)].processor = fs::processor();
        if (open_) work(index);
        joined_--;
    }
}
