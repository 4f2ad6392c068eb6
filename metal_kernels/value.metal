// Values |act(gate)| |up| norm of 32 neurons by low-bit copies, as score does scores, and the word of those not below the
// threshold. Without an up copy, |act(gate)| norm.
threadgroup float found[32];
const int d = q_shape[1], groups = d / GROUP, neurons = limits[0], words = limits[1];
const int block = int(threadgroup_position_in_grid.x), t = int(threadgroup_position_in_grid.y);
const int lane = int(thread_index_in_simdgroup), simd = int(simdgroup_index_in_threadgroup);
const int inner = simd * 4 + lane / 8, row = block * 32 + inner;
float opened = 0.0f;
if (row < neurons)
  opened = row_share<BITS, GROUP>(weight, scales, biases, q + t * d, steps + t * groups, totals + t * groups, row, groups, lane & 7);
opened = row_sum(opened);
#if HAS_BIAS
if (row < neurons) opened += bias[row];
#endif
float value = fabs(activate<ACTIVATION>(opened, param[0]));
#if HAS_UP
float lifted = 0.0f;
if (row < neurons)
  lifted = row_share<BITS, GROUP>(up, up_scales, up_biases, q + t * d, steps + t * groups, totals + t * groups, row, groups, lane & 7);
lifted = row_sum(lifted);
#if HAS_UP_BIAS
if (row < neurons) lifted += up_bias[row];
#endif
if (ACTIVATION == kDrelu) lifted = relu(lifted);
value *= fabs(lifted);
#endif
if ((lane & 7) == 0) {
  found[inner] = row < neurons ? value * norms[row] : 0.0f;
  if (row < neurons) scores[t * neurons + row] = found[inner];
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (simd == 0) {
  const bool kept = block * 32 + lane < neurons && !(found[lane] < threshold[0]);
  const uint word = simd_or(kept ? 1u << lane : 0u);
  if (lane == 0) bits[t * words + block] = word;
}
