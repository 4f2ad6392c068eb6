// The slots of a layer: which record is where, victims, rounds and reservations. It allocates nothing and moves no bytes.
// Evicted is what was used least, where uses decay (LRFU, Lee et al. 2001), at two rates: fast ones follow a text that
// stays with its neurons, slow ones, which weigh little, decide among what the fast ones have forgotten.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "flashsparse.h"

namespace {

enum : uint8_t { kFilling = 1, kReserved = 2, kUsed = 4 };  // of a slot: the open round's victim; read ahead; no victim
enum : uint8_t { kHit = 0, kMissing = 1, kAhead = 2 };      // of a round's records
enum : int64_t { kOpen = -1, kNoRoom = -2 };

constexpr int64_t kRecent = 2, kLasting = 64;  // steps after which a use counts half
constexpr double kLastingShare = 0.01;
constexpr int64_t kRescale = 128;      // steps after which uses are counted from a new epoch, long before they overflow
constexpr float kForgotten = 0x1p-40f;  // fewer uses become zero, so that none are ever denormal
constexpr uint32_t kNoVictim = ~0u;

int32_t reserved(int32_t slot) { return -2 - slot; }  // its own inverse

// What uses at the epoch have become, for one at the present the inverse.
struct Decay {
    explicit Decay(int64_t steps)
        : recent(std::exp2(double(steps) / kRecent)), lasting(std::exp2(double(steps) / kLasting)) {}
    double recent, lasting;
};

// How often the records in the first `slots` were used, decayed to the present, as numbers that order like it; more than 0.
// A loop without conditions, which compilers make vectors of.
void count_uses(const fs_slots* t, int64_t slots, uint32_t* keys) {
    const Decay decay(t->epoch - t->step);
    const float *recent = t->recent_in, *lasting = t->lasting_in;
    for (int64_t slot = 0; slot < slots; slot++) {
        auto value = float(recent[slot] * decay.recent + kLastingShare * (lasting[slot] * decay.lasting));
        value = value < kForgotten ? 0.0f : value;
        uint32_t bits;
        memcpy(&bits, &value, 4);
        keys[slot] = bits + 1;
    }
}

// For each of the first `slots` a key that orders as victims go: free ones first. Returns how many there are.
int64_t rank(fs_slots* t, int64_t slots) {
    count_uses(t, slots, t->keys);
    int64_t possible = 0;
    for (int64_t slot = 0; slot < slots; slot++) {
        const uint32_t used = t->record_in[slot] < 0 ? 0 : t->keys[slot];
        t->keys[slot] = t->held[slot] ? kNoVictim : used;
        possible += !t->held[slot];
    }
    return possible;
}

struct Limit {
    uint32_t key;
    int64_t equal;  // how many keys that are the same belong to those looked for
};

// The largest of the `count` smallest keys (at least one): their highest bits by counting, the rest among the few keys that
// agree in these. some [n]: scratch.
Limit smallest(const uint32_t* keys, int64_t n, int64_t count, uint32_t* some) {
    constexpr int kShift = 21;
    int32_t found[1 << (32 - kShift)] = {};
    for (int64_t i = 0; i < n; i++) found[keys[i] >> kShift]++;
    uint32_t digit = 0;
    while (found[digit] < count) count -= found[digit++];
    int64_t alike = 0;
    for (int64_t i = 0; i < n && alike < found[digit]; i++) {
        some[alike] = keys[i];
        alike += keys[i] >> kShift == digit;
    }
    std::nth_element(some, some + count - 1, some + alike);
    const uint32_t key = some[count - 1];
    return {key, count - std::count_if(some, some + count - 1, [&](uint32_t other) { return other < key; })};
}

// The slots among which `count` victims are found: while holding no more beyond those touched than that takes.
int64_t within(const fs_slots* t, int64_t count) {
    if (!t->holding) return t->slots;
    int64_t possible = 0;
    for (int64_t slot = 0; slot < t->touched; slot++) possible += !t->held[slot];
    return std::min(t->slots, t->touched + std::max<int64_t>(0, count - possible));
}

void leave(fs_slots* t, int64_t slot) {
    const int32_t record = t->record_in[slot];
    if (record < 0) return;
    t->recent[record] = t->recent_in[slot];
    t->lasting[record] = t->lasting_in[slot];
    t->slot_of[record] = -1;
    t->record_in[slot] = -1;
}

// Empties `count` slots and writes them in ascending order: free ones, then those with the smallest keys, of equal ones
// the lower slots. False, and nothing is changed, when so many are not to be had.
bool evict(fs_slots* t, int64_t count, uint8_t mark, int32_t* victims) {
    if (!count) return true;
    const int64_t slots = within(t, count);
    if (rank(t, slots) < count) return false;
    Limit limit = smallest(t->keys, slots, count, reinterpret_cast<uint32_t*>(t->victims));
    for (int64_t slot = 0; count > 0; slot++) {
        if (t->keys[slot] > limit.key || (t->keys[slot] == limit.key && limit.equal-- <= 0)) continue;
        leave(t, slot);
        t->held[slot] = mark;
        *victims++ = int32_t(slot);
        t->touched = std::max(t->touched, slot + 1);
        count--;
    }
    return true;
}

void hold(fs_slots* t, const int32_t* ids, int64_t n, bool on) {
    for (int64_t i = 0; i < n; i++)
        if (int32_t slot = t->slot_of[ids[i]]; slot >= 0) t->held[slot] = on ? kUsed : 0;
}

void place(fs_slots* t, int32_t record, int32_t slot) {
    t->record_in[slot] = record;
    t->recent_in[slot] = t->recent[record];
    t->lasting_in[slot] = t->lasting[record];
    t->slot_of[record] = slot;
    t->held[slot] = 0;
}

// The records in these slots are used now.
void use(fs_slots* t, const int32_t* slots, int64_t n) {
    const Decay one(t->step - t->epoch);
    for (int64_t i = 0; i < n; i++) {
        t->recent_in[slots[i]] += float(one.recent);
        t->lasting_in[slots[i]] += float(one.lasting);
    }
}

void drop(fs_slots* t) {
    if (!t->reservation) return;
    for (int64_t record = 0; record < t->records; record++)
        if (t->slot_of[record] < -1) t->slot_of[record] = -1;
    for (int64_t slot = 0; slot < t->slots; slot++)
        if (t->held[slot] == kReserved) t->held[slot] = 0;
    t->reservation = t->waiting = 0;
}

}  // namespace

