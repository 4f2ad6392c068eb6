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
