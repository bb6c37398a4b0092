// Functions of epilogues. Polynomials are least-maximum-error fits on the stated intervals, evaluated by Horner's rule; the
// errors in brackets are the largest found against float64 (tests/codegen/test_epilogue.py measures them again). NaN goes in,
// NaN comes out; infinities give what torch gives.
INL VF fneg(VF a) { return ffrom(isub(fbits(a), iset(INT32_MIN))); }
INL VF v_abs(VF a) { return ffrom(iand(fbits(a), iset(0x7fffffff))); }
INL VF v_sqrt(VF a) { return fsqrt(a); }
INL VF v_rsqrt(VF a) { return fdiv(fset(1.0f), fsqrt(a)); }
INL VF v_maximum(VF a, VF b) { return fsel(fnan(b), b, fsel(flt(a, b), b, a)); }
INL VF v_minimum(VF a, VF b) { return fsel(fnan(b), b, fsel(flt(b, a), b, a)); }
INL VF v_relu(VF a) { return fsel(flt(a, fset(0.0f)), fset(0.0f), a); }
INL VF with_sign(VF size, VF sign) { return ffrom(ior(fbits(size), iand(fbits(sign), iset(INT32_MIN)))); }
template <int N> INL VF horner(VF x, const float (&c)[N]) {  // c[0] + c[1] x + ...
  VF y = fset(c[N - 1]);
  UNROLL for (int i = N - 2; i >= 0; i--) y = fma(y, x, fset(c[i]));
  return y;
}

// exp(a) = 2^n (1 + r + r^2 q(r)), |r| <= ln(2) / 2 [2 ulp; 2^-149 where the result is subnormal].
INL VF v_exp(VF a) {
  constexpr float Q[] = {0x1.000000p-1f, 0x1.555554p-3f, 0x1.55548ep-5f, 0x1.111272p-7f, 0x1.6d8d54p-10f, 0x1.9f0862p-13f};
  VF x = fsel(flt(a, fset(-105.0f)), fset(-105.0f), fsel(flt(fset(90.0f), a), fset(90.0f), a));
  VI n = fround(fmul(x, fset(0x1.715476p+0f)));
  VF k = fcvt(n);
  VF r = fma(k, fset(-0x1.62e400p-1f), x);  // ln 2 in two parts, the first one with 12 zero bits at its end
  r = fma(k, fset(-0x1.7f7d1cp-20f), r);
  VF p = fadd(fma(fmul(r, r), horner(r, Q), r), fset(1.0f));
  VI half = isra<1>(n);  // 2^n as a product of two, since n may leave the range of normal numbers
  p = fmul(p, ffrom(ishl<23>(iadd(half, iset(127)))));
  return fmul(p, ffrom(ishl<23>(iadd(isub(n, half), iset(127)))));
}

// log(2^e m) = e ln 2 + 2 s + s^3 p(s^2), s = (m - 1) / (m + 1), m in [sqrt(1/2), sqrt(2)] [3 ulp].
INL VF v_log(VF a) {
  constexpr float P[] = {0x1.555554p-1f, 0x1.999a7cp-2f, 0x1.2438a8p-2f, 0x1.e2fdd6p-3f};
  const VF tiny = fset(0x1p-126f), zero = fset(0.0f), top = fset(std::numeric_limits<float>::infinity());
  VM subnormal = flt(a, tiny);
  VI u = fbits(fsel(subnormal, fmul(a, fset(0x1p23f)), a));
  VI e = isra<23>(isub(u, iset(0x3f3504f3)));  // bits of sqrt(1/2)
  VF m = ffrom(isub(u, ishl<23>(e)));
  VF k = fsub(fcvt(e), fsel(subnormal, fset(23.0f), zero));
  VF f = fsub(m, fset(1.0f)), s = fdiv(f, fadd(m, fset(1.0f))), z = fmul(s, s);
  // 2 s = f - s f keeps the rounding error of s away from the leading term.
  VF tail = fma(s, fsub(fmul(z, horner(z, P)), f), fmul(k, fset(0x1.7f7d1cp-20f)));
  VF y = fma(k, fset(0x1.62e400p-1f), fadd(f, tail));
  y = fsel(flt(a, top), y, a);                            // +inf and NaN
  y = fsel(flt(zero, a), y, fsel(fnan(a), a, fneg(top)));  // 0
  return fsel(flt(a, zero), fset(std::numeric_limits<float>::quiet_NaN()), y);
}

// x + x^3 p(x^2) below 0.625, else 1 - 2 / (exp(2 x) + 1) [3 ulp].
INL VF v_tanh(VF a) {
  constexpr float P[] = {-0x1.555554p-2f, 0x1.11106cp-3f, -0x1.b9ef7cp-5f, 0x1.6394d8p-6f, -0x1.0c213ep-7f, 0x1.197b62p-9f};
  VF x = v_abs(a), z = fmul(a, a);
  VF small = fma(fmul(x, z), horner(z, P), x);
  VF large = fsub(fset(1.0f), fdiv(fset(2.0f), fadd(v_exp(fadd(x, x)), fset(1.0f))));
  return with_sign(fsel(flt(x, fset(0.625f)), small, large), a);
}

// x p(x^2) below 1, else 1 - exp(-q(x)) with q = -log erfc on [1, 4]; erf(4) rounds to 1 [3 ulp].
INL VF v_erf(VF a) {
  constexpr float P[] = {0x1.20dd76p+0f,  -0x1.812746p-2f,  0x1.ce2f0ap-4f,  -0x1.b829d8p-6f,
                         0x1.562b1ap-8f, -0x1.bcd7dep-11f, 0x1.d8b88cp-14f, -0x1.44cfbcp-17f};
  constexpr float Q[] = {-0x1.8a5954p-13f, 0x1.212c0ep+0f,  0x1.443566p-1f,   0x1.bc151ep-4f,
                         -0x1.9d0318p-6f,  0x1.138cd8p-8f, -0x1.cec654p-12f, 0x1.6bd850p-16f};
  VF x = v_abs(a);
  VF small = fmul(x, horner(fmul(x, x), P));
  VF c = fsel(flt(fset(4.0f), x), fset(4.0f), x);
  VF large = fsub(fset(1.0f), v_exp(fneg(horner(c, Q))));
  return with_sign(fsel(flt(x, fset(1.0f)), small, large), a);
}

// Both from exp(-|x|), which cannot overflow [3 ulp].
INL VF v_sigmoid(VF a) {
  VF e = v_exp(fneg(v_abs(a)));
  VF s = fdiv(fset(1.0f), fadd(fset(1.0f), e));
  return fsel(flt(a, fset(0.0f)), fmul(e, s), s);
}
// [4 ulp, and 156 * 2^-149 where exp(x) is subnormal]
INL VF v_silu(VF a) { return fmul(a, v_sigmoid(a)); }
