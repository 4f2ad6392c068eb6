// A layer's rounds in one call. Composed of the slots, the read plan, the read pool and the kernels through their C
// interface: what this adds is their order, and that nothing is left open whichever of them fails.
#include "rounds.h"

#include <cmath>
#include <new>

#include "likely.h"
#include "requests.h"

namespace {

using namespace fs;

constexpr int64_t kWorth = 32;     // records that have arrived, before it pays to start computing them
constexpr int64_t kAheadShare = 4;  // one slot in so many is reserved for reads ahead at most
enum : uint8_t { kHit = 0, kMissing = 1, kAhead = 2 };

// A round of the table: over when it goes, aborted unless it was committed.
struct OpenRound {
    ~OpenRound() { if (number > 0) fs_slots_close(table, number); }
    fs_slots* table;
    int64_t number;
};

// One layer's reads that began before its records were asked for.
struct Ahead {
    // Notes which of the records are among `ids`; returns how many.
    int64_t want(const int32_t* some, int64_t n) {
        wanted.assign(ids.size(), 0);
        int64_t count = 0, at = 0;
        for (size_t i = 0; i < ids.size(); i++) {
            while (at < n && some[at] < ids[i]) at++;
            count += wanted[i] = at < n && some[at] == ids[i];
        }
        return count;
    }

    fs_home home{};  // slots NULL: none are in flight
    int64_t reservation = 0;
    Numbers ids, slots;
    std::vector<uint8_t> arrived, wanted;
    Plan plan;
    Batch batch;
    bool claimed = false, failed = false;
};

}  // namespace

struct fs_rounds {
  public:
    fs_rounds(fs_pool* pool, fs_workers* workers) : pool_(pool), workers_(workers) {}

    int32_t run(const fs_home& home, const int32_t* ids, int64_t n, const fs_ffn_input& in, const fs_hint* next,
                fs_tally& tally);
    int32_t ahead(const fs_home& home, const float* scores, float least, fs_tally& tally);
    void drop_all(fs_tally& tally);
    void forget() {
        for (Ahead& ahead : aheads_) ahead.batch.forget();
    }

  private:
    Ahead& present() { return aheads_[present_]; }
    void hint(fs_tally& tally);
    bool claim(const fs_home& home, const int32_t* ids, int64_t n, fs_tally& tally);
    void drop(fs_tally& tally);
    void finish(fs_tally& tally);
    bool take_ahead(fs_tally& tally);
    int32_t round(const fs_home& home, const int32_t* ids, int64_t n, const fs_ffn_input& in, fs_tally& tally);
    void divide(const int32_t* ids, int64_t n);
    int32_t read(const fs_home& home, const Numbers& positions, Batch& batch, fs_tally& tally);
    int32_t compute_arriving(const Numbers& positions, Batch& batch, fs_tally& tally);
    void compute_ahead(fs_tally& tally);
    void compute(const Numbers& positions);
    void down(fs_tally& tally);

    fs_pool* pool_;
    fs_workers* workers_;
    Ahead aheads_[2];  // of the layer at work, and of the next
    int present_ = 0;
    const fs_hint* next_ = nullptr;  // to be followed in this run
    // Of the round under way; positions are those of its records.
    const fs_home* home_ = nullptr;
    const fs_ffn_input* in_ = nullptr;
    const int32_t* ids_ = nullptr;
    int64_t n_ = 0;
    Numbers slots_, hits_, missing_, expected_, arrived_, some_ids_, some_slots_, cols_;
    Numbers position_of_, there_;  // of the records read ahead; -1: not expected
    std::vector<int64_t> offsets_;
    std::vector<uint8_t> states_;
    Plan plan_;
    Likely likely_;
};

void fs_rounds::divide(const int32_t* ids, int64_t n) {
    ids_ = ids, n_ = n;
    hits_.clear(), missing_.clear(), expected_.clear();
    for (int64_t i = 0; i < n; i++)
        (states_[size_t(i)] == kHit ? hits_ : states_[size_t(i)] == kMissing ? missing_ : expected_).push_back(int32_t(i));
}

