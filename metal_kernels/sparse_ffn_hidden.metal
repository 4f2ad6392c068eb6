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
