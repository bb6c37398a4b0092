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

template <int OFFSET, int LOW, int TOP> struct Integers {
  static constexpr float MAX = TOP;
  static constexpr uint8_t ZERO = OFFSET;
  static INL void decode(VF* q, const uint8_t* codes) {
    UNROLL for (int j = 0; j < 4; j++) q[j] = fcvt(isub(load_u8(codes + 16 * j), iset(OFFSET)));
  }
  template <int N> static INL void encode(const float* x, float inverse, uint8_t* codes) {
    const VF low = fset(LOW), top = fset(TOP);
    for (int i = 0; i < N; i += 16) {
      VF y = fmul(fload(x + i), fset(inverse));
      y = fsel(flt(y, low), low, fsel(flt(top, y), top, y));  // whole numbers: before rounding or after is the same
      store_8(codes + i, iadd(fround(y), iset(OFFSET)));
    }
  }
  template <int N> static INL void encode(const float* x, float inverse, uint8_t* codes, const uint16_t* bits) {
    const VF low = fset(LOW), top = fset(TOP);
    for (int i = 0; i < N; i += 16) {
      VF y = stochastic_integer(fmul(fload(x + i), fset(inverse)), load_u16(bits + i));
      y = fsel(flt(y, low), low, fsel(flt(top, y), top, y));
      store_8(codes + i, iadd(fround(y), iset(OFFSET)));
    }
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

template <class L> struct Table {
  static constexpr float MAX = 1.0f;
  static constexpr uint8_t ZERO = L::ZERO;
  static constexpr int COUNT = Tables<L>::COUNT;

  static INL void decode(VF* q, const uint8_t* codes) {
#if LINES_IN_REGISTERS && defined(__AVX512VBMI__)
    if constexpr (COUNT == 256) {
      // A level is four bytes, each looked up for 64 codes. The codes in groups of 4 are transposed first, so that what
      // unpacking does to bytes brings them into order.
      const __m512i turn = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      const __m512i c = _mm512_permutexvar_epi32(turn, _mm512_loadu_si512(codes));
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

  // How many boundaries of sizes y has reached, as a code.
  static INL VI coded(VI reached, VF y) {
    if constexpr (!L::SIGNED) return reached;
    const VI zero = iset(L::ZERO);
    const VI below = imax(isub(zero, reached), iset(0));
    return fbits(fsel(flt(y, fset(0.0f)), ffrom(below), ffrom(iadd(zero, reached))));
  }
  static INL VI bits_of(VF y, int32_t least) { return imax(L::SIGNED ? size_bits(y) : fbits(y), iset(least)); }

  template <int N> static INL void encode(const float* x, float inverse, uint8_t* codes) {
#if LINES_IN_REGISTERS
    if constexpr (L::LINES) return encode_by_lines<N>(x, inverse, codes);
#endif
    for (int i = 0; i < N; i += 16) {
      const VF y = fmul(fload(x + i), fset(inverse));
      const VI bits = bits_of(y, (int32_t)((uint32_t)L::LOWEST << L::SHIFT));
      const VI entry = fbits(fgather(isub(ishr<L::SHIFT>(bits), iset(L::LOWEST)), tables<L>.bucket));
      const VI reached = ishr<L::SHIFT>(iadd(entry, iand(bits, iset((1 << L::SHIFT) - 1))));
      store_8(codes + i, coded(reached, y));
    }
  }

#if LINES_IN_REGISTERS
  // See cpu_levels.py: what is not beside a whole number is right, and the rest is looked for.
  template <int N> static INL void encode_by_lines(const float* x, float inverse, uint8_t* codes) {
    const __m512i first0 = iload(L::FIRST), first1 = iload(L::FIRST + 16);
    const VF start0 = fload(L::LINE_START), start1 = fload(L::LINE_START + 16);
    const VF slope = fload(L::LINE_SLOPE), shift = fload(L::LINE_SHIFT), most = fload(L::LINE_MOST);
    const VF near = fset(L::NEAR), factor = fset(inverse);
    __mmask16 beside[N / 16];
    uint32_t any = 0;
    _Pragma("GCC unroll 4") for (int v = 0; v < N / 16; v++) {
      const VF y = fmul(fload(x + 16 * v), factor);
      const VI bits = bits_of(y, (127 - 31) << 23), octave = ishr<23>(bits);
      const VF size = ffrom(bits);
      const __mmask16 next = _mm512_cmp_ps_mask(size, _mm512_permutex2var_ps(start0, octave, start1), _CMP_GE_OQ);
      const VI begun = _mm512_permutex2var_epi32(first0, octave, first1);
      const VI line = _mm512_mask_add_epi32(begun, next, begun, iset(1));
      VF t = fma(size, _mm512_permutexvar_ps(line, slope), _mm512_permutexvar_ps(line, shift));
      t = _mm512_min_ps(t, _mm512_permutexvar_ps(line, most));
      beside[v] = _mm512_cmp_ps_mask(_mm512_reduce_ps(t, 1), near, _CMP_LT_OQ);  // 1: the distance from the floor
      any |= beside[v];
      store_8(codes + 16 * v, coded(_mm512_cvttps_epi32(t), y));
    }
    if (__builtin_expect(any != 0, 0)) look_for<N>(x, inverse, codes, beside);
  }
  template <int N>
  static __attribute__((noinline)) void look_for(const float* x, float inverse, uint8_t* codes, const __mmask16* beside) {
    const uint32_t *begin = L::REACHED, *end = begin + Tables<L>::REACHED;
    for (int v = 0; v < N / 16; v++)
      for (uint32_t left = beside[v]; left; left &= left - 1) {
        const int i = 16 * v + __builtin_ctz(left);
        const float y = x[i] * inverse;
        const uint32_t size = float_bits(y) & 0x7fffffff;
        const int reached = (int)(std::upper_bound(begin, end, size) - begin);
        codes[i] = (uint8_t)(y < 0 ? std::max(L::ZERO - reached, 0) : L::ZERO + reached);
      }
  }
#endif
};

// ----------------------------------------------------------------------------------------------------------------- blocks
// Writes a block's scale; the factor of its elements, 0 where all codes are those of 0.
template <class F, int BLOCK> INL float inverse_of(const float* x, float* scale) {
  VI top = iset(0);
  // Patterns of sizes are in the order of sizes, infinity after all numbers, NaN after infinity.
  _Pragma("GCC unroll 4") for (int i = 0; i < BLOCK; i += 16) top = imax(top, size_bits(fload(x + i)));
  const int32_t largest = itop(top);
  float s = bits_float((uint32_t)largest) / F::MAX;
  if (largest >= 0x7f800000) s = std::numeric_limits<float>::quiet_NaN();
  else if (s < std::numeric_limits<float>::min()) s = 0.0f;
  *scale = s;
  return s > 0 ? 1.0f / s : 0.0f;
}
// Results beyond the last element must not reach its block's scale.
INL void cut(float* x, int n) {
  for (int i = n; i < TILE; i++) x[i] = 0.0f;
}
// `bits`: those of the tile's elements, where rounding is stochastic.
template <class F, int BLOCK, class... Bits> INL void encode(float* x, int n, uint8_t* codes, float* scales, Bits... bits) {
  cut(x, n);
  for (int b = 0; b < TILE; b += BLOCK) {
    const float inverse = inverse_of<F, BLOCK>(x + b, scales + b / BLOCK);
    if (__builtin_expect(inverse > 0, 1)) F::template encode<BLOCK>(x + b, inverse, codes + b, bits + b...);
    else memset(codes + b, F::ZERO, BLOCK);
  }
}
