#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
#define HAS_ACTIVATED 0
#define HAS_MASK 0
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
template <int FORMAT, typename S, int GROUP, bool WIDE, int TOKENS, int ACTIVATION, bool GATED>
[[kernel]] void custom_kernel_fs_sparse_ffn_hidden__0_float_32_1_1_1_1_uint8_t_int64_t_int32_tc_int32_tc_floatc_float_float(
  const device uint8_t* slab [[buffer(0)]],
  const device int64_t* offsets [[buffer(1)]],
  const constant int* offsets_shape [[buffer(2)]],
  const constant int32_t* count [[buffer(3)]],
  const constant int32_t* layout [[buffer(4)]],
  const constant float* param [[buffer(5)]],
  const device float* x [[buffer(6)]],
  const constant int* x_shape [[buffer(7)]],
  device float* hidden [[buffer(8)]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint3 thread_position_in_grid [[thread_position_in_grid]]) {
// hidden[t, j] of record j: one simdgroup each, its lanes sharing the row in chunks of 16 bytes.
// layout: byte offsets of gate, gate_bias, up, up_bias, down in a record, -1 where absent.
const int j = int(thread_position_in_grid.y);
if (j >= count[0]) return;  // the whole simdgroup
const int lane = int(thread_index_in_simdgroup);
const int first = int(thread_position_in_grid.z) * TOKENS;
const int tokens = x_shape[0], d = x_shape[1], records = offsets_shape[0];
const device uint8_t* record = slab + offsets[j];
const int values = 4 * PerWord<FORMAT>::values;
float gate[TOKENS];
bool any = false;

#if HAS_ACTIVATED
for (int t = 0; t < TOKENS; t++) {
  gate[t] = first + t < tokens ? activated[(first + t) * records + j] : 0.0f;
  any = any || gate[t] != 0.0f;
}
#else
const int row = GATED ? layout[0] : layout[2], bias_at = GATED ? layout[1] : layout[3];
for (int t = 0; t < TOKENS; t++) gate[t] = 0.0f;
for (int c = lane; c < d / values; c += 32) {
  float w[values];
  decode<FORMAT, S, GROUP, 4, WIDE>(record + row, d, c, w);
  for (int t = 0; t < TOKENS && first + t < tokens; t++)
    for (int i = 0; i < values; i++) gate[t] = fma(w[i], float(x[(first + t) * d + c * values + i]), gate[t]);
}
const float bias = bias_at < 0 ? 0.0f : value_at<S>(record + bias_at);
for (int t = 0; t < TOKENS; t++) {
  gate[t] = activate<ACTIVATION>(simd_sum(gate[t]) + bias, param[0]);
  if (first + t >= tokens) gate[t] = 0.0f;
  any = any || gate[t] != 0.0f;
}
#endif

#if HAS_MASK
any = false;
for (int t = 0; t < TOKENS && first + t < tokens; t++) {
  if (mask[(first + t) * records + j] == 0) gate[t] = 0.0f;
  any = any || gate[t] != 0.0f;
}
#endif

// A gate of exactly zero gives exactly zero, and no token's gate needs an up row that all leave out.
float up[TOKENS];
for (int t = 0; t < TOKENS; t++) up[t] = 1.0f;
if (GATED && any) {
  for (int t = 0; t < TOKENS; t++) up[t] = 0.0f;
  for (int c = lane; c < d / values; c += 32) {
    float w[values];
    decode<FORMAT, S, GROUP, 4, WIDE>(record + layout[2], d, c, w);
    for (int t = 0; t < TOKENS && first + t < tokens; t++)
      for (int i = 0; i < values; i++) up[t] = fma(w[i], float(x[(first + t) * d + c * values + i]), up[t]);
  }
  const float lift = layout[3] < 0 ? 0.0f : value_at<S>(record + layout[3]);
  for (int t = 0; t < TOKENS; t++) {
    up[t] = simd_sum(up[t]) + lift;
    if (ACTIVATION == kDrelu) up[t] = relu(up[t]);
  }
}
if (lane == 0)
  for (int t = 0; t < TOKENS && first + t < tokens; t++)
    hidden[(first + t) * records + j] = gate[t] == 0.0f ? 0.0f : gate[t] * up[t];

}

template [[host_name("custom_kernel_fs_sparse_ffn_hidden__0_float_32_1_1_1_1_uint8_t_int64_t_int32_tc_int32_tc_floatc_float_float")]] [[kernel]] decltype(custom_kernel_fs_sparse_ffn_hidden__0_float_32_1_1_1_1_uint8_t_int64_t_int32_tc_int32_tc_floatc_float_float<0, float, 32, 1, 1, 1, 1>) custom_kernel_fs_sparse_ffn_hidden__0_float_32_1_1_1_1_uint8_t_int64_t_int32_tc_int32_tc_floatc_float_float<0, float, 32, 1, 1, 1, 1>;

