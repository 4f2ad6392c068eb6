// The activated gates of 32 neurons by a threadgroup of 8 simdgroups, and the word of those that are not zero.
// A simdgroup has four rows side by side, which share the token's values.
threadgroup float found[32];
const int d = x_shape[1], neurons = weight_shape[0], words = limits[1];
const int block = int(threadgroup_position_in_grid.x), t = int(threadgroup_position_in_grid.y);
const int lane = int(thread_index_in_simdgroup), simd = int(simdgroup_index_in_threadgroup);
const int values = 4 * PerWord<FORMAT>::values, first = block * 32 + simd * 4;
const int row_bytes = weight_shape[1];
float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
for (int c = lane; c < d / values; c += 32)
  for (int r = 0; r < 4; r++) {
    const long row = min(first + r, neurons - 1);
    float w[values];
#if QUANTIZED
    decode_parts<FORMAT, S, GROUP, 4, true>(weight + row * row_bytes, scales + row * (d / GROUP), biases + row * (d / GROUP), c, w);
#else
    decode<FORMAT, S, GROUP, 4, true>(weight + row * row_bytes, d, c, w);
#endif
    for (int i = 0; i < values; i++) sums[r] = fma(w[i], float(x[t * d + c * values + i]), sums[r]);
  }
for (int r = 0; r < 4; r++) {
  const float sum = simd_sum(sums[r]);
  const int row = first + r;
  if (lane != 0) continue;
#if HAS_BIAS
  const float score = row < neurons ? sum + bias[row] : 0.0f;
#else
  const float score = row < neurons ? sum : 0.0f;
#endif
  found[simd * 4 + r] = activate<ACTIVATION>(score, param[0]);
  if (row < neurons) activated[t * neurons + row] = found[simd * 4 + r];
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (simd == 0) {
  const bool kept = block * 32 + lane < neurons && found[lane] != 0.0f;
  const uint word = simd_or(kept ? 1u << lane : 0u);
  if (lane == 0) bits[t * words + block] = word;
}
