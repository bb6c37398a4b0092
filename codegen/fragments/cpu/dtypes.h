// Memory formats of activations, results, extras and scales: one pair of 16-lane load / store each.
struct F32 {
  using T = float;
  static INL VF load(const T* p) { return fload(p); }
  static INL void store(T* p, VF a) { fstore(p, a); }
};
struct F16 {
  using T = uint16_t;
  static INL VF load(const T* p) { return load_half(p); }
  static INL void store(T* p, VF a) { store_half(p, a); }
};
struct BF16 {
  using T = uint16_t;
  static INL VF load(const T* p) { return ffrom(ishl<16>(load_u16(p))); }
  static INL void store(T* p, VF a) {  // to nearest, ties to even; a NaN stays one (0x7fff would become infinity)
    VI u = fbits(a);
    VI even = iand(ishr<16>(u), iset(1));
    VI r = ishr<16>(iadd(iadd(u, iset(0x7fff)), even));
    store_16(p, fbits(fsel(fnan(a), ffrom(iset(0x7fc0)), ffrom(r))));
  }
};
// Scale formats of one byte.
struct E8M0 {  // 2^(code - 127); code 0 is 2^-127, a subnormal
  using T = uint8_t;
  static INL VF load(const T* p) {
    VI code = load_u8(p);
    return ffrom(imax(ishl<23>(code), iset(0x00400000)));
  }
};
struct POW2 {  // 2^code, code int8 (exponents below -126 do not occur)
  using T = int8_t;
  static INL VF load(const T* p) { return ffrom(ishl<23>(iadd(load_s8(p), iset(127)))); }
};
struct U8 {
  using T = uint8_t;
  static INL VF load(const T* p) { return fcvt(load_u8(p)); }
};

// The first n of 16 lanes; the others read as zero and are not written.
template <class D> INL VF load_part(const typename D::T* p, int64_t n) {
  if (n >= 16) return D::load(p);
  alignas(64) typename D::T all[16] = {};
  if (n > 0) memcpy(all, p, sizeof(typename D::T) * n);
  return D::load(all);
}
template <class D> INL void store_part(typename D::T* p, int64_t n, VF a) {
  if (n >= 16) return D::store(p, a);
  alignas(64) typename D::T all[16];
  D::store(all, a);
  memcpy(p, all, sizeof(typename D::T) * n);
}
