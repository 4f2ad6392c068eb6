// The ascending neurons whose bit is set for some token, by one threadgroup: ids, their number, and each token's mask.
// bits [T, words]: neuron i is bit i % 32 of word i / 32; no bit at or beyond `neurons` is set.
threadgroup uint sums[32];
const int tokens = bits_shape[0], words = bits_shape[1], neurons = limits[0];
const uint thread_at = thread_index_in_threadgroup, lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
uint base = 0;
for (int start = 0; start < words; start += 1024) {
  const int w = start + int(thread_at);
  uint any = 0;
  if (w < words)
    for (int t = 0; t < tokens; t++) any |= bits[t * words + w];
  uint all = 0;
  uint at = base + scan(popcount(any), lane, simd, sums, all);
  for (uint left = any; left != 0; left &= left - 1) {
    const uint bit = ctz(left);
    ids[at] = w * 32 + int(bit);
    for (int t = 0; t < tokens; t++) mask[t * neurons + int(at)] = uint8_t(bits[t * words + w] >> bit & 1);
    at++;
  }
  base += all;
}
if (thread_at == 0) count[0] = int(base);
