// A step's arithmetic and storages, bit for bit those of qcompile/ir/step_reference.py and qcompile/ir/state.py.
// before: TILE; the fragments work on 16 elements, tables on 64 at once.

// ------------------------------------------------------------------------------------------------------------ operations
INL VF s_neg(VF a) { return ffrom(isub(fbits(a), iset(INT32_MIN))); }
INL VI size_bits(VF a) { return iand(fbits(a), iset(0x7fffffff)); }
INL VF s_abs(VF a) { return ffrom(size_bits(a)); }
INL VF s_sign(VF a) { return fsel(flt(fset(0.0f), a), fset(1.0f), fsel(flt(a, fset(0.0f)), fset(-1.0f), a)); }
INL VF s_maximum(VF a, VF b) { return fsel(flt(b, a), a, fsel(fnan(a), a, b)); }
INL VF s_minimum(VF a, VF b) { return fsel(flt(a, b), a, fsel(fnan(a), a, b)); }
INL VF s_where_lt(VF a, VF b, VF yes, VF no) { return fsel(flt(a, b), yes, no); }
INL VF s_where_gt(VF a, VF b, VF yes, VF no) { return fsel(flt(b, a), yes, no); }
INL VF unordered(VF a, VF b, VF yes, VF no) { return fsel(fnan(a), yes, fsel(fnan(b), yes, no)); }
INL VF s_where_le(VF a, VF b, VF yes, VF no) { return unordered(a, b, no, fsel(flt(b, a), no, yes)); }
INL VF s_where_ge(VF a, VF b, VF yes, VF no) { return unordered(a, b, no, fsel(flt(a, b), no, yes)); }
INL VF s_where_ne(VF a, VF b, VF yes, VF no) {
  return unordered(a, b, yes, fsel(flt(a, b), yes, fsel(flt(b, a), yes, no)));
}
INL VF s_where_eq(VF a, VF b, VF yes, VF no) { return s_where_ne(a, b, no, yes); }

struct Random {
  Philox philox;
  uint64_t offset;  // global index of the tile's first element
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

// ------------------------------------------------------------------------------------------------------- formats of codes
// 4 bits, two per byte <-> a byte each.
typedef uint8_t B32 __attribute__((vector_size(32)));
typedef uint16_t H32 __attribute__((vector_size(64)));
INL void widen(uint8_t* codes, const uint8_t* packed) {
  for (int i = 0; i < TILE; i += 64) {
    B32 bytes;
    memcpy(&bytes, packed + i / 2, 32);
    const H32 pair = __builtin_convertvector(bytes, H32), apart = (pair | pair << 4) & 0x0f0f;
    memcpy(codes + i, &apart, 64);
  }
}
INL void narrow4(uint8_t* packed, uint8_t* codes, int n) {
  if (n % 2) codes[n] = 0;  // the half that no element uses
  for (int i = 0; i < TILE; i += 64) {
    H32 pair;
    memcpy(&pair, codes + i, 64);
    const B32 bytes = __builtin_convertvector((pair | pair >> 4) & 0xff, B32);
    memcpy(packed + i / 2, &bytes, 32);
  }
}

// A format encodes 64 numbers divided by their scale: y in 4 vectors.
template <int OFFSET, int LOW, int TOP> struct Integers {
  static constexpr float MAX = TOP;
  static INL void decode(VF* q, const uint8_t* codes) {
    UNROLL for (int j = 0; j < 4; j++) q[j] = fcvt(isub(load_u8(codes + 16 * j), iset(OFFSET)));
  }
  static INL void encode(const VF* y, uint8_t* codes) {
    const VF low = fset(LOW), top = fset(TOP);
    UNROLL for (int j = 0; j < 4; j++) {  // clipping whole numbers before rounding or after is the same
      const VF clipped = fsel(flt(y[j], low), low, fsel(flt(top, y[j]), top, y[j]));
      store_8(codes + 16 * j, iadd(fround(clipped), iset(OFFSET)));
    }
  }
  static INL void encode(const VF* y, uint8_t* codes, const uint16_t* bits) {
    VF whole[4];
    UNROLL for (int j = 0; j < 4; j++) whole[j] = stochastic_integer(y[j], load_u16(bits + 16 * j));
    encode(whole, codes);
  }
};

// What is looked up, made once when the library is loaded.
template <class L> struct Tables {
  static constexpr int COUNT = sizeof(L::LEVEL) / sizeof(uint32_t), REACHED = sizeof(L::REACHED) / sizeof(uint32_t);
  alignas(64) float level[COUNT];
  alignas(64) uint8_t plane[4][COUNT < 64 ? 64 : COUNT];  // bytes of levels, by code
  alignas(64) float bucket[L::BUCKETS];                   // patterns of integers
  Tables() {
    memcpy(level, L::LEVEL, sizeof level);
    for (int i = 0; i < COUNT; i++)
      for (int b = 0; b < 4; b++) plane[b][i] = (uint8_t)(L::LEVEL[i] >> 8 * b);
    // Code and rest of a size; the rest passes 2^SHIFT, and becomes one more, where the boundary in the bucket is reached.
    for (int i = 0, code = 0; i < L::BUCKETS; i++) {
      const uint32_t begin = (uint32_t)(L::LOWEST + i) << L::SHIFT;
      while (code < REACHED && L::REACHED[code] <= begin) code++;
      const bool inside = code < REACHED && L::REACHED[code] - begin < 1u << L::SHIFT;
      const uint32_t entry = ((uint32_t)code << L::SHIFT) + (inside ? (1u << L::SHIFT) - (L::REACHED[code] - begin) : 0);
      memcpy(bucket + i, &entry, sizeof entry);
    }
  }
};
template <class L> static const Tables<L> tables;

#if LINES_IN_REGISTERS
INL VI transposed() { return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); }  // 4 x 4
#endif

