// The C interface of whole decoder layers: everything of a layer before its FFN in one call, and norms.
// Part of the native library's interface (flashsparse.h); the FFN and its reads stay the caller's.
#pragma once

#include "flashsparse.h"

#ifdef __cplusplus
extern "C" {
#endif

// RMSNorm, or LayerNorm when `centred`: weight [d] and bias [d] (NULL: none), float32.
typedef struct {
    const float *weight, *bias;
    float eps;
    int32_t centred;
} fs_norm;

// One layer's attention. `input` without weight: no norm before the products (post-norm layers).
typedef struct {
    fs_matrix q, k, v, o;
    const float *q_bias, *k_bias, *v_bias, *o_bias;  // NULL: none
    fs_norm input, output;
    int64_t heads, kv_heads, head_dim, window;  // window 0: none
    int32_t kv_dtype, post_norm;
    float scale, residual;  // of the scores; of what the attention adds to h
} fs_layer;

// h [T, d] += residual * attention(input(h)), after storing keys and values in the caches [kv_heads, capacity, head_dim]
// at positions offset... Then x [T, d] = output(h), the FFN's input; with post_norm h = output(h) instead, and x is only
// scratch. turns: of fs_turns, NULL: positions are not rotated. scratch: T * 2 * (heads + kv_heads) * head_dim floats.
// A token's bits depend on it, the cache before it and the kernels' variant, not on T or on the threads.
FS_API void fs_attend(fs_workers*, const fs_layer*, void* keys, void* values, int64_t capacity, int64_t offset,
                      const float* turns, int64_t T, float* h, float* x, float* scratch);

// out [T, d] = norm(x); out may be x.
FS_API void fs_normalize(fs_workers*, const fs_norm*, const float* x, int64_t T, int64_t d, float* out);

// turns [T, 2, n]: factor times cosine and sine of position * frequencies[n], for positions offset..offset+T-1.
FS_API void fs_turns(const double* frequencies, int64_t n, double factor, int64_t offset, int64_t T, float* turns);

// Seconds the calling thread has spent in compute functions of this library, in nanoseconds.
FS_API int64_t fs_compute_ns(void);

#ifdef __cplusplus
}
#endif
