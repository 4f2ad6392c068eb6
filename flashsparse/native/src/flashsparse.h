// The C interface of the native library: CPU kernels and the read pool.
// Raw addresses in, no Python or MLX types. Shapes are row-contiguous; sizes are in elements unless they say bytes.
// Nothing here knows of models or packs. Arguments are validated by the Python bindings, not here.
#pragma once

#include <stdint.h>

#if defined(__GNUC__)
#define FS_API __attribute__((visibility("default")))
#else
#define FS_API
#endif

#define FS_ABI_VERSION 8

#ifdef __cplusplus
extern "C" {
#endif

// Q: MLX affine, groups along the row. Q1, Q2 and Q3 only in fs_score; 1 bit follows the rule of the others.
enum { FS_F32 = 0, FS_F16 = 1, FS_BF16 = 2, FS_Q8 = 3, FS_Q4 = 4, FS_Q1 = 5, FS_Q2 = 6, FS_Q3 = 7 };
enum { FS_SILU = 0, FS_RELU = 1, FS_RELU2 = 2, FS_FATRELU = 3, FS_DRELU = 4 };

typedef struct fs_workers fs_workers;
typedef struct fs_pool fs_pool;

typedef struct {
    const void *data, *scales, *biases;  // scales, biases: [rows, cols / group_size] of scale_dtype, Q only
    int64_t rows, cols;
    int32_t dtype, scale_dtype, group_size, reserved;
} fs_matrix;

// A copy of a matrix in 8 + 4 bits, groups of 64 columns (the last one filled up with zeros): value = scale * (high +
// (low - 8) / 16). high [rows, groups, 64]; low [rows, groups, 32], byte i of columns i (low half) and 32 + i; scales
// bf16 [rows, groups]. errors [rows, 3], each times a group's scale: at least the norm of what high alone, and what both
// leave of a group's weights, and of the weights and of either copy of them. Infinite where a row has no copy. bias: NULL
// or [rows].
typedef struct {
    const int8_t* high;
    const uint8_t* low;
    const uint16_t* scales;
    const float *errors, *bias;
    int64_t rows, cols;
} fs_compact;

// Byte offsets of the fields inside a record, -1 where absent. A quantized vector is words, scales, biases back to back.
typedef struct {
    int64_t gate, gate_bias, up, up_bias, down;
    int64_t d;
    int32_t dtype, scale_dtype, group_size, activation;
    float param;  // FATReLU's threshold
    int32_t gated;
} fs_record;

FS_API int32_t fs_abi_version(void);
FS_API const char* fs_isa(void);                // the variant in use: "avx512", "avx2" or "portable"
FS_API int32_t fs_set_isa(const char* name);    // 0, or -1 when this machine or build lacks it; not while kernels run

// `threads` counts the calling thread. One call at a time works on a set of workers; further callers wait.
FS_API fs_workers* fs_workers_create(int32_t threads);
FS_API void fs_workers_stop(fs_workers*);     // waits for the call in progress, ends the threads; later calls work alone
FS_API void fs_workers_destroy(fs_workers*);  // stops it; no call may be inside

// Reads every byte of a buffer once, in order, on all threads, and returns the exclusive or of its words: what a kernel
// that only reads would reach. bytes: a multiple of 256.
FS_API uint64_t fs_memory_read(fs_workers*, const void* buffer, int64_t bytes);
// Makes the system give the pages of a buffer now; its bytes stay what they are, whoever writes them meanwhile.
FS_API void fs_touch(void* buffer, int64_t bytes);

// y[T, rows] = x[T, cols] W^T + bias. Each value's bits depend on its row, its token and the variant only.
FS_API void fs_linear(fs_workers*, const fs_matrix* w, const float* bias, const float* x, int64_t n_tokens, float* y);
// out[T, rows] = x[T, cols] W^T + bias for W of Q1 to Q4, x rounded to int8 per group: step = max |x| / 127, half to even.
// Each value's bits depend on its row and its token only, not on the variant. NaN or Inf in a token: all its scores NaN.
FS_API void fs_score(fs_workers*, const fs_matrix* w, const float* bias, const float* x, int64_t T, float* out);
// out[n, cols] = rows `ids` of w as float32.
FS_API void fs_gather(const fs_matrix* w, const int32_t* ids, int64_t n, float* out);

// Causal attention of q[T, H, hd] (positions offset..offset+T-1) over k, v [KVH, capacity, hd]; out[T, H, hd].
// A window > 0 lets a position see itself and the window - 1 before it.
FS_API void fs_attention(fs_workers*, const float* q, const void* k, const void* v, int32_t kv_dtype, int64_t T,
                         int64_t H, int64_t KVH, int64_t hd, int64_t capacity, int64_t offset, int64_t window,
                         float scale, float* out);
// Writes k[T, KVH, hd] into cache[KVH, capacity, hd] at positions offset.., rounded to nearest even.
FS_API void fs_kv_append(const float* k, void* cache, int32_t kv_dtype, int64_t T, int64_t KVH, int64_t hd,
                         int64_t capacity, int64_t offset);

// The activation of n gate values in place. DReLU: the gate's half, relu.
FS_API void fs_activate(float* g, int64_t n, int32_t activation, float param);
// Ascending neurons i with activated[t, i] != 0 for some t (NaN counts); returns how many. ids has room for I.
FS_API int64_t fs_active(const float* activated, int64_t T, int64_t I, int32_t* ids);

// mask[t, i] = 1 unless scores[t, i] < threshold (NaN is selected), else 0. ids (room for I): the ascending neurons that
// some token selects; returns how many.
FS_API int64_t fs_select(const float* scores, int64_t T, int64_t I, float threshold, uint8_t* mask, int32_t* ids);
// The same among each token's k >= 1 largest scores: NaN counts as the largest, and of equals the lower neuron comes first.
FS_API int64_t fs_select_topk(const float* scores, int64_t T, int64_t I, int64_t k, float threshold, uint8_t* mask,
                              int32_t* ids);

// mask[t, i] = 1 where row i may be active for token t, 0 only where the gate that fs_linear or fs_ffn_hidden computes from
// the row provably has an activation of zero (not silu). All ones for a token with NaN or Inf. Depends on row and token only,
// not on the variant. ids (room for rows): the ascending rows that some token may need; returns how many. refined: NULL,
// or how many (row, token) pairs the low bits were needed for.
FS_API int64_t fs_candidates(fs_workers*, const fs_compact*, const float* x, int64_t T, int32_t activation, float param,
                             uint8_t* mask, int32_t* ids, int64_t* refined);

// hidden[t, cols[j]] = the intermediate value of neuron ids[j], whose record begins at base + offsets[j].
// activated[T, I] holds activated gates; NULL: they are computed from the record's gate row (non-gated: up row).
// A gate of exactly zero gives exactly zero, whatever the up row holds. mask[T, I] or NULL: where mask[t, ids[j]] is 0
// the value is exactly zero and nothing is computed.
FS_API void fs_ffn_hidden(fs_workers*, const fs_record*, const uint8_t* base, const int64_t* offsets,
                          const int32_t* ids, const int32_t* cols, int64_t n, const float* x, int64_t T,
                          const float* activated, const uint8_t* mask, int64_t I, float* hidden, int64_t ldh);
// y[T, d] += sum over ascending j of hidden[t, cols[j]] * down_j, zeros skipped, one addition after the other, so that
// the result does not depend on threads, on the records' places, or on how ascending records are split into calls.
FS_API void fs_ffn_down(fs_workers*, const fs_record*, const uint8_t* base, const int64_t* offsets,
                        const int32_t* cols, int64_t n, const float* hidden, int64_t ldh, int64_t T, float* y);

typedef struct {
    int64_t offset, length, need;  // bytes; need <= length must arrive (a direct read may run past the end of the file)
    void* dest;
    int32_t fd, reserved;
} fs_read;

typedef struct {
    int64_t index, got;  // which read of the batch; bytes that arrived before it failed
    int32_t error, reserved;  // errno; 0: the file ended
} fs_read_error;

// Reads `length` bytes at each of the file's n `offsets` with `threads` threads, each into its own `length` bytes of
// `memory`, until all are read or the time is over. out: reads finished, nanoseconds. 0, or -errno.
FS_API int64_t fs_read_rate(int32_t fd, const int64_t* offsets, int64_t n, int64_t length, int32_t threads,
                            int64_t nanoseconds, uint8_t* memory, int64_t out[2]);

// Divides n reads, ascending in their file, into runs that one request each reads: neighbours no more than `gap` bytes
// apart (-1: none) whose request stays within `longest` bytes and 256 reads. firsts[n + 1]: the first read of each run,
// then n. Returns the runs; *bytes: what their requests move.
FS_API int64_t fs_plan_reads(const fs_read*, int64_t n, int64_t gap, int64_t longest, int32_t* firsts, int64_t* bytes);

// staging: bytes for each thread, a multiple of 4096; a run whose request is longer is read one by one. NULL when the
// threads cannot be started.
FS_API fs_pool* fs_pool_create(int32_t threads, int64_t staging);
FS_API void fs_pool_stop(fs_pool*);     // drops waiting reads, waits for those in flight; wakes whoever takes
FS_API void fs_pool_destroy(fs_pool*);  // stops it; no call may be inside
// Starts batch number `batch`, which the caller chooses and never uses twice, so that it can release the batch whatever
// happens to this call. `firsts` as fs_plan_reads makes it: one request for each run, indices stay those of the reads.
// Waits for unfinished batches that read into the same stretch of memory. `later`: its requests are begun only while no
// batch without it has a waiting one. 0, or -errno.
FS_API int64_t fs_pool_submit(fs_pool*, int64_t batch, const fs_read*, int64_t n, const int32_t* firsts, int64_t runs,
                              int32_t later);
// Blocks until `least` reads of the batch, or all, are finished; writes at most max indices, returns how many. 0: all
// are taken.
// -1: a read failed (no read of the batch is in flight any more). -2: no such batch, or the pool was stopped.
FS_API int64_t fs_pool_take(fs_pool*, int64_t batch, int32_t* done, int64_t max, int64_t least);
FS_API int32_t fs_pool_error(fs_pool*, int64_t batch, fs_read_error* out);  // 1 and *out, or 0
// Drops the reads of the batch that nobody has begun and whose kept[i] is 0; sets kept[i] of those that were begun.
FS_API void fs_pool_keep(fs_pool*, int64_t batch, uint8_t* kept);
FS_API void fs_pool_release(fs_pool*, int64_t batch);  // drops its waiting reads, waits for those in flight; any number
// Until fs_pool_resume no request of a batch for later is begun; waits for those in flight. How many are waiting: the last
// ones in the order of their submission.
FS_API int64_t fs_pool_pause(fs_pool*);
FS_API void fs_pool_resume(fs_pool*);
FS_API void fs_pool_counters(fs_pool*, int64_t out[5]);  // requests, bytes needed, bytes arrived, busy ns, ns with any busy

// The slots of a layer and what they hold. The arrays are the caller's, and so is the struct: all zero at first but for
// slot_of and record_in (-1), numbers that the functions change afterwards. One call at a time. ids are ascending.
typedef struct {
    int32_t* slot_of;     // [records] the record's slot; -1: none; -2 - slot: it is being read ahead into that slot
    int32_t* record_in;   // [slots] the record whose bytes are there, or -1
    float* recent;        // [records] how often it was used, in uses at step `epoch`, half as many 2 steps later
    float* lasting;       // [records] the same with 64 steps
    float* recent_in;     // [slots] those of the record that is there, which count instead of [records] as long as it is
    float* lasting_in;    // [slots] so that victims are found in few cache lines
    uint8_t* held;        // [slots] no victims: 1 of the open round, 2 read ahead
    uint32_t* keys;       // [slots] scratch
    int32_t* victims;     // [slots] scratch
    int64_t records, slots, step, epoch;
    int64_t numbers;      // the last number given to a round or a reservation
    int64_t round, committed, reservation, waiting;  // those that are open, 0: none; reserved records not yet taken over
    int64_t touched, holding;  // slots below were given to records before; 1: others only where those do not suffice
} fs_slots;

FS_API int32_t fs_slots_valid(const fs_slots*, const int32_t* ids, int64_t n);  // ascending, unique, in range
// Whether `ids` fit in the slots beside the reserved records; always without a reservation.
FS_API int32_t fs_slots_fits(const fs_slots*, const int32_t* ids, int64_t n);
// Aborts the open round, and drops the reservation unless it is number `reservation`.
FS_API void fs_slots_recover(fs_slots*, int64_t reservation);
// Begins a round of n <= slots records: the slot of each, and its state: 0 there, 1 missing (its slot is a victim's), 2 in
// the reservation's slot. Victims are free slots, then the least used. The round's number; -1: one is open; -2: no room.
FS_API int64_t fs_slots_begin(fs_slots*, const int32_t* ids, int64_t n, int32_t* slots, uint8_t* states);
// The round's records have all arrived and count as used. -1 when that round is not open or is committed.
FS_API int32_t fs_slots_commit(fs_slots*, int64_t round, const int32_t* ids, int64_t n, const int32_t* slots,
                               const uint8_t* states);
FS_API void fs_slots_abort(fs_slots*, int64_t round);  // frees what was missing; nothing once it is committed or over
FS_API void fs_slots_close(fs_slots*, int64_t round);  // the round is over; aborts it first
// Victims for n records that are in no slot, none of them those of the `kept` records `keep`. An open round is aborted, an
// open reservation dropped. The reservation's number; -2: no room, or a record has a slot.
FS_API int64_t fs_slots_reserve(fs_slots*, const int32_t* ids, int64_t n, const int32_t* keep, int64_t kept,
                                int32_t* slots);
// Ends the reservation; those that have arrived stay, as used now if `used`. Nothing when it is not open.
FS_API void fs_slots_settle(fs_slots*, int64_t reservation, const int32_t* ids, int64_t n, const int32_t* slots,
                            const uint8_t* arrived, int32_t used);
FS_API void fs_slots_end_step(fs_slots*);

#ifdef __cplusplus
}
#endif
