// 16 lanes as one zmm register. The integer dot is vpdpbusd (u8 codes x s8 activations -> s32), which neither
// saturates nor needs widening, so a 16-bit activation is simply two 8-bit digits: x = 256 * high + low.
using VF = __m512;
using VI = __m512i;
using VM = __mmask16;

INL VF fset(float a) { return _mm512_set1_ps(a); }
INL VF fload(const float* p) { return _mm512_loadu_ps(p); }
INL void fstore(float* p, VF a) { _mm512_storeu_ps(p, a); }
INL VF fadd(VF a, VF b) { return _mm512_add_ps(a, b); }
INL VF fsub(VF a, VF b) { return _mm512_sub_ps(a, b); }
INL VF fmul(VF a, VF b) { return _mm512_mul_ps(a, b); }
INL VF fdiv(VF a, VF b) { return _mm512_div_ps(a, b); }
INL VF fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
INL VF fsqrt(VF a) { return _mm512_sqrt_ps(a); }
INL VM flt(VF a, VF b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INL VM fnan(VF a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
INL VF fsel(VM m, VF yes, VF no) { return _mm512_mask_blend_ps(m, no, yes); }
INL VI fbits(VF a) { return _mm512_castps_si512(a); }
INL VF ffrom(VI a) { return _mm512_castsi512_ps(a); }
INL VI fround(VF a) { return _mm512_cvtps_epi32(a); }  // to nearest, ties to even
INL VF fcvt(VI a) { return _mm512_cvtepi32_ps(a); }

INL VI iset(int32_t a) { return _mm512_set1_epi32(a); }
INL VI iload(const void* p) { return _mm512_loadu_si512(p); }
INL void istore(void* p, VI a) { _mm512_storeu_si512(p, a); }
INL VI iadd(VI a, VI b) { return _mm512_add_epi32(a, b); }
INL VI isub(VI a, VI b) { return _mm512_sub_epi32(a, b); }
INL VI imul(VI a, VI b) { return _mm512_mullo_epi32(a, b); }
INL VI iand(VI a, VI b) { return _mm512_and_si512(a, b); }
INL VI ior(VI a, VI b) { return _mm512_or_si512(a, b); }
INL VI imax(VI a, VI b) { return _mm512_max_epi32(a, b); }
template <int S> INL VI ishl(VI a) { return _mm512_slli_epi32(a, S); }
template <int S> INL VI ishr(VI a) { return _mm512_srli_epi32(a, S); }
template <int S> INL VI isra(VI a) { return _mm512_srai_epi32(a, S); }
INL int32_t isum(VI a) {  // GCC's own reduction adds signed numbers, whose overflow is undefined
  __m256i s = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}
INL int32_t itop(VI a) { return _mm512_reduce_max_epi32(a); }

// 16 narrow values to 16 lanes and back.
INL VI load_u8(const void* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
INL VI load_s8(const void* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
INL VI load_u16(const void* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
INL VF load_half(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INL void store_half(void* p, VF a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, 0)); }
INL void store_8(void* p, VI a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a)); }
INL void store_16(void* p, VI a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(a)); }

// 64 bytes at once.
template <int S, int M> INL VI bfield(VI a) {
  return iand(S ? _mm512_srli_epi16(a, S) : a, _mm512_set1_epi8((char)M));
}
template <int S> INL VI bshl(VI a) { return S ? _mm512_slli_epi16(a, S) : a; }
INL VI bmap16(VI a, const uint8_t* table) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), a);
}
INL VF fmap16(VI lanes, const float* table) { return _mm512_permutexvar_ps(lanes, fload(table)); }
INL VF fgather(VI lanes, const float* table) { return _mm512_i32gather_ps(lanes, table, 4); }

INL VI bcast4(const void* p) {
  int32_t v;
  memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}

// Sums of one row and one panel. W: a quad of codes made ready for `dot`.
struct Dot {
  static constexpr Digits FORM = DIGITS == 2 ? Digits::HIGH_LOW : Digits::S8;
  static constexpr int CHAINS = 4 / DIGITS;  // independent sums that hide the latency of vpdpbusd for a single row
  using W = VI;
  struct Acc { VI s[DIGITS]; };
  static INL W prep(VI quad) { return quad; }
  static INL void init(Acc& a, VI start) {
    a.s[0] = iset(0);
    a.s[DIGITS - 1] = start;
  }
  static INL void dot(Acc& a, W w, const int8_t* x) {
    UNROLL for (int i = 0; i < DIGITS; i++) a.s[i] = _mm512_dpbusd_epi32(a.s[i], w, bcast4(x + 4 * i));
  }
  template <int Q> static INL void fold(Acc&) {}
  static INL VI sum(const Acc& a) { return DIGITS == 2 ? iadd(ishl<8>(a.s[0]), a.s[DIGITS - 1]) : a.s[0]; }
};
