// The read pool: threads that run batches of requests in the order they were submitted, those for later after all others.
// It knows files as descriptors and destinations as addresses; both must live until the batch is released.
// Direct reads are begun several at a time where the system can do that (together.h), by few threads, others one by one.
#include <errno.h>

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

#include "read_batch.h"
#include "reading.h"
#include "together.h"

namespace {

using Clock = std::chrono::steady_clock;
constexpr int kTogether = Together::kMost, kStaged = kTogether / 2;  // of one thread, and of those of several records

int64_t nanoseconds(Clock::duration time) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
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

    // What threads of one kind read, but for what is for later.
    struct Lane {
        Queue queue;
        std::condition_variable work;
    };

    struct Taken {
        std::shared_ptr<Batch> batch;
        int64_t run = 0;
        Clock::time_point start;

        const fs_read* reads() const { return &batch->reads[size_t(batch->firsts[size_t(run)])]; }
        int64_t count() const { return batch->firsts[size_t(run) + 1] - batch->firsts[size_t(run)]; }
    };

    // What one thread has in flight, by tag.
    struct Group {
        std::vector<Taken> taken = std::vector<Taken>(kTogether);
        std::vector<int32_t> place = std::vector<int32_t>(kTogether);  // in the staging; -1: of one record
        std::vector<int32_t> unused, places;                           // tags and places that are free
        std::vector<Together::Request> requests;                       // to begin

        void fill(fs_pool& pool);
        int64_t finish(fs_pool& pool, const Together::Event& event, bool failed, Outcome* outcomes);
        void free(int32_t tag);
        uint8_t* staging(fs_pool& pool, int32_t tag) const {
            return place[size_t(tag)] < 0 ? nullptr : pool.staging_.of(place[size_t(tag)]);
        }
    };

    void work(int index);
    void work_together(int index);
    Lane& lane_of(const Batch& batch) { return batch.together ? together_ : alone_; }
    Queue& queue_of(const Batch& batch) { return batch.later ? later_ : lane_of(batch).queue; }
    void let_later();
    Queue* ready(Lane& lane);
    bool ready(Lane& lane, bool several);
    Taken begin_next(Lane& lane);
    void end(Taken& taken, int64_t arrived, const Outcome* outcomes);
    void await_memory(std::unique_lock<std::mutex>& lock, Batch& batch);
    void drop_waiting(Batch& batch);
    void record(Batch& batch, int64_t run, const Outcome* outcomes);
    std::shared_ptr<Batch> find(int64_t id);

    std::mutex mutex_;
    std::condition_variable still_;
    Lane alone_, together_;
    Queue later_;                  // read one by one, in order
    std::vector<Together> rings_;  // of the threads that begin several requests at a time
    std::unordered_map<int64_t, std::shared_ptr<Batch>> batches_;
    std::vector<std::thread> threads_;
    const int threads_alone_;
    Staging staging_;
    int64_t reads_ = 0, needed_ = 0, arrived_ = 0, busy_ = 0;
    int64_t running_ = 0, active_ = 0;  // requests in flight, nanoseconds in which there were any until...
    Clock::time_point since_;           // ...the first of those in flight began
    int64_t running_later_ = 0;         // of those in flight
    bool stop_ = false, paused_ = false;
    bool refused_ = false;  // the system begins nothing several at a time after all
};

// Twice the staging is set aside, and half of it touched where all files are read in one way.
fs_pool::fs_pool(int threads, int64_t staging) : threads_alone_(threads), staging_(2 * threads, staging) {
    if (threads >= kTogether) {
        do rings_.emplace_back();
        while (rings_.back().ready() && int(rings_.size()) < threads / kStaged);
        if (!rings_.back().ready()) rings_.clear();
    }
    try {
        for (int i = 0; i < threads; i++) threads_.emplace_back([this, i] { work(i); });
        for (int i = 0; i < int(rings_.size()); i++) threads_.emplace_back([this, i] { work_together(i); });
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
        for (Lane* lane : {&alone_, &together_}) lane->queue.clear(), lane->work.notify_all();
        later_.clear();
        for (auto& [id, batch] : batches_) {
            batch->waiting = 0;
            batch->changed.notify_all();
        }
        still_.notify_all();
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
    const bool several = !batch->later && !rings_.empty() && batch->direct();
    {
        std::unique_lock<std::mutex> lock(mutex_);
        await_memory(lock, *batch);
        batches_[id] = batch;
        batch->together = several && !refused_;
        if (n > 0) queue_of(*batch).push_back(batch);
    }
    // Who submits has more to do than to wake everybody: two threads are woken, and each wakes the next.
    const int64_t groups = batch->together ? (n + kTogether - 1) / kTogether : n;
    for (int64_t i = 0; i < std::min<int64_t>(groups, 2); i++) lane_of(*batch).work.notify_one();
}

// Where a lane's next request comes from; null: none may be begun.
fs_pool::Queue* fs_pool::ready(Lane& lane) {
    if (!lane.queue.empty()) return &lane.queue;
    const bool now = &lane == &alone_ && together_.queue.empty() && !paused_;
    return now && !later_.empty() ? &later_ : nullptr;
}

// Under the lock, when a queue has become empty: wakes one who reads what is for later, and who wakes the next.
void fs_pool::let_later() {
    if (!later_.empty() && together_.queue.empty()) alone_.work.notify_one();
}

// Whether there is one and, unless it may be of several records, is of one.
bool fs_pool::ready(Lane& lane, bool several) {
    Queue* queue = ready(lane);
    if (!queue || several) return queue;
    const Batch& batch = *queue->front();
    const auto run = size_t(batch.order[size_t(batch.next)]);
    return batch.firsts[run + 1] - batch.firsts[run] == 1;
}

// Under the lock, and a request is ready.
fs_pool::Taken fs_pool::begin_next(Lane& lane) {
    Queue& queue = *ready(lane);
    Taken taken{queue.front(), 0, Clock::now()};
    Batch& batch = *taken.batch;
    taken.run = batch.order[size_t(batch.next++)];
    batch.in_flight++;
    if (--batch.waiting == 0) queue.pop_front(), let_later();
    if (running_++ == 0) since_ = taken.start;
    running_later_ += batch.later;
    return taken;
}

// Under the lock.
void fs_pool::end(Taken& taken, int64_t arrived, const Outcome* outcomes) {
    auto now = Clock::now();
    reads_++, arrived_ += arrived, busy_ += nanoseconds(now - taken.start);
    if (--running_ == 0) active_ += nanoseconds(now - since_);
    if (taken.batch->later && --running_later_ == 0) still_.notify_all();
    record(*taken.batch, taken.run, outcomes);
    taken.batch.reset();
}

void fs_pool::work(int index) {
    Outcome outcomes[kMostRecords];
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
        const bool sleeping = !stop_ && !ready(alone_);
        if (sleeping) alone_.work.wait(lock, [&] { return stop_ || ready(alone_); });
        if (stop_) return;
        Taken taken = begin_next(alone_);
        const bool more = sleeping && ready(alone_);
        lock.unlock();
        if (more) alone_.work.notify_one();
        int64_t arrived = read_run(taken.reads(), taken.count(), staging_.of(index), staging_.each, outcomes);
        lock.lock();
        end(taken, arrived, outcomes);
    }
}

