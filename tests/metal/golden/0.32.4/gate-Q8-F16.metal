#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
#define QUANTIZED 1
#define HAS_BIAS 0
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
template <int FORMAT, typename S, int GROUP, int ACTIVATION>
[[kernel]] void custom_kernel_fs_gate_quantized__3_float16_t_64_1_uint8_t_float_int32_tc_floatc_float16_t_float16_t_float_uint32_t(
  const device uint8_t* weight [[buffer(0)]],
  const constant int* weight_shape [[buffer(1)]],
  const device float* x [[buffer(2)]],
  const constant int* x_shape [[buffer(3)]],
  const constant int32_t* limits [[buffer(4)]],
  const constant float* param [[buffer(5)]],
  const device float16_t* scales [[buffer(6)]],
  const device float16_t* biases [[buffer(7)]],
  device float* activated [[buffer(8)]],
  device uint32_t* bits [[buffer(9)]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]) {
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

}

template [[host_name("custom_kernel_fs_gate_quantized__3_float16_t_64_1_uint8_t_float_int32_tc_floatc_float16_t_float16_t_float_uint32_t")]] [[kernel]] decltype(custom_kernel_fs_gate_quantized__3_float16_t_64_1_uint8_t_float_int32_tc_floatc_float16_t_float16_t_float_uint32_t<3, float16_t, 64, 1>) custom_kernel_fs_gate_quantized__3_float16_t_64_1_uint8_t_float_int32_tc_floatc_float16_t_float16_t_float_uint32_t<3, float16_t, 64, 1>;

