// Random bits and stochastic rounding, bit for bit those of qcompile/ir/rounding.py and stochastic_cast.py.
//
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Element i has half (i mod 2) of word
// ((i mod 8) div 2) of the block with counter (i div 8, stream) and key seed: the words of blocks in a row, in memory, are
// the elements' 16 bits in a row (of a little-endian machine). One block is in one lane of 64 bits, of which a product
// reads the lower half: what else gets into the upper halves does no harm, and nothing is masked until the end.
#if defined(__AVX512F__)
constexpr int PHILOX_LANES = 8;
#elif defined(__AVX2__)
constexpr int PHILOX_LANES = 4;
#else
constexpr int PHILOX_LANES = 2;
#endif
typedef uint64_t PhiloxWord __attribute__((vector_size(8 * PHILOX_LANES)));
constexpr int PHILOX_BATCH = 128;  // elements that are made together: two vectors or more, so that products overlap

INL PhiloxWord low_product(PhiloxWord a, uint32_t b) {
#if defined(__AVX512F__)
  return (PhiloxWord)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (PhiloxWord)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xFFFFFFFF) * b;
#endif
}

struct Philox {
  uint64_t seed;
  uint32_t stream0, stream1;

  // The 128 elements of blocks first, first + 1, ... first + 15.
  INL void batch(uint64_t first, uint16_t* out) const {
    constexpr int V = PHILOX_BATCH / 8 / PHILOX_LANES;
    PhiloxWord c0[V], c1[V], c2[V], c3[V];
    UNROLL for (int v = 0; v < V; v++) {
      UNROLL for (int i = 0; i < PHILOX_LANES; i++) c0[v][i] = first + (uint64_t)(v * PHILOX_LANES + i);
      c1[v] = c0[v] >> 32, c2[v] = PhiloxWord{} + stream0, c3[v] = PhiloxWord{} + stream1;
    }
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
      UNROLL for (int v = 0; v < V; v++) {
        PhiloxWord p0 = low_product(c0[v], 0xD2511F53u), p1 = low_product(c2[v], 0xCD9E8D57u);
        c0[v] = (p1 >> 32) ^ c1[v] ^ k0, c1[v] = p1;
        c2[v] = (p0 >> 32) ^ c3[v] ^ k1, c3[v] = p0;
      }
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    UNROLL for (int v = 0; v < V; v++) {
      const PhiloxWord low = (c0[v] & 0xFFFFFFFF) | c1[v] << 32, high = (c2[v] & 0xFFFFFFFF) | c3[v] << 32;
      UNROLL for (int i = 0; i < PHILOX_LANES; i++) {
        const uint64_t words[2] = {low[i], high[i]};
        memcpy(out + 8 * (v * PHILOX_LANES + i), words, sizeof words);
      }
    }
  }

  // Calls body(i, n, bits) for all of 0 .. count - 1, a run i .. i + n - 1 at a time: bits[j] are those of the element with the
  // global index offset + i + j. n is at most 128, and 128 but at the ends.
  template <class Body> INL void each(int64_t count, uint64_t offset, Body&& body) const {
    alignas(64) uint16_t bits[PHILOX_BATCH];
    int64_t skip = (int64_t)(offset % 8);
    for (int64_t i = -skip; i < count; i += PHILOX_BATCH) {
      batch(offset / 8 + (uint64_t)((i + skip) / 8), bits);
      const int64_t begin = i < 0 ? 0 : i, end = i + PHILOX_BATCH < count ? i + PHILOX_BATCH : count;
      body(begin, end - begin, bits + (begin - i));
    }
  }
};

INL uint32_t float_bits(float x) {
  uint32_t word;
  memcpy(&word, &x, sizeof word);
  return word;
}
INL float bits_float(uint32_t word) {
  float x;
  memcpy(&x, &word, sizeof x);
  return x;
}
// The pattern of x in bf16, up with the probability of the fraction.
INL uint16_t stochastic_bf16(float x, uint32_t bits) {
  const uint32_t word = float_bits(x);
  return (uint16_t)((word & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : (word + bits) >> 16);
}
// ... in fp16. Beside 2^-14 the last place of a float is 2^-13 of a subnormal spacing.
INL uint16_t stochastic_fp16(float x, uint32_t bits) {
  const uint32_t word = float_bits(x), size = word & 0x7FFFFFFF;
  const uint32_t moved = float_bits(bits_float(size) + 0x1p-14f) - 0x800000;
  const uint32_t rounded = (((size < 0x38800000 ? moved : size) + (bits >> 3)) >> 13) - 0x1C000;
  const uint32_t pattern = (rounded < 0x7C00 ? rounded : 0x7C00) | (word >> 16 & 0x8000);
  return (uint16_t)(size > 0x7F800000 ? 0x7E00 : pattern);
}
// t as an integer, up with the probability of the fraction: round_to_integer in rounding.py.
INL float stochastic_integer(float t, uint32_t bits) {
  const float low = std::floor(t);
  return low + ((t - low) * 65536.0f + 0.5f >= (float)(int32_t)(65536 - bits) ? 1.0f : 0.0f);
}
