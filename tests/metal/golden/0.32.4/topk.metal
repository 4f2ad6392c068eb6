#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
// Orders like the scores do: NaN above all, -0 equal to 0.
inline uint rank_key(float score) {
  if (isnan(score)) return 0xffffffffu;
  const uint bits = as_type<uint>(score == 0.0f ? 0.0f : score);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
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
[[kernel]] void custom_kernel_fs_topk_float_int32_tc_floatc_uint32_t(
  const device float* scores [[buffer(0)]],
  const constant int* scores_shape [[buffer(1)]],
  const constant int32_t* limits [[buffer(2)]],
  const constant float* threshold [[buffer(3)]],
  device uint32_t* bits [[buffer(4)]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint thread_index_in_threadgroup [[thread_index_in_threadgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]) {
// The bits of each token's k largest scores that are also not below the threshold; a threadgroup a token.
// NaN counts as the largest, and of equals the lower neuron comes first. The k-th largest key is found digit by digit.
threadgroup uint sums[32];
threadgroup atomic_uint digits[256];
threadgroup uint found_at[2];
const int neurons = scores_shape[1], words = limits[1];
const int t = int(threadgroup_position_in_grid.y);
const uint thread_at = thread_index_in_threadgroup, lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
uint found = 0, fixed = 0, above = 0;
for (int shift = 24; shift >= 0; shift -= 8) {
  if (thread_at < 256) atomic_store_explicit(&digits[thread_at], 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = int(thread_at); i < neurons; i += 1024) {
    const uint key = rank_key(scores[t * neurons + i]);
    if ((key & fixed) == found) atomic_fetch_add_explicit(&digits[key >> shift & 255], 1u, memory_order_relaxed);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_at == 0) {
    uint digit = 255, larger = above;
    for (; digit > 0; digit--) {
      const uint here = atomic_load_explicit(&digits[digit], memory_order_relaxed);
      if (larger + here >= uint(limits[0])) break;
      larger += here;
    }
    found_at[0] = digit;
    found_at[1] = larger;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  found |= found_at[0] << shift;
  fixed |= 255u << shift;
  above = found_at[1];
}
const uint room = uint(limits[0]) - above;  // for equals of the k-th
uint passed = 0;
for (int start = 0; start < words * 32; start += 1024) {
  const int i = start + int(thread_at);
  const float score = i < neurons ? scores[t * neurons + i] : 0.0f;
  const uint key = rank_key(score);
  const bool equal = i < neurons && key == found;
  uint all = 0;
  const uint before = passed + scan(uint(equal), lane, simd, sums, all);
  const bool kept = i < neurons && (key > found || (equal && before < room)) && !(score < threshold[0]);
  const uint word = simd_or(kept ? 1u << lane : 0u);
  if (lane == 0 && i < words * 32) bits[t * words + i / 32] = word;
  passed += all;
}

}

