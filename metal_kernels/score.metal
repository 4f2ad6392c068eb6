// Scores of 32 neurons by a threadgroup of 8 simdgroups, eight lanes a neuron, and the word of those not below the
// threshold.
threadgroup float found[32];
const int d = q_shape[1], groups = d / GROUP, neurons = limits[0], words = limits[1];
const int block = int(threadgroup_position_in_grid.x), t = int(threadgroup_position_in_grid.y);
const int lane = int(thread_index_in_simdgroup), simd = int(simdgroup_index_in_threadgroup);
const int inner = simd * 4 + lane / 8, row = block * 32 + inner;
float sum = 0.0f;
if (row < neurons)
  sum = row_share<BITS, GROUP>(weight, scales, biases, q + t * d, steps + t * groups, totals + t * groups, row, groups, lane & 7);
sum = row_sum(sum);
#if HAS_BIAS
if (row < neurons) sum += bias[row];
#endif
if ((lane & 7) == 0) {
  found[inner] = MAGNITUDE ? fabs(activate<kSilu>(sum, 0.0f)) : sum;
  if (row < neurons) scores[t * neurons + row] = found[inner];
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (simd == 0) {
  const bool kept = block * 32 + lane < neurons && !(found[lane] < threshold[0]);
  const uint word = simd_or(kept ? 1u << lane : 0u);
  if (lane == 0) bits[t * words + block] = word;
}
