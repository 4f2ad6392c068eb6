// The read pool: threads that run batches of positioned reads in the order they were submitted.
// It knows files as descriptors and destinations as addresses; both must live until the batch is released.
#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <unordered_map>
#include <vector>

#include "flashsparse.h"

namespace {

constexpr int64_t kMostBytes = 1 << 30;  // macOS refuses reads of 2 GiB and more
constexpr int64_t kAlignment = 4096;

struct Outcome {
    int64_t got;
    int32_t error;  // errno; 0 with got < need: the file ended
};

bool at_end(int fd, int64_t position) {
    struct stat status;
    return fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && position >= status.st_size;
}

// Reads until `need` bytes have arrived. A direct read cannot continue at an unaligned place (EINVAL): it steps back to
// an aligned one, once for each place, and otherwise finds that the file has ended.
Outcome read_fully(const fs_read& r) {
    int64_t got = 0, retried = 0;
    auto* dest = static_cast<uint8_t*>(r.dest);
    while (got < r.need) {
        int64_t ask = r.length - got < kMostBytes ? r.length - got : kMostBytes;
        ssize_t count = pread(r.fd, dest + got, size_t(ask), off_t(r.offset + got));
        if (count > 0) {
            got += count;
        } else if (count == 0) {
            return {got, 0};
        } else if (errno == EINVAL && got % kAlignment != 0 && got > retried) {
            retried = got;
            got -= got % kAlignment;
        } else if (errno != EINTR) {
            int error = errno;
            return {got, got > 0 && error == EINVAL && at_end(r.fd, r.offset + got) ? 0 : error};
        }
    }
    return {got, 0};
}

struct Batch {
    explicit Batch(const fs_read* first, int64_t n) : reads(first, first + n), waiting(n) {
        for (const fs_read& read : reads) {
            auto at = reinterpret_cast<uintptr_t>(read.dest);
            low = std::min(low, at), high = std::max(high, at + uintptr_t(read.length));
        }
    }
    std::vector<fs_read> reads;
    std::vector<int32_t> done;  // finished, not yet taken
    int64_t next = 0, waiting, in_flight = 0;
    bool failed = false;
    fs_read_error error{};
    std::condition_variable changed;
    uintptr_t low = UINTPTR_MAX, high = 0;  // all destinations lie within

    bool overlaps(const Batch& other) const { return low < other.high && other.low < high; }
    bool finished() const { return waiting == 0 && in_flight == 0; }
};

}  // namespace

struct fs_pool {
  public:
    explicit fs_pool(int threads);
    ~fs_pool();
    fs_pool(const fs_pool&) = delete;
    fs_pool& operator=(const fs_pool&) = delete;

    void submit(int64_t id, const fs_read* reads, int64_t n);
    int64_t take(int64_t id, int32_t* done, int64_t max);
    bool error(int64_t id, fs_read_error* out);
    void release(int64_t id);
    void counters(int64_t out[4]);
    void stop();

  private:
    void work();
    void await_memory(std::unique_lock<std::mutex>& lock, const Batch& batch);
    void drop_waiting(Batch& batch);
    void record(Batch& batch, int64_t index, const Outcome& outcome, int64_t nanoseconds);
    std::shared_ptr<Batch> find(int64_t id);

    std::mutex mutex_;
    std::condition_variable work_;
    std::deque<std::shared_ptr<Batch>> queue_;  // batches that have reads nobody has begun
    std::unordered_map<int64_t, std::shared_ptr<Batch>> batches_;
    std::vector<std::thread> threads_;
    int64_t reads_ = 0, needed_ = 0, arrived_ = 0, busy_ = 0;
    bool stop_ = false;
};

fs_pool::fs_pool(int threads) {
    try {
        for (int i = 0; i < threads; i++) threads_.emplace_back([this] { work(); });
    } catch (...) {
        stop();
        throw;
    }
}

fs_pool::~fs_pool() { stop(); }

void fs_pool::stop() {
    std::vector<std::thread> threads;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
        threads.swap(threads_);
        queue_.clear();
        for (auto& [id, batch] : batches_) {
            batch->waiting = 0;
            batch->changed.notify_all();
        }
        work_.notify_all();
    }
    for (auto& thread : threads) thread.join();
}

// A batch that its owner lost, interrupted before it could release it, must not write into memory that is used again.
void fs_pool::await_memory(std::unique_lock<std::mutex>& lock, const Batch& batch) {
    auto in_the_way = [&](auto& entry) { return !entry.second->finished() && entry.second->overlaps(batch); };
    while (true) {
        auto it = std::find_if(batches_.begin(), batches_.end(), in_the_way);
        if (it == batches_.end()) return;
        std::shared_ptr<Batch> earlier = it->second;
        earlier->changed.wait(lock, [&] { return earlier->finished(); });
    }
}

