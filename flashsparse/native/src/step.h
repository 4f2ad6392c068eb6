// The C interface of one token's step through a model's layers: attention, choice of neurons, rounds, residual, in one call.
// Part of the native library's interface (flashsparse.h). Layers that need anything else are the caller's to run.
#pragma once

#include "rounds.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { FS_ACTIVE = 0, FS_SCORED = 1, FS_CANDIDATES = 2 };

// Which of a layer's records one token needs. FS_ACTIVE: those whose activation of scoring (fs_linear) is
// not zero; FS_SCORED: those that fs_select, or with k > 0 fs_select_topk, finds in fs_score's scores; FS_CANDIDATES:
// what fs_candidates names. values [records] and mask [records] are scratch.
typedef struct {
    const fs_matrix* scoring;
    const float* bias;
    const fs_compact* compact;
    float* values;
    uint8_t* mask;
    int64_t k;
    float threshold, param;  // of the scores; of the activation
    int32_t kind, activation;
} fs_choice;

// One layer. hint: how its records are guessed by the layer before when hints are on; NULL: they are not. down_bias: NULL or
// [d]. closing without weight: no norm of h behind the residual. ids (room for all records), chosen: what was chosen, and
// how many of them; -1: the layer did not come so far.
typedef struct {
    const fs_layer* attention;
    void *keys, *values;
    const fs_home* home;
    const fs_choice* choice;
    const fs_hint* hint;
    const float* down_bias;
    fs_norm closing;
    int32_t* ids;
    int64_t chosen;
} fs_step_layer;

// h [d] is the residual stream, x and y [d] and scratch those of fs_attend and fs_rounds_run, turns and capacity too. The
// FFN's input is x, or h with `after_residual` (post-norm layers). at: the next layer to be run; end: behind the last one.
// Nanoseconds add up.
typedef struct {
    fs_step_layer* layers;
    int64_t at, end;
    const fs_record* record;
    float *h, *x, *y, *scratch, *hidden;
    const float* turns;
    int64_t width, capacity, offset;
    float residual;  // of what an FFN adds to h
    int32_t after_residual, hints, count_fired;
    int64_t attention_ns, ffn_ns;  // the latter without hints
} fs_step;

// Runs layers from `at` on, until all are done or `patience` nanoseconds are over. FS_READ_FAILED and the like: of layer
// `at`, whose counts are then not in the tally, as the failure is; the step cannot go on.
FS_API int32_t fs_step_run(fs_rounds*, fs_workers*, fs_step*, int64_t patience, fs_tally*);

#ifdef __cplusplus
}
#endif
