// 16 lanes as two ymm registers. There is no 8-bit dot product: vpmaddubsw multiplies u8 by s8 and adds pairs into int16,
// which saturates. Operands small enough (4 bits: all 8 quads of a block) are summed in int16 and widened once; 8-bit
// codes are widened first and go through vpmaddwd.
struct VF { __m256 a, b; };
struct VI { __m256i a, b; };
using VM = VF;
#define BOTH(type, f, x) (type{f((x).a), f((x).b)})
#define BOTH2(type, f, x, y) (type{f((x).a, (y).a), f((x).b, (y).b)})

INL VF fset(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
INL VF fload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INL void fstore(float* p, VF a) { _mm256_storeu_ps(p, a.a), _mm256_storeu_ps(p + 8, a.b); }
INL VF fadd(VF a, VF b) { return BOTH2(VF, _mm256_add_ps, a, b); }
INL VF fsub(VF a, VF b) { return BOTH2(VF, _mm256_sub_ps, a, b); }
INL VF fmul(VF a, VF b) { return BOTH2(VF, _mm256_mul_ps, a, b); }
INL VF fdiv(VF a, VF b) { return BOTH2(VF, _mm256_div_ps, a, b); }
INL VF fma(VF a, VF b, VF c) { return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
INL VF fsqrt(VF a) { return BOTH(VF, _mm256_sqrt_ps, a); }
INL VM flt(VF a, VF b) { return {_mm256_cmp_ps(a.a, b.a, _CMP_LT_OQ), _mm256_cmp_ps(a.b, b.b, _CMP_LT_OQ)}; }
INL VM fnan(VF a) { return {_mm256_cmp_ps(a.a, a.a, _CMP_UNORD_Q), _mm256_cmp_ps(a.b, a.b, _CMP_UNORD_Q)}; }
INL VF fsel(VM m, VF yes, VF no) { return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)}; }
INL VI fbits(VF a) { return BOTH(VI, _mm256_castps_si256, a); }
INL VF ffrom(VI a) { return BOTH(VF, _mm256_castsi256_ps, a); }
INL VI fround(VF a) { return BOTH(VI, _mm256_cvtps_epi32, a); }  // to nearest, ties to even
INL VF fcvt(VI a) { return BOTH(VF, _mm256_cvtepi32_ps, a); }

INL VI iset(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
INL VI iload(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
INL void istore(void* p, VI a) {
  _mm256_storeu_si256((__m256i*)p, a.a), _mm256_storeu_si256((__m256i*)p + 1, a.b);
}
INL VI iadd(VI a, VI b) { return BOTH2(VI, _mm256_add_epi32, a, b); }
INL VI isub(VI a, VI b) { return BOTH2(VI, _mm256_sub_epi32, a, b); }
INL VI imul(VI a, VI b) { return BOTH2(VI, _mm256_mullo_epi32, a, b); }
INL VI iand(VI a, VI b) { return BOTH2(VI, _mm256_and_si256, a, b); }
INL VI ior(VI a, VI b) { return BOTH2(VI, _mm256_or_si256, a, b); }
INL VI imax(VI a, VI b) { return BOTH2(VI, _mm256_max_epi32, a, b); }
template <int S> INL VI ishl(VI a) { return {_mm256_slli_epi32(a.a, S), _mm256_slli_epi32(a.b, S)}; }
template <int S> INL VI ishr(VI a) { return {_mm256_srli_epi32(a.a, S), _mm256_srli_epi32(a.b, S)}; }
template <int S> INL VI isra(VI a) { return {_mm256_srai_epi32(a.a, S), _mm256_srai_epi32(a.b, S)}; }
INL int32_t isum(VI a) {
  __m256i s = _mm256_add_epi32(a.a, a.b);
  __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}
INL int32_t itop(VI a) {
  __m256i s = _mm256_max_epi32(a.a, a.b);
  __m128i t = _mm_max_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}

// 16 narrow values to 16 lanes and back (stores keep the low bits).
INL __m128i half_line(const void* p, int i) { return _mm_loadu_si128((const __m128i*)p + i); }
INL __m128i quarter_line(const void* p, int i) { return _mm_loadl_epi64((const __m128i*)((const char*)p + 8 * i)); }
INL VI load_u8(const void* p) { return {_mm256_cvtepu8_epi32(quarter_line(p, 0)), _mm256_cvtepu8_epi32(quarter_line(p, 1))}; }
INL VI load_s8(const void* p) { return {_mm256_cvtepi8_epi32(quarter_line(p, 0)), _mm256_cvtepi8_epi32(quarter_line(p, 1))}; }
INL VI load_u16(const void* p) { return {_mm256_cvtepu16_epi32(half_line(p, 0)), _mm256_cvtepu16_epi32(half_line(p, 1))}; }
INL VF load_half(const void* p) { return {_mm256_cvtph_ps(half_line(p, 0)), _mm256_cvtph_ps(half_line(p, 1))}; }
INL void store_half(void* p, VF a) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a.a, 0)), _mm_storeu_si128((__m128i*)p + 1, _mm256_cvtps_ph(a.b, 0));
}
INL __m256i narrow(VI a) {  // 16 lanes of at most 16 bits, in order
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(a.a, a.b), 0xd8);
}
INL void store_8(void* p, VI a) {
  __m256i v = narrow(iand(a, iset(0xff)));
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}
INL void store_16(void* p, VI a) { _mm256_storeu_si256((__m256i*)p, narrow(iand(a, iset(0xffff)))); }

