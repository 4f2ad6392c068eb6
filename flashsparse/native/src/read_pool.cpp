// The read pool: threads that run batches of requests in the order they were submitted, those for later after all others.
// It knows files as descriptors and destinations as addresses; both must live until the batch is released.
#include <errno.h>
#include <sys/mman.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <numeric>
#include <system_error>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "reading.h"

namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t kHugePage = 2 << 20;

int64_t nanoseconds(Clock::duration time) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

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

    bool overlaps(Batch& other);
    bool finished() const { return waiting == 0 && in_flight == 0; }
};

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
bool Batch::overlaps(Batch& other) {
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

}  // namespace

struct fs_pool {
  public:
    fs_pool(int threads, int64_t staging);
    ~fs_pool();
    fs_pool(const fs_pool&) = delete;
    fs_pool& operator=(const fs_pool&) = delete;

    void submit(int64_t id, std::shared_ptr<Batch> batch);
    int64_t take(int64_t id, int32_t* done, int64_t max, int64_t least);
    bool error(int64_t id, fs_read_error* out);
    void keep(int64_t id, uint8_t* kept);
    void release(int64_t id);
    void counters(int64_t out[5]);
    int64_t pause();
    void resume();
    void stop();

  private:
    using Queue = std::deque<std::shared_ptr<Batch>>;  // batches that have requests nobody has begun

    void work(int index);
    Queue* ready();
    void await_memory(std::unique_lock<std::mutex>& lock, Batch& batch);
    void drop_waiting(Batch& batch);
    void record(Batch& batch, int64_t run, const Outcome* outcomes);
    std::shared_ptr<Batch> find(int64_t id);

    std::mutex mutex_;
    std::condition_variable work_;
    std::condition_variable still_;
    Queue queue_, later_;
    std::unordered_map<int64_t, std::shared_ptr<Batch>> batches_;
    std::vector<std::thread> threads_;
    Staging staging_;
    int64_t reads_ = 0, needed_ = 0, arrived_ = 0, busy_ = 0;
    int64_t running_ = 0, active_ = 0;  // requests in flight, nanoseconds in which there were any until...
    Clock::time_point since_;           // ...the first of those in flight began
    int64_t running_later_ = 0;         // of those in flight
    bool stop_ = false, paused_ = false;
};

fs_pool::fs_pool(int threads, int64_t staging) : staging_(threads, staging) {
    try {
        for (int i = 0; i < threads; i++) threads_.emplace_back([this, i] { work(i); });
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
        queue_.clear(), later_.clear();
        for (auto& [id, batch] : batches_) {
            batch->waiting = 0;
            batch->changed.notify_all();
        }
        work_.notify_all(), still_.notify_all();
    }
    for (auto& thread : threads) thread.join();
}

// A batch that its owner lost, interrupted before it could release it, must not write into memory that is used again.
void fs_pool::await_memory(std::unique_lock<std::mutex>& lock, Batch& batch) {
    auto in_the_way = [&](auto& entry) { return !entry.second->finished() && entry.second->overlaps(batch); };
    while (true) {
        auto it = std::find_if(batches_.begin(), batches_.end(), in_the_way);
        if (it == batches_.end()) return;
        std::shared_ptr<Batch> earlier = it->second;
        earlier->changed.wait(lock, [&] { return earlier->finished(); });
    }
}

void fs_pool::submit(int64_t id, std::shared_ptr<Batch> batch) {
    int64_t n = batch->waiting;
    batch->done.reserve(batch->reads.size());
    {
        std::unique_lock<std::mutex> lock(mutex_);
        await_memory(lock, *batch);
        batches_[id] = batch;
        if (n > 0) (batch->later ? later_ : queue_).push_back(batch);
    }
    // Who submits has more to do than to wake everybody: two threads are woken, and each wakes the next.
    for (int64_t i = 0; i < std::min<int64_t>(n, 2); i++) work_.notify_one();
}

// Where the next request comes from; null: none may be begun.
fs_pool::Queue* fs_pool::ready() {
    if (!queue_.empty()) return &queue_;
    return later_.empty() || paused_ ? nullptr : &later_;
}

void fs_pool::work(int index) {
    Outcome outcomes[kMostRecords];
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
        const bool sleeping = !stop_ && !ready();
        if (sleeping) work_.wait(lock, [&] { return stop_ || ready(); });
        if (stop_) return;
        Queue& queue = *ready();
        std::shared_ptr<Batch> batch = queue.front();
        int64_t run = batch->order[size_t(batch->next++)];
        batch->in_flight++;
        if (--batch->waiting == 0) queue.pop_front();
        auto start = Clock::now();
        if (running_++ == 0) since_ = start;
        running_later_ += batch->later;
        const bool more = sleeping && ready();
        lock.unlock();
        if (more) work_.notify_one();
        const int32_t first = batch->firsts[size_t(run)], last = batch->firsts[size_t(run) + 1];
        int64_t arrived = read_run(&batch->reads[size_t(first)], last - first, staging_.of(index),
                                   staging_.each, outcomes);
        auto end = Clock::now();
        lock.lock();
        reads_++, arrived_ += arrived, busy_ += nanoseconds(end - start);
        if (--running_ == 0) active_ += nanoseconds(end - since_);
        if (batch->later && --running_later_ == 0) still_.notify_all();
        record(*batch, run, outcomes);
    }
}

