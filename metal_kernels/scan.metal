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
