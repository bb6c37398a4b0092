// Rows of x as small integers, laid out so that one 4-byte (or 8-byte) broadcast feeds 16 outputs: [k / 4][row][digits].
//   DIGITS 1: dynamic int8 with the reference's formula in fp32. One scale per row: q = round(x * (TOP / absmax)), s =
//             absmax / TOP. One scale for each AB blocks: s the same, q = round(x / s).
//   DIGITS 2: x itself, as 16-bit integers with one scale for each 32 k: |x - s q| <= s / 2 with s = absmax / 32639,
//             and 32639 = 127 * 256 + 127 is the largest integer whose two signed bytes both fit.
// A row with a NaN or an Inf gets the scale NaN, and its digits are never looked at.
constexpr Digits FORM = Dot::FORM;
constexpr int XB = digit_bytes(FORM);
constexpr bool STEPPED = AB > 0;  // x has a scale for each AB blocks of 32 k

struct Rows {       // a block of R rows
  int8_t* x;        // [K / 4][R][XB]
  int32_t* start;   // [units][R]: -OFFSET * sum(q), where a sum of products begins. Unit: AB blocks, or a weight's group
  float* step;      // [units][R]: scale of a unit (STEPPED)
  float* sums;      // [groups][R]: sum of the (scaled, STEPPED) digits, for zero points and minimums
  float* scale;     // [R]: last factor of every result of the row
  static int64_t units(int64_t blocks, int64_t groups) { return STEPPED ? (blocks + AB - 1) / (AB ? AB : 1) : groups; }
  static size_t bytes(int R, int64_t blocks, int64_t groups) {
    const int64_t words = units(blocks, groups) * (STEPPED ? 2 : 1) + groups + 1;
    return ((size_t)R * (blocks * 8 * XB + 4 * words) + 63) / 64 * 64;
  }
  Rows(char* at, int R, int64_t blocks, int64_t groups) {
    const int64_t n = units(blocks, groups);
    x = (int8_t*)at;
    start = (int32_t*)(at + R * blocks * 8 * XB);
    step = (float*)(start + R * n);
    sums = step + (STEPPED ? R * n : 0);
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

// One row of K values into row r of a block of R rows; one scale for the row.
static __attribute__((noinline, unused)) void digits_row(const X::T* x, int64_t K, int r, int R, Rows rows) {
  VI top = iset(0);
  int64_t k = 0;
  for (; k + 16 <= K; k += 16) top = imax(top, size_bits(X::load(x + k)));
  if (k < K) top = imax(top, size_bits(load_x(x + k, K - k)));
  int32_t bits = itop(top);
  float absmax = 0;
  memcpy(&absmax, &bits, 4);
  if (bits >= INF_BITS) {
    rows.scale[r] = std::numeric_limits<float>::quiet_NaN();
    rows.sums[r] = 0;  // COUNTS makes an integer of it, and memory may hold anything
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

// The same with one scale for each AB blocks.
static __attribute__((noinline, unused)) void digits_steps(const X::T* x, int64_t K, int r, int R, Rows rows) {
  const int64_t blocks = (K + 31) / 32, per = GB ? GB : blocks, stride = (int64_t)R * XB;
  int8_t* out = rows.x + (int64_t)r * XB;
  int32_t worst = 0;
  int64_t group = 0;
  float total = 0;
  for (int64_t b = 0, unit = 0; b < blocks; unit++) {
    const int64_t end = std::min(b + AB, blocks);
    VI top = iset(0);
    for (int64_t k = b * 32; k < end * 32; k += 16) top = imax(top, size_bits(load_x(x + k, K - k)));
    const int32_t bits = itop(top);
    worst = bits > worst ? bits : worst;
    float absmax, step;
    memcpy(&absmax, &bits, 4);
    VF factor;
    if constexpr (DIGITS == 2) {
      step = absmax / 32639.0f;
      // Below 1e-33 the factor would overflow; such a block counts as zero, an error of at most absmax per element.
      factor = fset(absmax > 1e-33f ? 32639.0f / absmax : 0.0f);
    } else {
      step = absmax > 0 ? std::max(absmax / TOP, std::numeric_limits<float>::min()) : 1.0f;
      factor = fset(step);
    }
    VI sum = iset(0);
    for (; b < end; b++)
      UNROLL for (int half = 0; half < 2; half++) {
        const VF v = load_x(x + b * 32 + half * 16, K - b * 32 - half * 16);
        const VI q = fround(DIGITS == 2 ? fmul(v, factor) : fdiv(v, factor));
        put_digits(out + (b * 8 + half * 4) * stride, stride, q);
        if constexpr (OFFSET != 0 || ZERO != Zero::NONE) sum = iadd(sum, q);
      }
    const int32_t count = OFFSET != 0 || ZERO != Zero::NONE ? isum(sum) : 0;
    rows.step[unit * R + r] = step;
    rows.start[unit * R + r] = (int32_t)(0u - OFFSET * (uint32_t)count);  // digits of a NaN may have any sum
    total += step * (float)count;
    if (b % per == 0 || b == blocks) {
      rows.sums[group * R + r] = total;
      total = 0;
      group++;
    }
  }
  rows.scale[r] = worst >= INF_BITS ? std::numeric_limits<float>::quiet_NaN() : LEVEL_SCALE;
}

INL void take_row(const X::T* x, int64_t K, int r, int R, Rows rows) {
  if constexpr (STEPPED) digits_steps(x, K, r, R, rows);
  else digits_row(x, K, r, R, rows);
}