// Starts reading the records at these positions into their slots.
int32_t fs_rounds::read(const fs_home& home, const Numbers& positions, Batch& batch, fs_tally& tally) {
    auto n = int64_t(positions.size());
    room(some_ids_, n), room(some_slots_, n);
    for (size_t i = 0; i < positions.size(); i++)
        some_ids_[i] = ids_[positions[i]], some_slots_[i] = slots_[size_t(positions[i])];
    plan_.make(home, some_ids_.data(), some_slots_.data(), n);
    tally.flash_reads += plan_.runs, tally.flash_bytes += plan_.bytes, tally.needed_bytes += n * home.record_bytes;
    return batch.submit(pool_, plan_);
}

void fs_rounds::compute(const Numbers& positions) {
    auto n = int64_t(positions.size());
    if (!n) return;
    room(offsets_, n), room(some_ids_, n);
    for (size_t i = 0; i < positions.size(); i++) {
        int32_t slot = slots_[size_t(positions[i])];
        offsets_[i] = slot * home_->slot_bytes + home_->begin[slot], some_ids_[i] = ids_[positions[i]];
    }
    fs_ffn_hidden(workers_, in_->record, home_->slab, offsets_.data(), some_ids_.data(), positions.data(), n, in_->x,
                  in_->T, in_->activated, in_->mask, in_->I, in_->hidden, n_);
}

int32_t fs_rounds::compute_arriving(const Numbers& positions, Batch& batch, fs_tally& tally) {
    while (true) {
        int32_t status = batch.take(kWorth, arrived_, tally);
        if (status || arrived_.empty()) return status;
        for (int32_t& record : arrived_) record = positions[size_t(record)];
        compute(arrived_);
    }
}

// Marks what has arrived of the reads ahead, a worthwhile number at once; false when no more will.
bool fs_rounds::take_ahead(fs_tally& tally) {
    if (present().failed) return false;
    // The record may not be needed; where it is, it is read again as a miss.
    present().failed = present().batch.take(kWorth, arrived_, tally) != FS_DONE;
    for (int32_t record : arrived_) present().arrived[size_t(record)] = 1;
    return !arrived_.empty();
}

// Computes the expected records as they arrive; those that did not, because a read failed, are left in expected_.
void fs_rounds::compute_ahead(fs_tally& tally) {
    const Ahead& a = present();
    position_of_.assign(a.ids.size(), -1);
    size_t record = 0;
    there_.clear();
    for (int32_t position : expected_) {
        while (a.ids[record] < ids_[position]) record++;
        position_of_[record] = position;
        if (a.arrived[record]) there_.push_back(position);
    }
    compute(there_);
    while (take_ahead(tally)) {
        there_.clear();
        for (int32_t arrived : arrived_)
            if (position_of_[size_t(arrived)] >= 0) there_.push_back(position_of_[size_t(arrived)]);
        compute(there_);
    }
    expected_.clear();
    for (size_t i = 0; i < a.ids.size(); i++)
        if (position_of_[i] >= 0 && !a.arrived[i]) expected_.push_back(position_of_[i]);
}

// Adds up in ascending order.
void fs_rounds::down(fs_tally& tally) {
    room(offsets_, n_), room(cols_, n_);
    std::iota(cols_.begin(), cols_.end(), 0);
    for (int64_t i = 0; i < n_; i++)
        offsets_[size_t(i)] = slots_[size_t(i)] * home_->slot_bytes + home_->begin[slots_[size_t(i)]];
    if (in_->count_fired)
        tally.fired += in_->T * n_ - std::count(in_->hidden, in_->hidden + in_->T * n_, 0.0f);
    fs_ffn_down(workers_, in_->record, home_->slab, offsets_.data(), cols_.data(), n_, in_->hidden, n_, in_->T, in_->y);
}

