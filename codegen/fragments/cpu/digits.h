// Rows of x as small integers, laid out so that one 4-byte (or 8-byte) broadcast feeds 16 outputs: [k / 4][row][digits].
//   DIGITS 1: dynamic int8 per row, q = round(x * (TOP / absmax)): the same formula in fp32 as the reference.
//   DIGITS 2: x itself, as 16-bit integers with one scale for each 32 k: |x - s q| <= s / 2 with s = absmax / 32639,
//             and 32639 = 127 * 256 + 127 is the largest integer whose two signed bytes both fit.
// A row with a NaN or an Inf gets the scale NaN, and its digits are never looked at.
constexpr Digits FORM = Dot::FORM;
constexpr int XB = digit_bytes(FORM);

struct Rows {       // a block of R rows
  int8_t* x;        // [K / 4][R][XB]
  int32_t* start;   // [units][R]: -OFFSET * sum(q), where a sum of products begins. Unit: a group; a block for DIGITS 2
  float* step;      // [K / 32][R]: scale of a block (DIGITS 2)
  float* sums;      // [groups][R]: sum of the (scaled, DIGITS 2) digits, for zero points and minimums
  float* scale;     // [R]: last factor of every result of the row
  static size_t bytes(int R, int64_t blocks, int64_t groups) {
    int64_t units = DIGITS == 2 ? blocks : groups;
    return ((size_t)R * (blocks * 8 * XB + 4 * (units + (DIGITS == 2 ? blocks : 0) + groups + 1)) + 63) / 64 * 64;
  }
  Rows(char* at, int R, int64_t blocks, int64_t groups) {
    int64_t units = DIGITS == 2 ? blocks : groups;
    x = (int8_t*)at;
    start = (int32_t*)(at + R * blocks * 8 * XB);
    step = (float*)(start + R * units);
    sums = step + (DIGITS == 2 ? R * blocks : 0);
    scale = sums + R * groups;
  }
};

INL VF load_x(const X::T* x, int64_t left) { return load_part<X>(x, left); }
INL VI size_bits(VF a) { return iand(fbits(a), iset(0x7fffffff)); }  // ordered as integers, Inf and NaN on top
constexpr int32_t INF_BITS = 0x7f800000;

// Digits of 16 k (4 quads, `stride` bytes apart).
INL void put_digits(int8_t* out, int64_t stride, VI q) {
  if constexpr (FORM == Digits::S16) {
    alignas(32) uint64_t t[4];
    store_16(t, q);
    UNROLL for (int i = 0; i < 4; i++) {
      uint64_t v = t[i];
      v = (v & 0xffff00000000ffffu) | (v << 16 & 0xffff00000000u) | (v >> 16 & 0xffff0000u);
      memcpy(out + i * stride, &v, 8);
    }
  } else {
    alignas(16) uint32_t low[4], high[4];
    store_8(low, q);  // the low byte, read as signed ...
    if constexpr (FORM == Digits::HIGH_LOW) store_8(high, isra<8>(iadd(q, iset(128))));  // ... leaves this
    UNROLL for (int i = 0; i < 4; i++) {
      int8_t* to = out + i * stride;
      if constexpr (FORM == Digits::HIGH_LOW) memcpy(to, &high[i], 4), to += 4;
      memcpy(to, &low[i], 4);
    }
  }
}

// One row of K values into row r of a block of R rows.
static __attribute__((noinline, unused)) void digits_8(const X::T* x, int64_t K, int r, int R, Rows rows) {
  VI top = iset(0);
  int64_t k = 0;
  for (; k + 16 <= K; k += 16) top = imax(top, size_bits(X::load(x + k)));
  if (k < K) top = imax(top, size_bits(load_x(x + k, K - k)));
  int32_t bits = itop(top);
  float absmax = 0;
  memcpy(&absmax, &bits, 4);
  if (bits >= INF_BITS) {
    rows.scale[r] = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  float inverse = absmax > 0 ? TOP / absmax : 0.0f;
  bool tiny = std::isinf(inverse);  // absmax below 127 / FLT_MAX: the reference clamps, every code is -TOP, 0 or TOP
  rows.scale[r] = absmax / TOP * LEVEL_SCALE;
  VF factor = fset(inverse), lowest = fset(-(float)TOP), highest = fset((float)TOP), zero = fset(0.0f);
  const int64_t blocks = (K + 31) / 32, per = GB ? GB : blocks, stride = (int64_t)R * XB;
  int8_t* out = rows.x + (int64_t)r * XB;
  int64_t group = 0;
  VI sum = iset(0);
  for (int64_t b = 0; b < blocks; b++) {
    UNROLL for (int half = 0; half < 2; half++) {
      VF v = load_x(x + b * 32 + half * 16, K - b * 32 - half * 16);
      VI q;
      if (tiny) [[unlikely]]
        q = fround(fsel(flt(zero, v), highest, fsel(flt(v, zero), lowest, zero)));
      else
        q = fround(fmul(v, factor));
      sum = iadd(sum, q);
      put_digits(out + (b * 8 + half * 4) * stride, stride, q);
    }
    if ((b + 1) % per == 0 || b + 1 == blocks) {
      int32_t total = isum(sum);
      rows.start[group * R + r] = -OFFSET * total;
      rows.sums[group * R + r] = (float)total;
      sum = iset(0);
      group++;
    }
  }
}

static __attribute__((noinline, unused)) void digits_16(const X::T* x, int64_t K, int r, int R, Rows rows) {
  const int64_t blocks = (K + 31) / 32, per = GB ? GB : blocks, stride = (int64_t)R * XB;
  int8_t* out = rows.x + (int64_t)r * XB;
  int32_t worst = 0;
  int64_t group = 0;
  float total = 0;
  for (int64_t b = 0; b < blocks; b++) {
    VF v0 = load_x(x + b * 32, K - b * 32), v1 = load_x(x + b * 32 + 16, K - b * 32 - 16);
    int32_t bits = itop(imax(size_bits(v0), size_bits(v1)));
    worst = bits > worst ? bits : worst;
    float absmax;
    memcpy(&absmax, &bits, 4);
    // Below 1e-33 the factor would overflow; such a block counts as zero, an error of at most absmax per element.
    VF factor = fset(absmax > 1e-33f ? 32639.0f / absmax : 0.0f);
    float step = absmax / 32639.0f;
    VI q0 = fround(fmul(v0, factor)), q1 = fround(fmul(v1, factor));
    put_digits(out + b * 8 * stride, stride, q0);
    put_digits(out + (b * 8 + 4) * stride, stride, q1);
    int32_t sum = 0;
    if constexpr (OFFSET != 0 || ZERO != Zero::NONE) sum = isum(iadd(q0, q1));
    rows.step[b * R + r] = step;
    rows.start[b * R + r] = -OFFSET * sum;
    total += step * (float)sum;
    if ((b + 1) % per == 0 || b + 1 == blocks) {
      rows.sums[group * R + r] = total;
      total = 0;
      group++;
    }
  }
  rows.scale[r] = worst >= INF_BITS ? std::numeric_limits<float>::quiet_NaN() : LEVEL_SCALE;
}

INL void take_row(const X::T* x, int64_t K, int r, int R, Rows rows) {
  if constexpr (DIGITS == 2) digits_16(x, K, r, R, rows);
  else digits_8(x, K, r, R, rows);
}