void fs_pool::drop_waiting(Batch& batch) {
    batch.waiting = 0;
    auto same = [&](const std::shared_ptr<Batch>& other) { return other.get() == &batch; };
    Queue& queue = batch.later ? later_ : queue_;
    queue.erase(std::remove_if(queue.begin(), queue.end(), same), queue.end());
}

// Under the lock. After a failure the batch's waiting requests are dropped: their bytes would not be used.
void fs_pool::record(Batch& batch, int64_t run, const Outcome* outcomes) {
    batch.in_flight--;
    for (int32_t index = batch.firsts[size_t(run)]; index < batch.firsts[size_t(run) + 1]; index++, outcomes++) {
        const fs_read& read = batch.reads[size_t(index)];
        needed_ += read.need;
        if (outcomes->got >= read.need) {
            batch.done.push_back(index);
        } else if (!batch.failed) {
            batch.failed = true;
            batch.error = {index, outcomes->got, outcomes->error, 0};
            drop_waiting(batch);
        }
    }
    // Woken for each read, the one who takes would cost a processor more than the reading.
    if (batch.done.size() >= batch.wanted || batch.finished()) batch.changed.notify_all();
}

std::shared_ptr<Batch> fs_pool::find(int64_t id) {
    auto it = batches_.find(id);
    return it == batches_.end() ? nullptr : it->second;
}

int64_t fs_pool::take(int64_t id, int32_t* done, int64_t max, int64_t least) {
    std::unique_lock<std::mutex> lock(mutex_);
    auto batch = find(id);
    if (!batch || stop_) return -2;
    batch->wanted = size_t(std::max<int64_t>(1, least));
    batch->changed.wait(lock, [&] { return batch->done.size() >= batch->wanted || batch->finished() || stop_; });
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

// A request is dropped when none of its reads is kept.
void fs_pool::keep(int64_t id, uint8_t* kept) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto batch = find(id);
    if (!batch) return;
    auto first_read = [&](int32_t run) { return kept + batch->firsts[size_t(run)]; };
    auto last_read = [&](int32_t run) { return kept + batch->firsts[size_t(run) + 1]; };
    auto wanted = [&](int32_t run) { return std::find(first_read(run), last_read(run), 1) != last_read(run); };
    auto first = batch->order.begin() + batch->next, last = first + batch->waiting;
    auto rest = std::stable_partition(first, last, wanted);
    batch->waiting = rest - first;
    for (auto it = batch->order.begin(); it != rest; ++it) std::fill(first_read(*it), last_read(*it), 1);
    if (batch->waiting == 0) drop_waiting(*batch);
    batch->changed.notify_all();
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

// Begins no request of a batch for later, and waits for those in flight; how many are waiting.
int64_t fs_pool::pause() {
    std::unique_lock<std::mutex> lock(mutex_);
    paused_ = true;
    still_.wait(lock, [&] { return running_later_ == 0 || stop_; });
    return std::accumulate(later_.begin(), later_.end(), int64_t(0),
                           [](int64_t sum, const std::shared_ptr<Batch>& batch) { return sum + batch->waiting; });
}

void fs_pool::resume() {
    std::lock_guard<std::mutex> lock(mutex_);
    paused_ = false;
    work_.notify_all();
}

void fs_pool::counters(int64_t out[5]) {
    std::lock_guard<std::mutex> lock(mutex_);
    out[0] = reads_, out[1] = needed_, out[2] = arrived_, out[3] = busy_;
    out[4] = active_ + (running_ > 0 ? nanoseconds(Clock::now() - since_) : 0);
}

extern "C" {

fs_pool* fs_pool_create(int32_t threads, int64_t staging) {
    try {
        return new fs_pool(threads > 1 ? threads : 1, staging);
    } catch (...) {
        return nullptr;
    }
}

void fs_pool_stop(fs_pool* pool) { pool->stop(); }
void fs_pool_destroy(fs_pool* pool) { delete pool; }

int64_t fs_pool_submit(fs_pool* pool, int64_t batch, const fs_read* reads, int64_t n, const int32_t* firsts,
                       int64_t runs, int32_t later) {
    try {
        pool->submit(batch, std::make_shared<Batch>(reads, n, firsts, runs, later != 0));
        return 0;
    } catch (...) {
        return -ENOMEM;
    }
}

int64_t fs_pool_take(fs_pool* pool, int64_t batch, int32_t* done, int64_t max, int64_t least) {
    return pool->take(batch, done, max, least);
}
int32_t fs_pool_error(fs_pool* pool, int64_t batch, fs_read_error* out) { return pool->error(batch, out); }
void fs_pool_keep(fs_pool* pool, int64_t batch, uint8_t* kept) { pool->keep(batch, kept); }
void fs_pool_release(fs_pool* pool, int64_t batch) { pool->release(batch); }
int64_t fs_pool_pause(fs_pool* pool) { return pool->pause(); }
void fs_pool_resume(fs_pool* pool) { pool->resume(); }
void fs_pool_counters(fs_pool* pool, int64_t out[5]) { pool->counters(out); }

}  // extern "C"
