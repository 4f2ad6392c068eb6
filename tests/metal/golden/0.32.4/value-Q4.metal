#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
#define HAS_BIAS 0
#define HAS_UP 1
#define HAS_UP_BIAS 0
// Header of every kernel that reads records: stored vectors in chunks of 32-bit words, and the activations.
// A vector begins at a multiple of 4 bytes, or of 16 where WIDE; a quantized one is words, scales, biases back to back.

enum { kF32 = 0, kF16 = 1, kBF16 = 2, kQ8 = 3, kQ4 = 4 };
enum { kSilu = 0, kRelu = 1, kRelu2 = 2, kFatrelu = 3, kDrelu = 4 };

template <int FORMAT> struct PerWord {
  enum { values = FORMAT == kF32 ? 1 : FORMAT == kQ8 ? 4 : FORMAT == kQ4 ? 8 : 2 };
};

// w = chunk c (WORDS words) of the vector whose words are at `at`; S: the type of its scales and biases, which are not
// read unless FORMAT is quantized.
template <int FORMAT, typename S, int GROUP, int WORDS, bool WIDE>
inline void decode_parts(const device uint8_t* at, const device S* scales, const device S* biases, int c, thread float* w) {
  uint words[WORDS];
  if (WIDE && WORDS == 4) {
    uint4 all = *(const device uint4*)(at + 16 * c);
    for (int i = 0; i < WORDS; i++) words[i] = all[i & 3];
  } else {
    for (int i = 0; i < WORDS; i++) words[i] = ((const device uint*)at)[c * WORDS + i];
  }
  if (FORMAT == kF32) {
    for (int i = 0; i < WORDS; i++) w[i] = as_type<float>(words[i]);
  } else if (FORMAT == kF16) {
    for (int i = 0; i < WORDS; i++) {
      half2 pair = as_type<half2>(words[i]);
      w[2 * i] = float(pair.x);
      w[2 * i + 1] = float(pair.y);
    }
  } else if (FORMAT == kBF16) {
    for (int i = 0; i < WORDS; i++) {
      w[2 * i] = as_type<float>(words[i] << 16);
      w[2 * i + 1] = as_type<float>(words[i] & 0xffff0000u);
    }
  } else {
    const int per_word = PerWord<FORMAT>::values, bits = 32 / per_word;
    const int group = c * WORDS * per_word / GROUP;
    const float scale = float(scales[group]), bias = float(biases[group]);
    for (int i = 0; i < WORDS * per_word; i++) {
      const uint q = words[i / per_word] >> (bits * (i % per_word)) & ((1u << bits) - 1u);
      w[i] = fma(float(q), scale, bias);
    }
  }
}

// The same of a record's vector of d values, whose scales and biases follow the words.
template <int FORMAT, typename S, int GROUP, int WORDS, bool WIDE>
inline void decode(const device uint8_t* at, int d, int c, thread float* w) {
  const device S* scales = (const device S*)(at + d / PerWord<FORMAT>::values * 4);
  decode_parts<FORMAT, S, GROUP, WORDS, WIDE>(at, scales, scales + d / GROUP, c, w);
}

// NaN passes, so that a broken model does not look like a sparse one.
inline float relu(float v) { return v > 0.0f || isnan(v) ? v : 0.0f; }

template <int ACTIVATION>
inline float activate(float v, float param) {
  if (ACTIVATION == kSilu) return v / (1.0f + precise::exp(-v));
  if (ACTIVATION == kRelu2) return relu(v) * relu(v);
  if (ACTIVATION == kFatrelu) return v >= param || isnan(v) ? v : 0.0f;
  return relu(v);
}

template <typename S>
inline float value_at(const device uint8_t* at) { return float(*(const device S*)at); }
// Header of the kernels that score by low-bit copies: what one of the eight lanes of a row adds to the row's product.
// Copies are MLX's bit streams: 32 values are BITS words, value i at bit BITS * i, across a word's end at 3 bits. A lane
// adds the groups part, part + 8, ...; products are exact integers and no operation is fused, so that the bits are the
// CPU's. The pointers' types are deduced, since short arrays come in the constant address space.
template <int BITS, int GROUP, typename Words, typename Parts, typename Token, typename Floats>
inline float row_share(Words weight, Parts scales, Parts biases, Token q, Floats steps, Floats totals, int row, int groups, int part) {
  float sum = 0.0f;
  for (int g = part; g < groups; g += 8) {
    int products = 0;
    for (int k = 0; k < GROUP / 32; k++) {
      uint words[BITS + 1];
      words[BITS] = 0;
      for (int i = 0; i < BITS; i++) words[i] = weight[(row * groups + g) * (GROUP / 32 * BITS) + k * BITS + i];
      for (int i = 0; i < 32; i++) {
        const int bit = BITS * i % 32;
        uint value = words[BITS * i / 32] >> bit;
        if (bit + BITS > 32) value |= words[BITS * i / 32 + 1] << (32 - bit);
        products += int(value & ((1u << BITS) - 1u)) * int(q[g * GROUP + k * 32 + i]);
      }
    }
    const float scaled = float(scales[row * groups + g]) * float(products);
    const float shifted = float(biases[row * groups + g]) * totals[g];
    sum += steps[g] * (scaled + shifted);
  }
  return sum;
}

// The eight shares added, in one order; every lane of the row has the same bits.
inline float row_sum(float sum) {
  sum += simd_shuffle_xor(sum, 4);
  sum += simd_shuffle_xor(sum, 2);
  sum += simd_shuffle_xor(sum, 1);
  return sum;
}
template <int GROUP, int BITS, int ACTIVATION>
[[kernel]] void custom_kernel_fs_value_has_up__64_4_4_int8_t_floatc_floatc_uint32_t_float16_t_float16_t_float_int32_tc_floatc_floatc_uint32_t_float16_t_float16_t_float_uint32_t(
  const device int8_t* q [[buffer(0)]],
  const constant int* q_shape [[buffer(1)]],
  const constant float* steps [[buffer(2)]],
  const constant float* totals [[buffer(3)]],
  const device uint32_t* weight [[buffer(4)]],
  const device float16_t* scales [[buffer(5)]],
  const device float16_t* biases [[buffer(6)]],
  const device float* norms [[buffer(7)]],
  const constant int32_t* limits [[buffer(8)]],
  const constant float* threshold [[buffer(9)]],
  const constant float* param [[buffer(10)]],
  const device uint32_t* up [[buffer(11)]],
  const device float16_t* up_scales [[buffer(12)]],
  const device float16_t* up_biases [[buffer(13)]],
  device float* scores [[buffer(14)]],
  device uint32_t* bits [[buffer(15)]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]) {
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

}

template [[host_name("custom_kernel_fs_value_has_up__64_4_4_int8_t_floatc_floatc_uint32_t_float16_t_float16_t_float_int32_tc_floatc_floatc_uint32_t_float16_t_float16_t_float_uint32_t")]] [[kernel]] decltype(custom_kernel_fs_value_has_up__64_4_4_int8_t_floatc_floatc_uint32_t_float16_t_float16_t_float_int32_tc_floatc_floatc_uint32_t_float16_t_float16_t_float_uint32_t<64, 4, 4>) custom_kernel_fs_value_has_up__64_4_4_int8_t_floatc_floatc_uint32_t_float16_t_float16_t_float_int32_tc_floatc_floatc_uint32_t_float16_t_float16_t_float_uint32_t<64, 4, 4>;