extern "C" {

int32_t fs_slots_valid(const fs_slots* t, const int32_t* ids, int64_t n) {
    bool valid = n == 0 || (ids[0] >= 0 && ids[n - 1] < t->records);
    for (int64_t i = 1; i < n; i++) valid &= ids[i] > ids[i - 1];
    return valid;
}

int32_t fs_slots_fits(const fs_slots* t, const int32_t* ids, int64_t n) {
    int64_t taken = 0;
    for (int64_t i = 0; i < n; i++) taken += t->slot_of[ids[i]] < -1;
    return !t->reservation || n + t->waiting - taken <= t->slots;
}

void fs_slots_recover(fs_slots* t, int64_t reservation) {
    fs_slots_abort(t, t->round);
    t->round = 0;
    if (t->reservation != reservation) drop(t);
}

int64_t fs_slots_begin(fs_slots* t, const int32_t* ids, int64_t n, int32_t* slots, uint8_t* states) {
    if (t->round) return kOpen;
    int64_t missing = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t slot = t->slot_of[ids[i]];
        states[i] = slot >= 0 ? kHit : slot == -1 ? kMissing : kAhead;
        slots[i] = slot >= 0 ? slot : reserved(slot);
        missing += slot == -1;
    }
    if (missing) {
        hold(t, ids, n, true);
        bool found = evict(t, missing, kFilling, t->victims);
        hold(t, ids, n, false);
        if (!found) return kNoRoom;
        const int32_t* victim = t->victims;
        for (int64_t i = 0; i < n; i++)
            if (states[i] == kMissing) slots[i] = *victim++;
    }
    t->committed = 0;
    return t->round = ++t->numbers;
}

int32_t fs_slots_commit(fs_slots* t, int64_t round, const int32_t* ids, int64_t n, const int32_t* slots,
                        const uint8_t* states) {
    if (!round || round != t->round || t->committed) return -1;
    for (int64_t i = 0; i < n; i++) {
        if (states[i] != kHit) place(t, ids[i], slots[i]);
        t->waiting -= states[i] == kAhead;
    }
    use(t, slots, n);
    t->committed = 1;
    return 0;
}

void fs_slots_abort(fs_slots* t, int64_t round) {
    if (!round || round != t->round || t->committed) return;
    for (int64_t slot = 0; slot < t->slots; slot++)
        if (t->held[slot] == kFilling) t->held[slot] = 0;
    t->round = 0;
}

void fs_slots_close(fs_slots* t, int64_t round) {
    fs_slots_abort(t, round);
    if (round == t->round) t->round = 0;
}

int64_t fs_slots_reserve(fs_slots* t, const int32_t* ids, int64_t n, const int32_t* keep, int64_t kept,
                         int32_t* slots) {
    fs_slots_recover(t, 0);
    for (int64_t i = 0; i < n; i++)
        if (t->slot_of[ids[i]] != -1) return kNoRoom;
    hold(t, keep, kept, true);
    bool found = evict(t, n, kReserved, slots);
    hold(t, keep, kept, false);
    if (!found) return kNoRoom;
    for (int64_t i = 0; i < n; i++) t->slot_of[ids[i]] = reserved(slots[i]);
    t->waiting = n;
    return t->reservation = ++t->numbers;
}

void fs_slots_settle(fs_slots* t, int64_t reservation, const int32_t* ids, int64_t n, const int32_t* slots,
                     const uint8_t* arrived, int32_t used) {
    fs_slots_recover(t, t->reservation);
    if (!reservation || reservation != t->reservation) return;
    for (int64_t i = 0; i < n; i++) {
        if (t->slot_of[ids[i]] != reserved(slots[i])) continue;  // a round has taken it over
        t->slot_of[ids[i]] = -1;
        t->held[slots[i]] = 0;
        if (!arrived[i]) continue;
        place(t, ids[i], slots[i]);
        if (used) use(t, slots + i, 1);
    }
    t->reservation = t->waiting = 0;
}

void fs_slots_end_step(fs_slots* t) {
    if (++t->step - t->epoch < kRescale) return;
    const Decay decay(-kRescale);
    auto less = [](float* uses, int64_t n, double by) {
        for (int64_t i = 0; i < n; i++) uses[i] = uses[i] * by < kForgotten ? 0.0f : float(uses[i] * by);
    };
    less(t->recent, t->records, decay.recent), less(t->recent_in, t->slots, decay.recent);
    less(t->lasting, t->records, decay.lasting), less(t->lasting_in, t->slots, decay.lasting);
    t->epoch = t->step;
}

}  // extern "C"
