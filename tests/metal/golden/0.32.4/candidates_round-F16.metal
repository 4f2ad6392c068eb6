#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
[[kernel]] void custom_kernel_fs_candidates_round_float16_t_floatc_int16_t_int32_t_float_float_float(
  const device float16_t* x [[buffer(0)]],
  const constant int* x_shape [[buffer(1)]],
  const constant float* figures [[buffer(2)]],
  device int16_t* q [[buffer(3)]],
  device int32_t* sums [[buffer(4)]],
  device float* steps [[buffer(5)]],
  device float* norms [[buffer(6)]],
  device float* bounds [[buffer(7)]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint3 thread_position_in_grid [[thread_position_in_grid]]) {
// A token's groups of 64 values of x as 16-bit integers, a simdgroup a group: x ~ steps * q, step = max |x| / 32767.
// norms: at least |x|; bounds: at least |x - steps q| + gamma |x| (docs/exact.md; figures[0] is gamma). Norms are
// raised by more than their own sums round.
const int g = int(thread_position_in_grid.y), t = int(thread_position_in_grid.z);
const int lane = int(thread_index_in_simdgroup), d = x_shape[1], groups = (d + 63) / 64;
float values[2];
uint top = 0;
for (int i = 0; i < 2; i++) {
  const int column = g * 64 + i * 32 + lane;
  values[i] = column < d ? float(x[t * d + column]) : 0.0f;
  top = max(top, as_type<uint>(values[i]) & 0x7fffffffu);
}
top = simd_max(top);
const float step = as_type<float>(top) / 32767.0f;
// Steps below 2^-100 do not count, so that nothing here depends on whether the machine has subnormal numbers.
const bool finite = top < 0x7f800000u, counts = finite && step >= 7.8886090522101181e-31f;
int sum = 0;
float squares = 0.0f, rest = 0.0f;
for (int i = 0; i < 2; i++) {
  const float ratio = counts ? values[i] / step : 0.0f, rounded = rint(ratio), left = ratio - rounded;
  q[(t * groups + g) * 64 + i * 32 + lane] = int16_t(int(rounded));
  sum += int(rounded);
  squares += rounded * rounded;
  rest += left * left;
}
sum = simd_sum(sum);
squares = simd_sum(squares);
rest = simd_sum(rest);
if (lane == 0) {
  const int at = t * groups + g;
  const float remainder = precise::sqrt(rest) * 1.0000152587890625f;
  const float norm = precise::sqrt(squares) * 1.0000152587890625f + remainder;
  const float whole = finite ? max(8.0f * as_type<float>(top), 9.4039548065783e-38f) : as_type<float>(0x7f800000u);
  steps[at] = counts ? step : 0.0f;
  sums[at] = sum;
  norms[at] = counts ? norm * step : top == 0 ? 0.0f : whole;
  bounds[at] = counts ? (remainder + figures[0] * norm) * step : top == 0 ? 0.0f : 2.0f * whole;
}

}

