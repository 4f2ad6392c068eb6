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
