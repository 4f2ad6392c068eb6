// Scores of 32 neurons by a threadgroup of 8 simdgroups, and the word of those not below the threshold.
// A row is eight lanes': lane l adds the groups l, l + 8, ..., then one fixed final sum, as the CPU's kernels do, so that
// scores agree in their bits (products are exact integers, and no operation is fused).
threadgroup float found[32];
const int d = q_shape[1], groups = d / GROUP, neurons = limits[0], words = limits[1];
const int block = int(threadgroup_position_in_grid.x), t = int(threadgroup_position_in_grid.y);
const int lane = int(thread_index_in_simdgroup), simd = int(simdgroup_index_in_threadgroup);
const int inner = simd * 4 + lane / 8, row = block * 32 + inner;
const int per_word = 32 / BITS, row_words = d / per_word;
float sum = 0.0f;
if (row < neurons)
  for (int g = lane & 7; g < groups; g += 8) {
    int products = 0;
    for (int k = 0; k < GROUP / per_word; k++) {
      const uint word = weight[row * row_words + g * (GROUP / per_word) + k];
      for (int i = 0; i < per_word; i++)
        products += int(word >> (BITS * i) & ((1u << BITS) - 1u)) * int(q[t * d + g * GROUP + k * per_word + i]);
    }
    const float scaled = float(scales[row * groups + g]) * float(products);
    const float shifted = float(biases[row * groups + g]) * totals[t * groups + g];
    sum += steps[t * groups + g] * (scaled + shifted);
  }
sum += simd_shuffle_xor(sum, 4);
sum += simd_shuffle_xor(sum, 2);
sum += simd_shuffle_xor(sum, 1);
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
