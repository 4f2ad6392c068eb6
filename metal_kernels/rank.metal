// Orders like the scores do: NaN above all, -0 equal to 0.
inline uint rank_key(float score) {
  if (isnan(score)) return 0xffffffffu;
  const uint bits = as_type<uint>(score == 0.0f ? 0.0f : score);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
