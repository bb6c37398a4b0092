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

INL PhiloxWord low_product(PhiloxWord a, uint32_t b) {
#if defined(__AVX512F__)
  return (PhiloxWord)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (PhiloxWord)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xFFFFFFFF) * b;
#endif
}
// Lanes 0, 2, ... of two words in turn, and lanes 1, 3, ...
INL PhiloxWord even_lanes(PhiloxWord a, PhiloxWord b) {
#if defined(__AVX512F__)
  return (PhiloxWord)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (PhiloxWord)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
#else
  return PhiloxWord{a[0], b[0]};
#endif
}
INL PhiloxWord odd_lanes(PhiloxWord a, PhiloxWord b) {
#if defined(__AVX512F__)
  return (PhiloxWord)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (PhiloxWord)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#else
  return PhiloxWord{a[1], b[1]};
#endif
}

struct Philox {
  uint64_t seed;
  uint32_t stream0, stream1;
  static constexpr int VECTORS = 4;  // independent ones, which hide the latency of products
  static constexpr int BATCH = 8 * PHILOX_LANES * VECTORS;

  // The bits of the elements of blocks first, first + 1, ...; BATCH of them.
  INL void batch(uint64_t first, uint16_t* out) const {
    // Even lanes have the first half of a vector's blocks, odd ones the second: what they make lies in a row.
    PhiloxWord place, c0[VECTORS], c1[VECTORS], c2[VECTORS], c3[VECTORS];
    UNROLL for (int i = 0; i < PHILOX_LANES; i++) place[i] = (uint64_t)(i / 2 + i % 2 * (PHILOX_LANES / 2));
    UNROLL for (int v = 0; v < VECTORS; v++) {
      c0[v] = place + (first + (uint64_t)(v * PHILOX_LANES));
      c1[v] = c0[v] >> 32, c2[v] = PhiloxWord{} + stream0, c3[v] = PhiloxWord{} + stream1;
    }
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
      UNROLL for (int v = 0; v < VECTORS; v++) {
        PhiloxWord p0 = low_product(c0[v], 0xD2511F53u), p1 = low_product(c2[v], 0xCD9E8D57u);
        c0[v] = (p1 >> 32) ^ c1[v] ^ k0, c1[v] = p1;
        c2[v] = (p0 >> 32) ^ c3[v] ^ k1, c3[v] = p0;
      }
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    UNROLL for (int v = 0; v < VECTORS; v++) {
      const PhiloxWord low = (c0[v] & 0xFFFFFFFF) | c1[v] << 32, high = (c2[v] & 0xFFFFFFFF) | c3[v] << 32;
      const PhiloxWord rows[2] = {even_lanes(low, high), odd_lanes(low, high)};
      memcpy(out + 8 * PHILOX_LANES * v, rows, sizeof rows);
    }
  }

  // The bits of COUNT elements from the one with this global index on: a place in `out`, which has room for BATCH more.
  template <int COUNT> INL const uint16_t* fill(uint64_t index, uint16_t* out) const {
    const int skip = (int)(index % 8);
    for (int i = 0; i < COUNT + skip; i += BATCH) batch(index / 8 + (uint64_t)(i / 8), out + i);
    return out + skip;
  }
};

// Lanes of 32 bits; `bits` are 0 .. 65535. The pattern of x in bf16, up with the probability of the fraction.
INL VI stochastic_bf16(VF x, VI bits) {
  return fbits(fsel(fnan(x), ffrom(iset(0x7FC0)), ffrom(ishr<16>(iadd(fbits(x), bits)))));
}
// ... in fp16. Beside 2^-14 the last place of a float is 2^-13 of a subnormal spacing.
INL VI stochastic_fp16(VF x, VI bits) {
  const VI size = iand(fbits(x), iset(0x7FFFFFFF)), infinity = iset(0x7C00);
  const VI moved = isub(fbits(fadd(ffrom(size), fset(0x1p-14f))), iset(0x800000));
  const VI wide = fbits(fsel(flt(ffrom(size), fset(0x1p-14f)), ffrom(moved), ffrom(size)));
  const VI rounded = isub(ishr<13>(iadd(wide, ishr<3>(bits))), iset(0x1C000));
  const VI least = isub(infinity, imax(isub(infinity, rounded), iset(0)));
  const VI pattern = ior(least, iand(ishr<16>(fbits(x)), iset(0x8000)));
  return fbits(fsel(fnan(x), ffrom(iset(0x7E00)), ffrom(pattern)));
}
// t, less than 2^22 in size, as an integer, up with the probability of the fraction: round_to_integer in rounding.py.
INL VF stochastic_integer(VF t, VI bits) {
  const VF one = fset(1.0f), nearest = fcvt(fround(t)), low = fsel(flt(t, nearest), fsub(nearest, one), nearest);
  const VF part = fadd(fmul(fsub(t, low), fset(65536.0f)), fset(0.5f));
  return fsel(flt(part, fcvt(isub(iset(65536), bits))), low, fadd(low, one));
}
