#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
template <int GROUP>
[[kernel]] void custom_kernel_fs_score_round__64_float_int8_t_float_float(
  const device float* x [[buffer(0)]],
  const constant int* x_shape [[buffer(1)]],
  device int8_t* q [[buffer(2)]],
  device float* steps [[buffer(3)]],
  device float* totals [[buffer(4)]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint3 thread_position_in_grid [[thread_position_in_grid]]) {
// A token's groups of x as integers, a simdgroup a group: x ~ step * q, step = max |x| / 127, half to even.
// A group that is zero or whose step is subnormal counts as zero; NaN or Inf makes the step NaN.
const int g = int(thread_position_in_grid.y), t = int(thread_position_in_grid.z);
const int lane = int(thread_index_in_simdgroup), d = x_shape[1];
const int at = t * d + g * GROUP;
uint top = 0;
for (int i = lane; i < GROUP; i += 32) top = max(top, as_type<uint>(float(x[at + i])) & 0x7fffffffu);
top = simd_max(top);
const float wide = as_type<float>(top) / 127.0f;
const bool finite = top < 0x7f800000u, counts = finite && wide >= 1.17549435e-38f;
int sum = 0;
for (int i = lane; i < GROUP; i += 32) {
  const int rounded = counts ? int(rint(float(x[at + i]) / wide)) : 0;
  q[at + i] = int8_t(rounded);
  sum += rounded;
}
sum = simd_sum(sum);
if (lane == 0) {
  steps[t * (d / GROUP) + g] = finite ? (counts ? wide : 0.0f) : as_type<float>(0x7fc00000u);
  totals[t * (d / GROUP) + g] = counts ? float(sum) : 0.0f;
}

}

template [[host_name("custom_kernel_fs_score_round__64_float_int8_t_float_float")]] [[kernel]] decltype(custom_kernel_fs_score_round__64_float_int8_t_float_float<64>) custom_kernel_fs_score_round__64_float_int8_t_float_float<64>;

