// The kernels of one variant, over tasks of a job. Compiled once per instruction set, which names the table.
// No standard library templates here: their out-of-line copies would be shared with code for other machines.
#include "attention.h"
#include "down.h"
#include "ffn.h"
#include "linear.h"
#include "score.h"

namespace {

using namespace fs;

// --- read: one task is a block of a buffer ---------------------------------------------------------------------

void read(const void* context, int64_t task, float*) {
    typedef uint64_t Words __attribute__((vector_size(32)));
    const Reading& job = *(const Reading*)context;
    const uint8_t* p = job.buffer + task * job.block_bytes;
    const uint8_t* end = job.buffer + least((task + 1) * job.block_bytes, job.bytes);
    Words sums[8] = {};
    for (; p < end; p += sizeof sums)
        for (int i = 0; i < 8; i++) {
            Words words;
            memcpy(&words, p + i * 32, 32);
            sums[i] ^= words;
        }
    for (int i = 1; i < 8; i++) sums[0] ^= sums[i];
    __atomic_fetch_xor(job.total, sums[0][0] ^ sums[0][1] ^ sums[0][2] ^ sums[0][3], __ATOMIC_RELAXED);
}

// --- fixed point ------------------------------------------------------------------------------------------------

int64_t fixed_bytes(const Format& f) { return f.group * (f.dtype == FS_Q4 ? 3 : 4); }

void fix(const Format& f, const float* x, int8_t* digits, float* steps, float* sums) {
    with_fixed(f, [&](auto bits, auto group) {
        fix_token<decltype(bits)::value, decltype(group)::value>(x, f.columns, digits, steps, sums);
    });
}

// --- rows in and out --------------------------------------------------------------------------------------------

void decode(const Format& f, const void* data, const void* scales, const void* biases, float* out) {
    with_row(f.dtype, [&](auto type) {
        bind(type, f, data, scales, biases);
        decode_row(type, f.columns, step_of(f, f.columns), out);
    });
}

void encode(const float* values, int64_t n, int32_t dtype, void* out) {
    if (dtype == FS_F32) {
        memcpy(out, values, size_t(n) * 4);
        return;
    }
    auto* halves = (uint16_t*)out;
    int64_t i = 0;
    if (dtype == FS_F16) {
        for (; i + 8 <= n; i += 8) store_f16(halves + i, load(values + i));
        for (; i < n; i++) halves[i] = f32_to_f16(values[i]);
    }
    for (; i < n; i++) halves[i] = f32_to_bf16(values[i]);
}

}  // namespace

#if defined(FS_AVX512)
const fs::Kernels fs::avx512_kernels = {
    "avx512", linear, hidden, down, attention, score, score_input, fixed_bytes, fix, read, decode, encode};
#elif defined(FS_AVX2)
const fs::Kernels fs::avx2_kernels = {
    "avx2", linear, hidden, down, attention, score, score_input, fixed_bytes, fix, read, decode, encode};
#else
const fs::Kernels fs::portable_kernels = {
    "portable", linear, hidden, down, attention, score, score_input, fixed_bytes, fix, read, decode, encode};
#endif
