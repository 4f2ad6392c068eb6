#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
#define HAS_BIAS 1
[[kernel]] void custom_kernel_fs_candidates_has_bias_int16_t_int32_tc_floatc_floatc_floatc_int8_t_uint8_t_uint16_t_float_int32_tc_floatc_float_uint32_t(
  const device int16_t* q [[buffer(0)]],
  const constant int32_t* sums [[buffer(1)]],
  const constant float* steps [[buffer(2)]],
  const constant int* steps_shape [[buffer(3)]],
  const constant float* norms [[buffer(4)]],
  const constant float* bounds [[buffer(5)]],
  const device int8_t* high [[buffer(6)]],
  const device uint8_t* low [[buffer(7)]],
  const device uint16_t* scales [[buffer(8)]],
  const device float* errors [[buffer(9)]],
  const constant int32_t* limits [[buffer(10)]],
  const constant float* figures [[buffer(11)]],
  const device float* bias [[buffer(12)]],
  device uint32_t* bits [[buffer(13)]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]) {
// The word of the neurons, of 32 by a threadgroup of 8 simdgroups, eight lanes a neuron, whose exact gate may be active:
// docs/exact.md's bound in float32, with `figures`: gamma, the factor for rounding in the bound, what underflow takes,
// and the limit below which the activation is zero. Doubles are not needed: what float32 rounds is added to the bound.
threadgroup uint found[32];
const int groups = steps_shape[1], neurons = limits[0], words = limits[1];
const int block = int(threadgroup_position_in_grid.x), t = int(threadgroup_position_in_grid.y);
const int lane = int(thread_index_in_simdgroup), simd = int(simdgroup_index_in_threadgroup);
const int inner = simd * 4 + lane / 8, row = block * 32 + inner;
float score = 0.0f, norm = 0.0f, rest = 0.0f;
uint touched = 0;
if (row < neurons)
  for (int g = lane & 7; g < groups; g += 8) {
    const int at = t * groups + g;
    const uint stored = scales[row * groups + g];
    const float scale = as_type<float>(stored << 16);
    const device uint4* weights = (const device uint4*)(high + (long(row) * groups + g) * 64);
    int products = 0;
    for (int c = 0; c < 4; c++) {
      const uint4 chunk = weights[c];
      for (int i = 0; i < 16; i++)
        products += (int(chunk[i / 4] << (24 - 8 * (i % 4))) >> 24) * int(q[at * 64 + c * 16 + i]);
    }
    score += scale * float(products) * steps[at];
    norm += scale * norms[at];
    rest += scale * bounds[at];
    if (stored != 0 && norms[at] != 0.0f) {
      touched = 1;
      if (stored < (27u << 7)) norm = as_type<float>(0x7f800000u);  // below 2^-100: weights may be subnormal
    }
  }
score += simd_shuffle_xor(score, 4);
score += simd_shuffle_xor(score, 2);
score += simd_shuffle_xor(score, 1);
norm += simd_shuffle_xor(norm, 4);
norm += simd_shuffle_xor(norm, 2);
norm += simd_shuffle_xor(norm, 1);
rest += simd_shuffle_xor(rest, 4);
rest += simd_shuffle_xor(rest, 2);
rest += simd_shuffle_xor(rest, 1);
touched |= simd_shuffle_xor(touched, 4);
touched |= simd_shuffle_xor(touched, 2);
touched |= simd_shuffle_xor(touched, 1);

// All eight lanes have the same figures, and so the same verdict: 0 out, 1 candidate, 2 left open by the high bits.
const int safe_row = min(row, neurons - 1);
#if HAS_BIAS
score += bias[safe_row];
#endif
const float limit = figures[3], tiny = touched != 0 ? figures[2] : 0.0f, whole = errors[3 * safe_row + 2];
const float coarse = (errors[3 * safe_row] * norm + whole * rest) * figures[1] + tiny;
const float fine = (errors[3 * safe_row + 1] * norm + whole * rest) * figures[1] + tiny;
const float rounding = 4.76837158203125e-7f;  // 2^-21: of the additions here, in shares of what is added
const float first = coarse + (fabs(score) + fabs(limit)) * rounding;
int verdict = 2;
if (!(whole * norm < 8.507059173023462e37f)) verdict = 1;  // 2^126: sums may overflow, or something is not finite
else if (score + first <= limit) verdict = 0;
else if (score - first > limit) verdict = 1;
if (row >= neurons) verdict = 0;
float refined = 0.0f;
if (verdict == 2)
  for (int g = lane & 7; g < groups; g += 8) {
    const int at = t * groups + g;
    const device uint4* weights = (const device uint4*)(low + (long(row) * groups + g) * 32);
    int products = 0;
    for (int c = 0; c < 2; c++) {
      const uint4 chunk = weights[c];
      for (int i = 0; i < 16; i++) {
        const int byte = int(chunk[i / 4] >> (8 * (i % 4)) & 255u), column = at * 64 + c * 16 + i;
        products += (byte & 15) * int(q[column]) + (byte >> 4) * int(q[column + 32]);
      }
    }
    refined += as_type<float>(uint(scales[row * groups + g]) << 16) * float(products - 8 * sums[at]) * steps[at];
  }
refined += simd_shuffle_xor(refined, 4);
refined += simd_shuffle_xor(refined, 2);
refined += simd_shuffle_xor(refined, 1);
if (verdict == 2) {
  const float both = score + refined * 0.0625f;
  const float second = fine + (fabs(score) + fabs(both) + fabs(limit)) * rounding;
  verdict = both + second <= limit ? 0 : 1;
}
if ((lane & 7) == 0) found[inner] = uint(verdict);
threadgroup_barrier(mem_flags::mem_threadgroup);
if (simd == 0) {
  const uint word = simd_or(found[lane] << lane);
  if (lane == 0) bits[t * words + block] = word;
}

}

