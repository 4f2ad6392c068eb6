// A decoder layer up to its FFN: norm, products, rotation, cache, attention, residual, norm; composed of the kernels.
// Norms and rotations run in one order on every machine, in the portable instruction set: they cost little.
#include "block.h"

#include <cmath>

#include "timing.h"
#include "workers.h"

namespace fs {

thread_local int64_t compute_ns = 0;
thread_local int compute_depth = 0;

}  // namespace fs

namespace {

constexpr int kLanes = 8;

// Sum of f(x[i]) in double: eight partial sums, the order of which depends on n only.
template <class F>
double sum_of(const float* x, int64_t n, F f) {
    double lanes[kLanes] = {0};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int lane = 0; lane < kLanes; lane++) lanes[lane] += f(double(x[i + lane]));
    for (int lane = 0; i < n; i++, lane++) lanes[lane] += f(double(x[i]));
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

void normalize(const fs_norm& norm, const float* x, int64_t n, float* out) {
    double mean = norm.centred ? sum_of(x, n, [](double value) { return value; }) / double(n) : 0.0;
    double square = sum_of(x, n, [mean](double value) { return (value - mean) * (value - mean); }) / double(n);
    float shift = float(mean), factor = float(1.0 / std::sqrt(square + double(norm.eps)));
    for (int64_t i = 0; i < n; i++) out[i] = (x[i] - shift) * factor * norm.weight[i];
    if (norm.bias)
        for (int64_t i = 0; i < n; i++) out[i] += norm.bias[i];
}

// Pairs (i, i + n) of each head are turned; `turn` is the token's cosines, then its sines.
void rotate(const float* turn, int64_t heads, int64_t size, float* x) {
    int64_t n = size / 2;
    const float *cosines = turn, *sines = turn + n;
    for (int64_t h = 0; h < heads; h++, x += size)
        for (int64_t i = 0; i < n; i++) {
            float first = x[i], second = x[i + n];
            x[i] = first * cosines[i] - second * sines[i];
            x[i + n] = second * cosines[i] + first * sines[i];
        }
}

// Work on single tokens, which the workers share when there are many.
template <class F>
void each_token(fs_workers* workers, int64_t tokens, const F& f) {
    workers->run([](const void* context, int64_t token, float*) { (*(const F*)context)(token); }, &f, tokens, 0);
}

}  // namespace

extern "C" {

int64_t fs_compute_ns(void) { return fs::compute_ns; }

void fs_normalize(fs_workers* workers, const fs_norm* norm, const float* x, int64_t T, int64_t d, float* out) {
    fs::Timed timed;
    each_token(workers, T, [=](int64_t t) { normalize(*norm, x + t * d, d, out + t * d); });
}

void fs_turns(const double* frequencies, int64_t n, double factor, int64_t offset, int64_t T, float* turns) {
    fs::Timed timed;
    for (int64_t t = 0; t < T; t++, turns += 2 * n)
        for (int64_t i = 0; i < n; i++) {
            double angle = double(offset + t) * frequencies[i];
            turns[i] = float(factor * std::cos(angle));
            turns[n + i] = float(factor * std::sin(angle));
        }
}

void fs_attend(fs_workers* workers, const fs_layer* layer, void* keys, void* values, int64_t capacity, int64_t offset,
               const float* turns, int64_t T, float* h, float* x, float* scratch) {
    fs::Timed timed;
    int64_t size = layer->head_dim, heads = layer->heads, kv_heads = layer->kv_heads, d = layer->q.cols;
    float *q = scratch, *seen = q + T * heads * size, *k = seen + T * heads * size, *v = k + T * kv_heads * size;
    const float* rows = h;
    if (layer->input.weight) {
        fs_normalize(workers, &layer->input, h, T, d, x);
        rows = x;
    }
    fs_linear(workers, &layer->q, layer->q_bias, rows, T, q);
    fs_linear(workers, &layer->k, layer->k_bias, rows, T, k);
    fs_linear(workers, &layer->v, layer->v_bias, rows, T, v);
    if (turns)
        each_token(workers, T, [=](int64_t t) {
            rotate(turns + t * size, heads, size, q + t * heads * size);
            rotate(turns + t * size, kv_heads, size, k + t * kv_heads * size);
        });
    fs_kv_append(k, keys, layer->kv_dtype, T, kv_heads, size, capacity, offset);
    fs_kv_append(v, values, layer->kv_dtype, T, kv_heads, size, capacity, offset);
    fs_attention(workers, q, keys, values, layer->kv_dtype, T, heads, kv_heads, size, capacity, offset, layer->window,
                 layer->scale, seen);
    fs_linear(workers, &layer->o, layer->o_bias, seen, T, x);
    each_token(workers, T, [=](int64_t t) {
        float *sum = h + t * d, *added = x + t * d;
        for (int64_t i = 0; i < d; i++) sum[i] += layer->residual * added[i];
        normalize(layer->output, sum, d, layer->post_norm ? sum : added);
    });
}

}  // extern "C"