void fs_pool::submit(int64_t id, const fs_read* reads, int64_t n) {
    auto batch = std::make_shared<Batch>(reads, n);
    batch->done.reserve(size_t(n));
    std::unique_lock<std::mutex> lock(mutex_);
    await_memory(lock, *batch);
    batches_[id] = batch;
    if (n > 0) queue_.push_back(batch);
    if (n >= int64_t(threads_.size())) work_.notify_all();
    else for (int64_t i = 0; i < n; i++) work_.notify_one();
}

void fs_pool::work() {
    using clock = std::chrono::steady_clock;
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
        work_.wait(lock, [&] { return stop_ || !queue_.empty(); });
        if (stop_) return;
        std::shared_ptr<Batch> batch = queue_.front();
        int64_t index = batch->next++;
        batch->in_flight++;
        if (--batch->waiting == 0) queue_.pop_front();
        lock.unlock();
        auto start = clock::now();
        Outcome outcome = read_fully(batch->reads[size_t(index)]);
        int64_t spent = std::chrono::duration_cast<std::chrono::nanoseconds>(clock::now() - start).count();
        lock.lock();
        record(*batch, index, outcome, spent);
    }
}

void fs_pool::drop_waiting(Batch& batch) {
    batch.waiting = 0;
    auto same = [&](const std::shared_ptr<Batch>& other) { return other.get() == &batch; };
    queue_.erase(std::remove_if(queue_.begin(), queue_.end(), same), queue_.end());
}

// Under the lock. After a failure the batch's waiting reads are dropped: their bytes would not be used.
void fs_pool::record(Batch& batch, int64_t index, const Outcome& outcome, int64_t nanoseconds) {
    const fs_read& read = batch.reads[size_t(index)];
    batch.in_flight--;
    reads_++, needed_ += read.need, arrived_ += outcome.got, busy_ += nanoseconds;
    if (outcome.got >= read.need) {
        batch.done.push_back(int32_t(index));
    } else if (!batch.failed) {
        batch.failed = true;
        batch.error = {index, outcome.got, outcome.error, 0};
        drop_waiting(batch);
    }
    batch.changed.notify_all();
}

std::shared_ptr<Batch> fs_pool::find(int64_t id) {
    auto it = batches_.find(id);
    return it == batches_.end() ? nullptr : it->second;
}

int64_t fs_pool::take(int64_t id, int32_t* done, int64_t max) {
    std::unique_lock<std::mutex> lock(mutex_);
    auto batch = find(id);
    if (!batch || stop_) return -2;
    batch->changed.wait(lock, [&] { return !batch->done.empty() || batch->finished() || stop_; });
    if (stop_ || !find(id)) return -2;
    int64_t count = 0;
    for (; count < max && !batch->done.empty(); count++) {
        done[count] = batch->done.back();
        batch->done.pop_back();
    }
    return count > 0 || !batch->failed ? count : -1;
}

bool fs_pool::error(int64_t id, fs_read_error* out) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto batch = find(id);
    if (!batch || !batch->failed) return false;
    *out = batch->error;
    return true;
}

void fs_pool::release(int64_t id) {
    std::unique_lock<std::mutex> lock(mutex_);
    auto batch = find(id);
    if (!batch) return;
    drop_waiting(*batch);
    batch->changed.wait(lock, [&] { return batch->in_flight == 0; });
    batches_.erase(id);
    batch->changed.notify_all();
}

void fs_pool::counters(int64_t out[4]) {
    std::lock_guard<std::mutex> lock(mutex_);
    out[0] = reads_, out[1] = needed_, out[2] = arrived_, out[3] = busy_;
}

extern "C" {

fs_pool* fs_pool_create(int32_t threads) {
    try {
        return new fs_pool(threads > 1 ? threads : 1);
    } catch (...) {
        return nullptr;
    }
}

void fs_pool_stop(fs_pool* pool) { pool->stop(); }
void fs_pool_destroy(fs_pool* pool) { delete pool; }

int64_t fs_pool_submit(fs_pool* pool, int64_t batch, const fs_read* reads, int64_t n) {
    try {
        pool->submit(batch, reads, n);
        return 0;
    } catch (...) {
        return -ENOMEM;
    }
}

int64_t fs_pool_take(fs_pool* pool, int64_t batch, int32_t* done, int64_t max) { return pool->take(batch, done, max); }
int32_t fs_pool_error(fs_pool* pool, int64_t batch, fs_read_error* out) { return pool->error(batch, out); }
void fs_pool_release(fs_pool* pool, int64_t batch) { pool->release(batch); }
void fs_pool_counters(fs_pool* pool, int64_t out[4]) { pool->counters(out); }

}  // extern "C"
