#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
#define HAS_CARRY 0
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
template <int FORMAT, typename S, int GROUP, bool WIDE, int TOKENS>
[[kernel]] void custom_kernel_fs_sparse_ffn_down__4_bfloat16_t_32_0_1_uint8_t_int64_t_int32_t_int32_t_float_int32_tc_float(
  const device uint8_t* slab [[buffer(0)]],
  const device int64_t* offsets [[buffer(1)]],
  const device int32_t* cols [[buffer(2)]],
  const device int32_t* bounds [[buffer(3)]],
  const device float* hidden [[buffer(4)]],
  const constant int* hidden_shape [[buffer(5)]],
  const constant int32_t* layout [[buffer(6)]],
  device float* partial [[buffer(7)]],
  uint3 thread_position_in_grid [[thread_position_in_grid]]) {
// partial[s, t, :] = carry + sum over the records p of segment s, in order, of hidden[t, cols[p]] * down_p.
// A thread owns a few columns of one segment, so that additions happen in one order; exact zeros are left out.
const int words = FORMAT == kQ8 ? 2 : FORMAT == kQ4 ? 1 : 4;
const int values = words * PerWord<FORMAT>::values;
const int tokens = hidden_shape[0], width = hidden_shape[1], d = layout[5];
const int c = int(thread_position_in_grid.x);
if (c >= d / values) return;
const int s = int(thread_position_in_grid.y);
const int first = int(thread_position_in_grid.z) * TOKENS;
float sum[TOKENS * values];
for (int t = 0; t < TOKENS; t++)
  for (int i = 0; i < values; i++)
#if HAS_CARRY
    sum[t * values + i] = first + t < tokens ? carry[(s * tokens + first + t) * d + c * values + i] : 0.0f;
#else
    sum[t * values + i] = 0.0f;
#endif
for (int p = bounds[s]; p < bounds[s + 1]; p++) {
  float h[TOKENS];
  bool any = false;
  for (int t = 0; t < TOKENS; t++) {
    h[t] = first + t < tokens ? hidden[(first + t) * width + cols[p]] : 0.0f;
    any = any || h[t] != 0.0f;
  }
  if (!any) continue;
  float w[values];
  decode<FORMAT, S, GROUP, words, WIDE>(slab + offsets[p] + layout[4], d, c, w);
  for (int t = 0; t < TOKENS; t++)
    if (h[t] != 0.0f)
      for (int i = 0; i < values; i++) sum[t * values + i] = fma(h[t], w[i], sum[t * values + i]);
}
for (int t = 0; t < TOKENS && first + t < tokens; t++)
  for (int i = 0; i < values; i++) partial[(s * tokens + first + t) * d + c * values + i] = sum[t * values + i];

}

template [[host_name("custom_kernel_fs_sparse_ffn_down__4_bfloat16_t_32_0_1_uint8_t_int64_t_int32_t_int32_t_float_int32_tc_float")]] [[kernel]] decltype(custom_kernel_fs_sparse_ffn_down__4_bfloat16_t_32_0_1_uint8_t_int64_t_int32_t_int32_t_float_int32_tc_float<4, bfloat16_t, 32, 0, 1>) custom_kernel_fs_sparse_ffn_down__4_bfloat16_t_32_0_1_uint8_t_int64_t_int32_t_int32_t_float_int32_tc_float<4, bfloat16_t, 32, 0, 1>;

