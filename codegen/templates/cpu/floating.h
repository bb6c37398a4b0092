// R rows x 16 outputs x a range of K in fp32, for formats whose levels are not integers: a code becomes its level, levels of
// a group are multiplied and summed, the sum is multiplied by the group's scale.
// config: LEVELS[256], EXPONENT / MANTISSA / BIAS (0 when the format is a table), SIGNED.
constexpr bool SINGLE = GB == 0;
constexpr bool UNPACKED = false;

INL VF level(VI code) {  // lanes 0 .. 2^BITS - 1
  if constexpr (BITS <= 4) return fmap16(code, LEVELS);
  if constexpr (EXPONENT == 0) return fgather(code, LEVELS);
  constexpr int WIDTH = EXPONENT + MANTISSA;
  VI size = iand(code, iset((1 << WIDTH) - 1)), sign = ishl<31 - WIDTH>(iand(code, iset(1 << WIDTH)));
  // Two cases instead of a multiplied subnormal, which some machines do slowly and others flush to zero.
  VF normal = ffrom(iadd(ishl<23 - MANTISSA>(size), iset((127 - BIAS) << 23)));
  VF small = fmul(fcvt(size), fset(SMALLEST));
  return ffrom(ior(fbits(fsel(flt(small, fset(SMALLEST * (1 << MANTISSA))), small, normal)), sign));
}
template <int Q, class F> INL void levels_of(const uint8_t* block, F&& f) {
  VI quad = Planes::quad<Q>(block);
  each<4>(LAMBDA { f(index_, level(index_ == 3 ? ishr<24>(quad) : iand(ishr<8 * index_>(quad), iset(255)))); });
}
struct Plain {  // levels as floats [32][16]
  static constexpr int BYTES = 32 * 16 * 4;
  static INL void prefetch(const uint8_t*) {}
  template <int Q, class F> static INL void quad(const uint8_t* block, F&& f) {
    each<4>(LAMBDA { f(index_, fload((const float*)block + (Q * 4 + index_) * 16)); });
  }
};
struct Packed {
  static constexpr int BYTES = Planes::BYTES;
  static INL void prefetch(const uint8_t* block) { Planes::prefetch(block); }
  template <int Q, class F> static INL void quad(const uint8_t* block, F&& f) { levels_of<Q>(block, f); }
};
static __attribute__((noinline, unused)) void unpack(const uint8_t* codes, int64_t blocks, uint8_t* out) {
  for (int64_t b = 0; b < blocks; b++, codes += Packed::BYTES, out += Plain::BYTES)
    each<8>(LAMBDA {
      float* to = (float*)out + index_ * 64;
      levels_of<index_>(codes, [&](auto j, VF w) __attribute__((always_inline)) { fstore(to + j * 16, w); });
    });
}

struct Span {
  const uint8_t* codes;
  const S::T* scale;
  const Z::T* zero;
  Rows rows;
  int64_t blocks;
  bool first;
};

template <class Codes, int R>
static __attribute__((noinline)) void multiply(const Span& span, float* c) {
  constexpr int U = R >= 4 ? 1 : 4 / R;  // independent sums that hide the latency of fma
  const uint8_t* codes = span.codes;
  const float* x = (const float*)span.rows.x;
  const S::T* scale = span.scale;
  VF y[R];
  UNROLL for (int r = 0; r < R; r++) y[r] = span.first ? fset(0.0f) : fload(c + r * 16);
  for (int64_t b = 0; b < span.blocks;) {
    const int64_t end = SINGLE || span.blocks - b < GB ? span.blocks : b + GB;
    VF acc[R][U];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int u = 0; u < U; u++) acc[r][u] = fset(0.0f);
    for (; b < end; b++, codes += Codes::BYTES, x += 32 * R) {
      Codes::prefetch(codes);
      each<8>(LAMBDA {
        Codes::template quad<index_>(codes, [&](auto j, VF w) __attribute__((always_inline)) {
          UNROLL for (int r = 0; r < R; r++)
            acc[r][j % U] = fma(w, fset(x[(index_ * 4 + j) * R + r]), acc[r][j % U]);
        });
      });
    }
    const VF s = SINGLE ? fset(1.0f) : S::load(scale);
    UNROLL for (int r = 0; r < R; r++) {
      VF sum = acc[r][0];
      UNROLL for (int u = 1; u < U; u++) sum = fadd(sum, acc[r][u]);
      y[r] = fma(sum, s, y[r]);
    }
    scale += SCALES_PER_GROUP;
  }
  UNROLL for (int r = 0; r < R; r++) fstore(c + r * 16, y[r]);
}

INL VF result(const float* c, VF s, VF, float) { return fmul(fload(c), s); }
