// 16 lanes as GCC / Clang vectors: right on every target, as fast as the compiler makes it. A port begins as a copy of this
// file: on Arm, `Dot` becomes vusdotq_s32 (4 outputs x 4 k per register, the order of a quad as it stands); AMX would take
// whole `multiply` calls instead (a quad is one row of its B tile).
#pragma GCC diagnostic ignored "-Wpsabi"
typedef float VF __attribute__((vector_size(64)));
typedef int32_t VI __attribute__((vector_size(64)));
typedef uint32_t VU __attribute__((vector_size(64)));
typedef uint8_t VB __attribute__((vector_size(64)));
typedef uint8_t B16 __attribute__((vector_size(16)));
typedef int8_t C16 __attribute__((vector_size(16)));
typedef uint16_t H16 __attribute__((vector_size(32)));
using VM = VI;
template <class To, class From> INL To bits_as(const From& a) {
  static_assert(sizeof(To) == sizeof(From));
  To b;
  memcpy(&b, &a, sizeof b);
  return b;
}
template <class V> INL V vload(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V> INL void vstore(void* p, const V& a) { memcpy(p, &a, sizeof a); }

INL VF fset(float a) { return VF{} + a; }
INL VF fload(const float* p) { return vload<VF>(p); }
INL void fstore(float* p, VF a) { vstore(p, a); }
INL VF fadd(VF a, VF b) { return a + b; }
INL VF fsub(VF a, VF b) { return a - b; }
INL VF fmul(VF a, VF b) { return a * b; }
INL VF fdiv(VF a, VF b) { return a / b; }
INL VF fma(VF a, VF b, VF c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  VF r;
  UNROLL for (int i = 0; i < 16; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#else  // a library call per lane otherwise: two roundings are inside every bound that is promised
  return a * b + c;
#endif
}
INL VF fsqrt(VF a) {
  UNROLL for (int i = 0; i < 16; i++) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
INL VM flt(VF a, VF b) { return a < b; }
INL VM fnan(VF a) { return a != a; }
INL VI fbits(VF a) { return bits_as<VI>(a); }
INL VF ffrom(VI a) { return bits_as<VF>(a); }
INL VF fsel(VM m, VF yes, VF no) { return ffrom((m & fbits(yes)) | (~m & fbits(no))); }
INL VF fcvt(VI a) { return __builtin_convertvector(a, VF); }
INL VI fround(VF a) {  // to nearest, ties to even, for |a| < 2^22: 1.5 * 2^23 has a unit of 1 in its last place
  return bits_as<VI>(a + 12582912.0f) - 0x4b400000;
}

INL VI iset(int32_t a) { return VI{} + a; }
INL VI iload(const void* p) { return vload<VI>(p); }
INL void istore(void* p, VI a) { vstore(p, a); }
INL VI iadd(VI a, VI b) { return bits_as<VI>(bits_as<VU>(a) + bits_as<VU>(b)); }
INL VI isub(VI a, VI b) { return bits_as<VI>(bits_as<VU>(a) - bits_as<VU>(b)); }
INL VI imul(VI a, VI b) { return bits_as<VI>(bits_as<VU>(a) * bits_as<VU>(b)); }
INL VI iand(VI a, VI b) { return a & b; }
INL VI ior(VI a, VI b) { return a | b; }
INL VI imax(VI a, VI b) {
  VI m = a > b;
  return (m & a) | (~m & b);
}
template <int S> INL VI ishl(VI a) { return bits_as<VI>(bits_as<VU>(a) << S); }
template <int S> INL VI ishr(VI a) { return bits_as<VI>(bits_as<VU>(a) >> S); }
template <int S> INL VI isra(VI a) { return a >> S; }
INL int32_t isum(VI a) {
  uint32_t s = 0;
  for (int i = 0; i < 16; i++) s += (uint32_t)a[i];
  return (int32_t)s;
}
INL int32_t itop(VI a) {
  int32_t t = a[0];
  for (int i = 1; i < 16; i++) t = a[i] > t ? a[i] : t;
  return t;
}

INL VI load_u8(const void* p) { return __builtin_convertvector(vload<B16>(p), VI); }
INL VI load_s8(const void* p) { return __builtin_convertvector(vload<C16>(p), VI); }
INL VI load_u16(const void* p) { return __builtin_convertvector(vload<H16>(p), VI); }
INL void store_8(void* p, VI a) { vstore(p, __builtin_convertvector(a, B16)); }
INL void store_16(void* p, VI a) { vstore(p, __builtin_convertvector(a, H16)); }
INL VF load_half(const void* p) {  // the bits under a float's exponent, which has a bias 112 greater
  VI h = load_u16(p), size = h & 0x7fff;
  VI special = (size > 0x7bff) & 0x7f800000;
  VF normal = ffrom((size << 13) + (112 << 23));
  VF value = fsel(size < 0x400, fcvt(size) * 0x1p-24f, normal);  // no subnormal float, which may be flushed to zero
  return ffrom(fbits(value) | special | ishl<16>(h & 0x8000));
}
INL void store_half(void* p, VF a) {  // to nearest, ties to even
  VI u = fbits(a), size = u & 0x7fffffff;
  VI normal = ishr<13>(iadd(size + ((size >> 13) & 1), iset(0xfff))) - (112 << 10);  // a NaN's sum may leave int32
  VI small = fbits(ffrom(size) + 0.5f) - 0x3f000000;  // 0.5 has a unit of 2^-24, a half's smallest step
  VI tiny = size < 0x38800000, over = size > 0x477fefff, nan = size > 0x7f800000;
  VI h = (tiny & small) | (~tiny & normal);
  h = (over & (0x7c00 | (nan & 0x200))) | (~over & h);
  store_16(p, h | (ishr<16>(u) & 0x8000));
}

template <int S, int M> INL VI bfield(VI a) { return ishr<S>(a) & (int32_t)(M * 0x01010101u); }
template <int S> INL VI bshl(VI a) { return ishl<S>(a); }
INL VI bmap16(VI a, const uint8_t* table) {
  VB b = bits_as<VB>(a);
  for (int i = 0; i < 64; i++) b[i] = table[b[i]];
  return bits_as<VI>(b);
}
INL VF fgather(VI lanes, const float* table) {
  VF f;
  for (int i = 0; i < 16; i++) f[i] = table[lanes[i]];
  return f;
}
INL VF fmap16(VI lanes, const float* table) { return fgather(lanes, table); }

struct Dot {
  static constexpr Digits FORM = Digits::S16;
  static constexpr int CHAINS = 1;
  struct W { VI k[4]; };
  struct Acc { VI s; };
  static INL W prep(VI q) { return {{q & 255, ishr<16>(q) & 255, ishr<8>(q) & 255, ishr<24>(q)}}; }
  static INL void init(Acc& a, VI start) { a.s = start; }
  static INL void dot(Acc& a, const W& w, const int8_t* x) {
    int16_t v[4];
    memcpy(v, x, 8);
    UNROLL for (int i = 0; i < 4; i++) a.s = iadd(a.s, imul(w.k[i], iset(v[i])));
  }
  template <int Q> static INL void fold(Acc&) {}
  static INL VI sum(const Acc& a) { return a.s; }
};