// Under the lock: begins what it may of the lane's requests.
void fs_pool::Group::fill(fs_pool& pool) {
    requests.clear();
    while (!pool.stop_ && !unused.empty() && pool.ready(pool.together_, !places.empty())) {
        const int32_t tag = unused.back();
        Taken& next = taken[size_t(tag)] = pool.begin_next(pool.together_);
        unused.pop_back();
        place[size_t(tag)] = -1;
        if (next.count() > 1) place[size_t(tag)] = places.back(), places.pop_back();
        RunPlace at = run_place(next.reads(), next.count(), staging(pool, tag), pool.staging_.each);
        requests.push_back({next.reads()->fd, at.offset, at.length, at.dest, tag});
    }
}

// One that could not be begun, or brought less than it must, is read again by itself, which finds out why; but not for
// a batch that has `failed` already: each may take as long as a drive needs to give up.
int64_t fs_pool::Group::finish(fs_pool& pool, const Together::Event& event, bool failed, Outcome* outcomes) {
    const Taken& one = taken[size_t(event.tag)];
    uint8_t* memory = staging(pool, event.tag);
    if (end_run(one.reads(), one.count(), memory, pool.staging_.each, event.got, outcomes)) return event.got;
    if (failed) {
        std::fill_n(outcomes, one.count(), Outcome{0, EIO});
        return 0;
    }
    return read_run(one.reads(), one.count(), memory, pool.staging_.each, outcomes);
}

void fs_pool::Group::free(int32_t tag) {
    unused.push_back(tag);
    if (place[size_t(tag)] >= 0) places.push_back(place[size_t(tag)]);
}

void fs_pool::work_together(int index) {
    Together ring = std::move(rings_[size_t(index)]);  // the kernel takes 35 ms to end one: each thread ends its own
    Group group;
    for (int i = 0; i < kTogether; i++) group.unused.push_back(i);
    for (int i = 0; i < kStaged; i++) group.places.push_back(threads_alone_ + index * kStaged + i);
    std::vector<Together::Event> events;
    events.reserve(kTogether), group.requests.reserve(kTogether);
    Outcome outcomes[kMostRecords];
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
        const bool idle = group.unused.size() == kTogether, sleeping = idle && !stop_ && !ready(together_);
        if (sleeping) together_.work.wait(lock, [&] { return stop_ || ready(together_); });
        if (idle && stop_) return;
        group.fill(*this);
        const bool more = sleeping && ready(together_);
        lock.unlock();
        if (more) together_.work.notify_one();
        events.clear();
        const auto begun = size_t(ring.begin(group.requests));
        for (size_t i = begun; i < group.requests.size(); i++) events.push_back({group.requests[i].tag, -1});
        const bool refused = begun == 0 && !group.requests.empty();
        if (events.empty()) ring.await(std::max<int64_t>(1, (kTogether - int64_t(group.unused.size())) / 2), events);
        lock.lock();
        refused_ |= refused;
        for (const Together::Event& event : events) {
            Taken& one = group.taken[size_t(event.tag)];
            const bool failed = one.batch->failed;
            lock.unlock();
            int64_t arrived = group.finish(*this, event, failed, outcomes);
            lock.lock();
            end(one, arrived, outcomes);
            group.free(event.tag);
        }
    }
}

void fs_pool::drop_waiting(Batch& batch) {
    batch.waiting = 0;
    auto same = [&](const std::shared_ptr<Batch>& other) { return other.get() == &batch; };
    Queue& queue = queue_of(batch);
    queue.erase(std::remove_if(queue.begin(), queue.end(), same), queue.end());
    let_later();
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
    alone_.work.notify_all();
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
