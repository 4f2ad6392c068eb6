#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
// Header of the kernels that make lists: a prefix sum over the 1024 lanes of one threadgroup, in the order of the lanes.
// sums: 32 words of threadgroup memory, not read by anybody since the last barrier. Returns the sum before this lane;
// `all` becomes the sum of all. Every lane must call it.
inline uint scan(uint value, uint lane, uint simd, threadgroup uint* sums, thread uint& all) {
  uint before = simd_prefix_exclusive_sum(value);
  if (lane == 31) sums[simd] = before + value;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  all = 0;
  for (uint s = 0; s < 32; s++) {
    if (s < simd) before += sums[s];
    all += sums[s];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return before;
}
[[kernel]] void custom_kernel_fs_compact_uint32_tc_int32_tc_int32_t_int32_t_uint8_t(
  const constant uint32_t* bits [[buffer(0)]],
  const constant int* bits_shape [[buffer(1)]],
  const constant int32_t* limits [[buffer(2)]],
  device int32_t* ids [[buffer(3)]],
  device int32_t* count [[buffer(4)]],
  device uint8_t* mask [[buffer(5)]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint thread_index_in_threadgroup [[thread_index_in_threadgroup]]) {
// The ascending neurons whose bit is set for some token, by one threadgroup: ids, their number, and each token's mask.
// bits [T, words]: neuron i is bit i % 32 of word i / 32; no bit at or beyond `neurons` is set.
threadgroup uint sums[32];
const int tokens = bits_shape[0], words = bits_shape[1], neurons = limits[0];
const uint thread_at = thread_index_in_threadgroup, lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
uint base = 0;
for (int start = 0; start < words; start += 1024) {
  const int w = start + int(thread_at);
  uint any = 0;
  if (w < words)
    for (int t = 0; t < tokens; t++) any |= bits[t * words + w];
  uint all = 0;
  uint at = base + scan(popcount(any), lane, simd, sums, all);
  for (uint left = any; left != 0; left &= left - 1) {
    const uint bit = ctz(left);
    ids[at] = w * 32 + int(bit);
    for (int t = 0; t < tokens; t++) mask[t * neurons + int(at)] = uint8_t(bits[t * words + w] >> bit & 1);
    at++;
  }
  base += all;
}
if (thread_at == 0) count[0] = int(base);

}

