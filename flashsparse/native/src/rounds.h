// The C interface of a layer's rounds: look up, read what is missing, compute what is there meanwhile, then what arrives.
// Part of the native library's interface (flashsparse.h); which records a layer needs is the caller's decision.
#pragma once

#include "block.h"
#include "flashsparse.h"

#ifdef __cplusplus
extern "C" {
#endif

// What the layers of an engine share: where rounds are prepared, and the reads ahead of one layer.
typedef struct fs_rounds fs_rounds;

// Where one layer's records lie (in `fd`, record i at data_offset + i * stride) and are kept (slot s at slab + s *
// slot_bytes, its record at byte begin[s] of it). sector: what reads are rounded out to, a power of two; gap, longest: of
// fs_plan_reads.
typedef struct {
    fs_slots* slots;
    int64_t* begin;
    uint8_t* slab;
    int64_t slot_bytes, record_bytes, stride, data_offset, sector, gap, longest;
    int32_t fd, reserved;
} fs_home;

// A layer's input and what is known of its neurons, as fs_ffn_hidden takes it; hidden has room for T * width values.
typedef struct {
    const fs_record* record;
    const float* x;
    int64_t T, I;
    const float* activated;
    const uint8_t* mask;
    float* hidden;
    int64_t width;
    float* y;
    int64_t count_fired;  // whether `fired` is counted
} fs_ffn_input;

// How the next layer's records are guessed from the residual stream h [d] while this layer's are read: by its own scores
// of norm(h), those of a low-bit copy (fs_score) or, if `exact`, magnitudes of activated gates (fs_linear). x [d] and
// scores [records] are scratch. home, least: of fs_rounds_ahead.
typedef struct {
    const fs_home* home;
    const fs_norm* norm;
    const fs_matrix* scoring;
    const float *bias, *h;
    float *x, *scores;
    float least, param;
    int32_t exact, activation;
} fs_hint;

// What calls have done, which they add to; the last five say which read failed, and how far it came.
typedef struct {
    int64_t rounds, hits, misses, needed_bytes, flash_reads, flash_bytes, fired;
    int64_t prefetched, prefetch_used, prefetch_wasted_bytes;
    int64_t wait_ns, overlap_ns;  // waiting for reads; computing while there was something to wait for
    int64_t hint_ns;              // guessing and starting reads ahead of the next layer
    int64_t offset, need, got, error;
} fs_tally;

enum { FS_DONE = 0, FS_READ_FAILED = -1, FS_POOL_STOPPED = -2, FS_NO_MEMORY = -3, FS_BAD_IDS = -4 };

// NULL without memory. fs_rounds_destroy ends the reads ahead; pool: 0 when it is destroyed already.
FS_API fs_rounds* fs_rounds_create(fs_pool*, fs_workers*);
FS_API void fs_rounds_destroy(fs_rounds*, int32_t pool);

// y += the FFN of the ascending records `ids`, in as many rounds as slots and `hidden` ask for; reads ahead of this layer
// are waited for where the records need them, and dropped where nobody has begun them. Afterwards nothing is in flight,
// and the records' uses count. FS_READ_FAILED and the like: the round's missing records are absent again. `next` or NULL:
// reads ahead of another layer, begun when this one has computed what is in slots; they go on when the call returns.
FS_API int32_t fs_rounds_run(fs_rounds*, const fs_home*, const int32_t* ids, int64_t n, const fs_ffn_input*,
                             const fs_hint* next, fs_tally*);

// Starts reading what is absent of the records whose score is at least `least`, at most a quarter of the slots: those with
// the highest scores, likeliest first. scores [records]; NaN counts as lowest. Earlier reads ahead end first.
FS_API int32_t fs_rounds_ahead(fs_rounds*, const fs_home*, const float* scores, float least, fs_tally*);

// Ends the reads ahead of any layer: drops those that nobody has begun, waits for the others, whose records stay.
FS_API void fs_rounds_drop(fs_rounds*, fs_tally*);

#ifdef __cplusplus
}
#endif
