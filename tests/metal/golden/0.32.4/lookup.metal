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
[[kernel]] void custom_kernel_fs_lookup_int32_t_int32_tc_int32_t_int32_t_int64_tc_int64_t_int64_t_int32_t_int32_t_int32_t_int32_t(
  const device int32_t* ids [[buffer(0)]],
  const constant int* ids_shape [[buffer(1)]],
  const constant int32_t* count [[buffer(2)]],
  const device int32_t* slot_of [[buffer(3)]],
  const device int32_t* begin [[buffer(4)]],
  const constant int64_t* slot_bytes [[buffer(5)]],
  device int64_t* offsets [[buffer(6)]],
  device int64_t* hit_offsets [[buffer(7)]],
  device int32_t* hit_cols [[buffer(8)]],
  device int32_t* miss_ids [[buffer(9)]],
  device int32_t* miss_cols [[buffer(10)]],
  device int32_t* totals [[buffer(11)]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint thread_index_in_threadgroup [[thread_index_in_threadgroup]]) {
// Where each listed record is, by one threadgroup, in the list's order: offsets (-1: in no slot), and the two lists of
// hits (their offsets and columns) and of misses (their ids and columns). totals: how many hits, how many misses.
threadgroup uint sums[32];
const int n = count[0], capacity = ids_shape[0];
const uint thread_at = thread_index_in_threadgroup, lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
uint hits = 0;
for (int start = 0; start < capacity; start += 1024) {
  const int p = start + int(thread_at);
  const bool listed = p < n && p < capacity;
  const int id = listed ? ids[p] : 0;
  const int slot = listed ? slot_of[id] : -1;
  uint all = 0;
  const uint at = hits + scan(uint(slot >= 0), lane, simd, sums, all);
  if (listed) {
    const long offset = slot < 0 ? -1 : long(slot) * slot_bytes[0] + begin[slot];
    offsets[p] = offset;
    if (slot >= 0) {
      hit_offsets[at] = offset;
      hit_cols[at] = p;
    } else {
      miss_ids[p - int(at)] = id;  // of the positions before p, `at` are hits
      miss_cols[p - int(at)] = p;
    }
  }
  hits += all;
}
if (thread_at == 0) {
  totals[0] = int(hits);
  totals[1] = min(n, capacity) - int(hits);
}

}

