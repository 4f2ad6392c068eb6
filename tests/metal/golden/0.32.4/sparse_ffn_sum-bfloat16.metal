#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
template <typename T>
[[kernel]] void custom_kernel_fs_sparse_ffn_sum__bfloat16_t_float_bfloat16_t(
  const device float* partial [[buffer(0)]],
  const constant int* partial_shape [[buffer(1)]],
  device bfloat16_t* y [[buffer(2)]],
  uint3 thread_position_in_grid [[thread_position_in_grid]],
  uint3 threads_per_grid [[threads_per_grid]]) {
// y = the sum over segments of partial [segments, ...], one after the other.
const int i = int(thread_position_in_grid.x);
float sum = 0.0f;
for (int s = 0; s < partial_shape[0]; s++) sum += partial[s * int(threads_per_grid.x) + i];
y[i] = T(sum);

}

template [[host_name("custom_kernel_fs_sparse_ffn_sum__bfloat16_t_float_bfloat16_t")]] [[kernel]] decltype(custom_kernel_fs_sparse_ffn_sum__bfloat16_t_float_bfloat16_t<bfloat16_t>) custom_kernel_fs_sparse_ffn_sum__bfloat16_t_float_bfloat16_t<bfloat16_t>;