template <class L> struct Table {
  static constexpr float MAX = 1.0f;
  static constexpr int COUNT = Tables<L>::COUNT;

  static INL void decode(VF* q, const uint8_t* codes) {
#if LINES_IN_REGISTERS && defined(__AVX512VBMI__)
    if constexpr (COUNT == 256) {
      // A level is four bytes, each looked up for 64 codes. The codes in groups of 4 are transposed first, so that what
      // unpacking does to bytes brings them into order.
      const __m512i c = _mm512_permutexvar_epi32(transposed(), iload(codes));
      const __mmask64 upper = _mm512_movepi8_mask(c);
      __m512i p[4];
      UNROLL for (int b = 0; b < 4; b++) {
        const __m512i* t = (const __m512i*)tables<L>.plane[b];
        const __m512i low = _mm512_permutex2var_epi8(t[0], c, t[1]), high = _mm512_permutex2var_epi8(t[2], c, t[3]);
        p[b] = _mm512_mask_blend_epi8(upper, low, high);
      }
      const __m512i a = _mm512_unpacklo_epi8(p[0], p[1]), b = _mm512_unpackhi_epi8(p[0], p[1]);
      const __m512i d = _mm512_unpacklo_epi8(p[2], p[3]), e = _mm512_unpackhi_epi8(p[2], p[3]);
      q[0] = ffrom(_mm512_unpacklo_epi16(a, d)), q[1] = ffrom(_mm512_unpackhi_epi16(a, d));
      q[2] = ffrom(_mm512_unpacklo_epi16(b, e)), q[3] = ffrom(_mm512_unpackhi_epi16(b, e));
      return;
    }
#endif
    UNROLL for (int j = 0; j < 4; j++) {
      const VI c = load_u8(codes + 16 * j);
      q[j] = COUNT == 16 ? fmap16(c, tables<L>.level) : fgather(c, tables<L>.level);
    }
  }

  static INL void encode(const VF* y, uint8_t* codes) {
#if LINES_IN_REGISTERS
    if constexpr (L::LINES) return encode_by_lines(y, codes);
#endif
    encode_by_buckets(y, codes);
  }
  static INL VI bits_of(VF y, int32_t least) { return imax(L::SIGNED ? size_bits(y) : fbits(y), iset(least)); }

  static INL void encode_by_buckets(const VF* y, uint8_t* codes) {
    UNROLL for (int j = 0; j < 4; j++) {
      const VI bits = bits_of(y[j], (int32_t)((uint32_t)L::LOWEST << L::SHIFT));
      const VI entry = fbits(fgather(isub(ishr<L::SHIFT>(bits), iset(L::LOWEST)), tables<L>.bucket));
      VI code = ishr<L::SHIFT>(iadd(entry, iand(bits, iset((1 << L::SHIFT) - 1))));  // boundaries reached
      if constexpr (L::SIGNED) {
        const VI zero = iset(L::ZERO), below = imax(isub(zero, code), iset(0));
        code = fbits(fsel(flt(y[j], fset(0.0f)), ffrom(below), ffrom(iadd(zero, code))));
      }
      store_8(codes + 16 * j, code);
    }
  }

#if LINES_IN_REGISTERS
  // See cpu_levels.py: what is not beside a whole number is right, and where something is, all 64 are looked up.
  static INL void encode_by_lines(const VF* y, uint8_t* codes) {
    const __m512i begin0 = iload(L::BEGIN), begin1 = iload(L::BEGIN + 16);
    const VF slope = fload(L::LINE_SLOPE), shift = fload(L::LINE_SHIFT), most = fload(L::LINE_MOST);
    VF fraction = fset(1.0f);
    VI reached[4];
    UNROLL for (int j = 0; j < 4; j++) {
      const VI bits = bits_of(y[j], (127 - 31) << 23);
      const VI line = ishr<23>(iadd(bits, _mm512_permutex2var_epi32(begin0, ishr<23>(bits), begin1)));
      VF t = fma(ffrom(bits), _mm512_permutexvar_ps(line, slope), _mm512_permutexvar_ps(line, shift));
      t = _mm512_min_ps(t, _mm512_permutexvar_ps(line, most));
      fraction = _mm512_min_ps(fraction, _mm512_reduce_ps(t, 1));  // 1: the distance from the floor
      if constexpr (L::SIGNED) t = ffrom(ior(fbits(t), iand(fbits(y[j]), iset(INT32_MIN))));
      reached[j] = _mm512_cvttps_epi32(t);
    }
    // Packing keeps groups of 4 together, those of the same place in each vector side by side, and ends below at 0.
    const VI zero = _mm512_set1_epi16(L::ZERO);
    const VI a = _mm512_add_epi16(_mm512_packs_epi32(reached[0], reached[1]), zero);
    const VI b = _mm512_add_epi16(_mm512_packs_epi32(reached[2], reached[3]), zero);
    istore(codes, _mm512_permutexvar_epi32(transposed(), _mm512_packus_epi16(a, b)));
    if (__builtin_expect(_mm512_cmp_ps_mask(fraction, fset(L::NEAR), _CMP_LT_OQ), 0)) look_up(y, codes);
  }
  static __attribute__((noinline)) void look_up(const VF* y, uint8_t* codes) { encode_by_buckets(y, codes); }
#endif
};