int32_t fs_rounds::round(const fs_home& home, const int32_t* ids, int64_t n, const fs_ffn_input& in, fs_tally& tally) {
    home_ = &home, in_ = &in;
    room(slots_, n), room(states_, n);
    OpenRound open{home.slots, fs_slots_begin(home.slots, ids, n, slots_.data(), states_.data())};
    if (open.number < 0) return FS_BAD_IDS;
    divide(ids, n);
    auto missing = int64_t(missing_.size()), used = int64_t(expected_.size());
    tally.rounds++, tally.hits += n - missing, tally.misses += missing, tally.prefetch_used += used;
    tally.needed_bytes += used * home.record_bytes;
    Batch batch;
    if (missing)
        if (int32_t status = read(home, missing_, batch, tally)) return status;
    int64_t began = clock_ns();
    compute(hits_);
    if ((missing || used) && !hits_.empty()) tally.overlap_ns += clock_ns() - began;
    hint(tally);
    if (used) compute_ahead(tally);
    if (missing)
        if (int32_t status = compute_arriving(missing_, batch, tally)) return status;
    batch.release();
    if (!expected_.empty()) {
        if (int32_t status = read(home, expected_, batch, tally)) return status;
        if (int32_t status = compute_arriving(expected_, batch, tally)) return status;
    }
    fs_slots_commit(home.slots, open.number, ids, n, slots_.data(), states_.data());
    down(tally);
    return FS_DONE;
}

// Guesses and reads for the next layer, once in a run; a hint decides nothing, so that its failures do not count.
void fs_rounds::hint(fs_tally& tally) {
    if (!next_) return;
    const fs_hint& of = *next_;
    next_ = nullptr;
    const int64_t began = clock_ns(), d = of.scoring->cols, records = of.scoring->rows;
    fs_normalize(workers_, of.norm, of.h, 1, d, of.x);
    if (of.exact) {
        fs_linear(workers_, of.scoring, of.bias, of.x, 1, of.scores);
        fs_activate(of.scores, records, of.activation, of.param);
        for (int64_t i = 0; i < records; i++) of.scores[i] = std::fabs(of.scores[i]);
    } else {
        fs_score(workers_, of.scoring, of.bias, of.x, 1, of.scores);
    }
    present_ ^= 1;
    try {
        ahead(*of.home, of.scores, of.least, tally);
    } catch (const std::bad_alloc&) {
    }
    present_ ^= 1;
    tally.hint_ns += clock_ns() - began;
}

int32_t fs_rounds::run(const fs_home& home, const int32_t* ids, int64_t n, const fs_ffn_input& in, const fs_hint* next,
                       fs_tally& tally) {
    next_ = next;
    if (!fs_slots_valid(home.slots, ids, n)) return FS_BAD_IDS;
    const bool some = claim(home, ids, n, tally);
    fs_slots_recover(home.slots, some ? present().reservation : 0);
    const int64_t most = in.width / std::max<int64_t>(1, in.T), width = std::clamp<int64_t>(most, 1, home.slots->slots);
    int32_t status = FS_DONE;
    for (int64_t first = 0; first < n && !status; first += width)
        status = round(home, ids + first, std::min(width, n - first), in, tally);
    if (!n) hint(tally);
    finish(tally);
    if (next && !next_) present_ ^= 1;
    if (!status) fs_slots_end_step(home.slots);
    return status;
}

// Whether reads ahead are in flight that a round of `ids` needs, and leave room for it; the others are dropped.
bool fs_rounds::claim(const fs_home& home, const int32_t* ids, int64_t n, fs_tally& tally) {
    Ahead& a = present();
    if (!a.home.slots) return false;
    const bool fits = a.home.slots == home.slots && fs_slots_fits(home.slots, ids, n);
    int64_t count = fits ? a.want(ids, n) : a.want(nullptr, 0);
    // While slots are held, records read in vain give theirs up before a request takes a new one.
    if (fits && home.slots->holding && n + int64_t(a.ids.size()) - count > home.slots->touched) {
        count = a.want(nullptr, 0);
    }
    const bool any = count > 0;
    std::vector<uint8_t> kept = a.wanted;
    a.batch.keep(kept, tally);
    for (size_t i = 0; i < kept.size(); i++) {
        tally.prefetched += kept[i];
        tally.prefetch_wasted_bytes += kept[i] && !a.wanted[i] ? a.home.record_bytes : 0;
    }
    a.claimed = true;
    if (!any) finish(tally);
    return any;
}

