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
