// The compute threads: runs one function over task numbers 0..n-1, the calling thread included.
// Every thread begins with a share of neighbouring tasks, so that what a task prefetches is what its thread reads next;
// a thread that is done takes half of what another has left. Which thread runs which task is thus left to chance: a
// task's result must not depend on it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

struct fs_workers {
  public:
    using Task = void (*)(const void* context, int64_t task, float* scratch);

    explicit fs_workers(int threads);
    ~fs_workers();
    fs_workers(const fs_workers&) = delete;
    fs_workers& operator=(const fs_workers&) = delete;

    // Waits for the run in progress and ends the threads. A run that comes later is done by its caller alone.
    void stop();
    // Runs all tasks and returns when they are done. Each thread brings `scratch` floats of its own.
    void run(Task function, const void* context, int64_t tasks, size_t scratch);
    int threads() const { return int(scratch_.size()); }

  private:
    // Tasks begin..end - 1 that a thread has before it, in one word: begin in its upper half, end in its lower.
    struct alignas(64) Share {
        std::atomic<uint64_t> tasks{0};
        std::atomic<int> processor{-1};  // where it was when it last began; -1: not known
    };

    void help(int index);
    bool wait_for_work(uint64_t seen);
    void share_out(int64_t tasks);
    void spread();
    int64_t next(int index);
    bool take_over(int index);
    void work(int index);
    float* scratch(int index);

    const size_t processors_ = std::thread::hardware_concurrency();  // 0: not known
    std::mutex caller_;  // one run at a time
    std::mutex sleep_;
    std::condition_variable wake_;
    std::vector<std::vector<float>> scratch_;
    std::vector<std::thread> helpers_;

    std::atomic<uint64_t> generation_{0};
    std::atomic<int> sleepers_{0}, joined_{0};
    std::atomic<bool> open_{false}, stop_{false};
    std::vector<Share> shares_;
    Task function_ = nullptr;
    const void* context_ = nullptr;
    size_t scratch_floats_ = 0;
};