// Waits for the reads ahead that go on; their records stay in their slots.
void fs_rounds::finish(fs_tally& tally) {
    Ahead& a = present();
    if (!a.home.slots) return;
    if (!a.claimed) return drop(tally);
    while (take_ahead(tally)) {}
    a.batch.release();
    fs_slots_settle(a.home.slots, a.reservation, a.ids.data(), int64_t(a.ids.size()), a.slots.data(), a.arrived.data(), 0);
    a.home.slots = nullptr;
}

void fs_rounds::drop(fs_tally& tally) {
    static const fs_home nothing{};
    claim(nothing, nullptr, 0, tally);
}

void fs_rounds::drop_all(fs_tally& tally) {
    for (int i = 0; i < 2; i++, present_ ^= 1) drop(tally);
}

int32_t fs_rounds::ahead(const fs_home& home, const float* scores, float least, fs_tally& tally) {
    drop(tally);
    fs_slots* table = home.slots;
    likely_.find(*table, scores, least);
    const int64_t slots = table->holding ? table->touched : table->slots;  // while held, nothing grows for a hint
    const int64_t left = slots - int64_t(likely_.held.size());
    // More absent records than that: the layer will take several rounds, and there is no room.
    const int64_t most = int64_t(likely_.fresh.size()) > left ? 0 : std::min(slots / kAheadShare, left);
    if (likely_.fresh.empty() || most <= 0) return FS_DONE;
    likely_.order(scores, size_t(most));
    Ahead& a = present();
    a.ids = likely_.fresh;
    a.arrived.assign(a.ids.size(), 0);
    a.reservation = fs_slots_reserve(table, a.ids.data(), int64_t(a.ids.size()), likely_.held.data(),
                                     int64_t(likely_.held.size()), room(a.slots, int64_t(a.ids.size())));
    if (a.reservation < 0) return FS_BAD_IDS;
    a.plan.make(home, a.ids.data(), a.slots.data(), int64_t(a.ids.size()));
    a.plan.rank(likely_.rank);
    a.home = home, a.claimed = a.failed = false;
    if (int32_t status = a.batch.submit(pool_, a.plan)) {
        a.claimed = a.failed = true;
        finish(tally);
        return status;
    }
    return FS_DONE;
}

extern "C" {

fs_rounds* fs_rounds_create(fs_pool* pool, fs_workers* workers) {
    try {
        return new fs_rounds(pool, workers);
    } catch (...) {
        return nullptr;
    }
}

void fs_rounds_destroy(fs_rounds* rounds, int32_t pool) {
    if (!pool) rounds->forget();
    delete rounds;
}

int32_t fs_rounds_run(fs_rounds* rounds, const fs_home* home, const int32_t* ids, int64_t n, const fs_ffn_input* in,
                      const fs_hint* next, fs_tally* tally) {
    try {
        return rounds->run(*home, ids, n, *in, next, *tally);
    } catch (...) {
        return FS_NO_MEMORY;
    }
}

int32_t fs_rounds_ahead(fs_rounds* rounds, const fs_home* home, const float* scores, float least, fs_tally* tally) {
    try {
        return rounds->ahead(*home, scores, least, *tally);
    } catch (...) {
        return FS_NO_MEMORY;
    }
}

void fs_rounds_drop(fs_rounds* rounds, fs_tally* tally) {
    try {
        rounds->drop_all(*tally);
    } catch (...) {
    }
}

}  // extern "C"