// ----------------------------------------------------------------------------------------------------------------- blocks
// Writes a block's scale; the factor of its elements. Where all codes are those of 0 the elements become 0.
template <class F, int BLOCK> INL float inverse_of(float* x, float* scale) {
  VI top = iset(0);
  // Patterns of sizes are in the order of sizes, infinity after all numbers, NaN after infinity.
  _Pragma("GCC unroll 4") for (int i = 0; i < BLOCK; i += 16) top = imax(top, size_bits(fload(x + i)));
  const int32_t largest = itop(top);
  float s = bits_float((uint32_t)largest) / F::MAX;
  if (largest >= 0x7f800000) s = std::numeric_limits<float>::quiet_NaN();
  else if (s < std::numeric_limits<float>::min()) s = 0.0f;
  *scale = s;
  if (__builtin_expect(s > 0, 1)) return 1.0f / s;
  memset(x, 0, BLOCK * sizeof(float));
  return 0.0f;
}
// Results beyond the last element must not reach its block's scale.
INL void cut(float* x, int n) {
  for (int i = n; i < TILE; i++) x[i] = 0.0f;
}
// Writes the scales of a tile; the factors of its blocks.
template <class F, int BLOCK> INL void scale(float* x, int n, float* scales, float* inverse) {
  cut(x, n);
  for (int b = 0; b < TILE / BLOCK; b++) inverse[b] = inverse_of<F, BLOCK>(x + b * BLOCK, scales + b);
}
// `bits`: those of the tile's elements, where rounding is stochastic.
template <class F, int BLOCK, class... Bits> INL void encode(const float* x, const float* inverse, uint8_t* codes, Bits... bits) {
  for (int i = 0; i < TILE; i += 64) {
    VF y[4];
    UNROLL for (int j = 0; j < 4; j++) y[j] = fmul(fload(x + i + 16 * j), fset(inverse[(i + 16 * j) / BLOCK]));
    F::encode(y, codes + i, bits + i...);
  }
}
