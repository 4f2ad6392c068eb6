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
