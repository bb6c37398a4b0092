// R rows x 16 outputs x a range of K, in integers. The sums of products of codes and digits are exact; they become
// floats once per group of weights, or once per AB blocks where the activation has a scale for each of those.
using Packed = Planes;
struct Plain {  // quads already in bytes: 8-bit codes, and what `unpack` writes
  static constexpr int BYTES = 512;
  template <int Q> static INL VI quad(const uint8_t* block) { return iload(block + Q * 64); }
  static INL void prefetch(const uint8_t*) {}
};
constexpr bool UNPACKED = BITS == 8 && PLANE_COUNT == 1 && !MAP;

static __attribute__((unused)) void unpack(const uint8_t* codes, int64_t blocks, uint8_t* out) {
  for (int64_t b = 0; b < blocks; b++, codes += Packed::BYTES, out += Plain::BYTES)
    each<8>(LAMBDA { istore(out + index_ * 64, Packed::quad<index_>(codes)); });
}

struct Span {            // a range of K of one panel and one block of rows
  const uint8_t* codes;
  const S::T* scale;     // [groups][16] from the range's first group on
  const Z::T* zero;
  Rows rows;             // pointers moved to the range
  int64_t blocks;
  bool first;            // nothing in `c` yet
};
constexpr bool SINGLE = GB == 0;               // one group over all of K: the scale waits for the end
constexpr bool COUNTS = SINGLE && !STEPPED;    // `c` holds int32 sums

template <class Codes, int R, int U, class A>
INL void block_dot(A (&acc)[R][U], const uint8_t* codes, const int8_t* x) {
  each<8>(LAMBDA {
    Dot::W w = Dot::prep(Codes::template quad<index_>(codes));
    UNROLL for (int r = 0; r < R; r++) {
      Dot::dot(acc[r][index_ % U], w, x + (index_ * R + r) * XB);
      Dot::template fold<index_>(acc[r][index_ % U]);
    }
  });
}

template <class Codes, int R>
static __attribute__((noinline)) void multiply(const Span& span, float* c) {
  constexpr int U = R >= Dot::CHAINS ? 1 : Dot::CHAINS / R;
  const uint8_t* codes = span.codes;
  const int8_t* x = span.rows.x;
  Dot::Acc acc[R][U];
  auto begin = [&](const int32_t* start) __attribute__((always_inline)) {
    UNROLL for (int r = 0; r < R; r++) {
      Dot::init(acc[r][0], iset(start[r]));
      UNROLL for (int u = 1; u < U; u++) Dot::init(acc[r][u], iset(0));
    }
  };
  auto total = [&](int r) __attribute__((always_inline)) {
    VI sum = Dot::sum(acc[r][0]);
    UNROLL for (int u = 1; u < U; u++) sum = iadd(sum, Dot::sum(acc[r][u]));
    return sum;
  };
  auto advance = [&]() __attribute__((always_inline)) {
    Codes::prefetch(codes);
    block_dot<Codes, R, U>(acc, codes, x);
    codes += Codes::BYTES;
    x += 8 * R * XB;
  };
  if constexpr (COUNTS) {
    if (span.first) begin(span.rows.start);
    else
      UNROLL for (int r = 0; r < R; r++) {
        Dot::init(acc[r][0], iload(c + r * 16));
        UNROLL for (int u = 1; u < U; u++) Dot::init(acc[r][u], iset(0));
      }
    for (int64_t b = 0; b < span.blocks; b++) advance();
    UNROLL for (int r = 0; r < R; r++) istore(c + r * 16, total(r));
  } else {
    VF y[R];
    UNROLL for (int r = 0; r < R; r++) y[r] = span.first ? fset(0.0f) : fload(c + r * 16);
    const int32_t* start = span.rows.start;
    const float *step = span.rows.step, *sums = span.rows.sums;
    const S::T* scale = span.scale;
    const Z::T* zero = span.zero;
    for (int64_t b = 0; b < span.blocks;) {
      const int64_t end = SINGLE || span.blocks - b < GB ? span.blocks : b + GB;
      VF s = SINGLE ? fset(1.0f) : S::load(scale), z = ZERO == Zero::NONE || SINGLE ? fset(0.0f) : Z::load(zero);
      if constexpr (!STEPPED) {
        begin(start);
        start += R;
        for (; b < end; b++) advance();
        UNROLL for (int r = 0; r < R; r++) {
          VF count = fcvt(total(r));
          if constexpr (ZERO == Zero::POINT) count = fma(z, fset(-sums[r]), count);
          y[r] = fma(count, s, y[r]);
        }
      } else {
        for (; b < end; start += R, step += R) {
          begin(start);
          if constexpr (AB == 1) advance(), b++;
          else
            for (const int64_t last = std::min(b + AB, end); b < last; b++) advance();
          UNROLL for (int r = 0; r < R; r++) y[r] = fma(fcvt(total(r)), SINGLE ? fset(step[r]) : fmul(s, fset(step[r])), y[r]);
        }
        if constexpr (ZERO == Zero::POINT && !SINGLE) {
          VF shift = fmul(s, z);
          UNROLL for (int r = 0; r < R; r++) y[r] = fma(shift, fset(-sums[r]), y[r]);
        }
      }
      if constexpr (ZERO == Zero::MINIMUM && !SINGLE) UNROLL for (int r = 0; r < R; r++) y[r] = fma(z, fset(sums[r]), y[r]);
      sums += R, scale += SCALES_PER_GROUP, zero += SCALES_PER_GROUP;
    }
    UNROLL for (int r = 0; r < R; r++) fstore(c + r * 16, y[r]);
  }
}

// What `c` stands for: one row of a panel, before the row's own scale. `s`, `z`: the panel's only group when SINGLE.
INL VF result(const float* c, VF s, VF z, float sum) {
  if constexpr (COUNTS) {
    VI count = iload(c);
    if constexpr (ZERO == Zero::POINT) count = isub(count, imul(fround(z), iset((int32_t)sum)));
    VF y = fmul(fcvt(count), s);
    return ZERO == Zero::MINIMUM ? fma(z, fset(sum), y) : y;
  } else if constexpr (SINGLE) {
    VF y = fmul(ZERO == Zero::POINT ? fma(z, fset(-sum), fload(c)) : fload(c), s);
    return ZERO == Zero::MINIMUM ? fma(z, fset(sum), y) : y;
  } else {
    return fload(c);
  }
}