// 64 bytes at once.
template <int S, int M> INL VI bfield(VI a) {
  const __m256i mask = _mm256_set1_epi8((char)M);
  if constexpr (S) a = {_mm256_srli_epi16(a.a, S), _mm256_srli_epi16(a.b, S)};
  return {_mm256_and_si256(a.a, mask), _mm256_and_si256(a.b, mask)};
}
template <int S> INL VI bshl(VI a) {
  if constexpr (S) return {_mm256_slli_epi16(a.a, S), _mm256_slli_epi16(a.b, S)};
  return a;
}
INL VI bmap16(VI a, const uint8_t* table) {
  const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
  return {_mm256_shuffle_epi8(t, a.a), _mm256_shuffle_epi8(t, a.b)};
}
INL __m256 map8(__m256 low, __m256 high, __m256i i) {
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i),
                          _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}
INL VF fmap16(VI lanes, const float* table) {
  VF t = fload(table);
  return {map8(t.a, t.b, lanes.a), map8(t.a, t.b, lanes.b)};
}
INL VF fgather(VI lanes, const float* table) {
  return {_mm256_i32gather_ps(table, lanes.a, 4), _mm256_i32gather_ps(table, lanes.b, 4)};
}

// sum += w * broadcast(x): one asm block, five instructions, two temporaries. GCC otherwise gathers all broadcasts of a block
// before the first multiplication and spills the sums to make room, which costs 60-77 %.
#define MULTIPLY_ADD(multiply, add, sum, w, at)                                   \
  __m256i t, u;                                                                   \
  asm volatile("vpbroadcastd %[x], %[t]\n\t" multiply " %[t], %[w0], %[u]\n\t"    \
               multiply " %[t], %[w1], %[t]\n\t" add " %[u], %[s0], %[s0]\n\t"    \
               add " %[t], %[s1], %[s1]"                                          \
               : [s0] "+x"(sum.a), [s1] "+x"(sum.b), [t] "=&x"(t), [u] "=&x"(u)   \
               : [w0] "x"(w.a), [w1] "x"(w.b), [x] "m"(*(const int32_t*)(at)))
INL void add_bytes(VI& sum, const VI& w, const int8_t* x) { MULTIPLY_ADD("vpmaddubsw", "vpaddw", sum, w, x); }
INL void add_words(VI& sum, const VI& w, const int8_t* x) { MULTIPLY_ADD("vpmaddwd", "vpaddd", sum, w, x); }
INL VI widened(const VI& sum) {
  const __m256i one = _mm256_set1_epi16(1);
  return {_mm256_madd_epi16(sum.a, one), _mm256_madd_epi16(sum.b, one)};
}

// Quads whose int16 sums cannot overflow: a product pair is at most 2 * CODE_TOP * 128 in size (127 with one digit).
constexpr int fitting_quads(int top) { return 32767 / (2 * CODE_TOP * top); }
constexpr int power_below(int n) { return n >= 8 ? 8 : n >= 4 ? 4 : n >= 2 ? 2 : n; }
constexpr int FOLD = power_below(fitting_quads(DIGITS == 2 ? 128 : 127));

struct DotPairs {  // int16 sums of 8-bit products, widened every FOLD quads
  static constexpr Digits FORM = DIGITS == 2 ? Digits::HIGH_LOW : Digits::S8;
  static constexpr int CHAINS = 1;
  using W = VI;
  struct Acc { VI pairs[DIGITS], s[DIGITS]; };
  static INL W prep(VI quad) { return quad; }
  static INL void init(Acc& a, VI start) {
    for (int i = 0; i < DIGITS; i++) a.pairs[i] = a.s[i] = iset(0);
    a.s[DIGITS - 1] = start;
  }
  static INL void dot(Acc& a, const W& w, const int8_t* x) {
    for (int i = 0; i < DIGITS; i++) add_bytes(a.pairs[i], w, x + 4 * i);
  }
  template <int Q> static INL void fold(Acc& a) {
    if constexpr ((Q + 1) % FOLD == 0)
      for (int i = 0; i < DIGITS; i++) {
        a.s[i] = iadd(a.s[i], widened(a.pairs[i]));
        a.pairs[i] = iset(0);
      }
  }
  static INL VI sum(const Acc& a) { return DIGITS == 2 ? iadd(ishl<8>(a.s[0]), a.s[DIGITS - 1]) : a.s[0]; }
};

struct DotWide {  // codes as int16: the bytes of a quad at even places, then those at odd places
  static constexpr Digits FORM = Digits::S16;
  static constexpr int CHAINS = 2;
  struct W { VI even, odd; };
  struct Acc { VI s; };
  static INL W prep(VI q) {
    return {iand(q, iset(0x00ff00ff)), {_mm256_srli_epi16(q.a, 8), _mm256_srli_epi16(q.b, 8)}};
  }
  static INL void init(Acc& a, VI start) { a.s = start; }
  static INL void dot(Acc& a, const W& w, const int8_t* x) {
    add_words(a.s, w.even, x);
    add_words(a.s, w.odd, x + 4);
  }
  template <int Q> static INL void fold(Acc&) {}
  static INL VI sum(const Acc& a) { return a.s; }
};
template <bool FITS> struct DotOf { using D = DotPairs; };
template <> struct DotOf<false> { using D = DotWide; };
using Dot = DotOf<(FOLD > 0)>::D;
