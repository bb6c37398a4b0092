// Rows of x as floats, for weights that are decoded to floats: [k][row]. An activation with one scale per row becomes the
// integers round(x * (TOP / absmax)), and the scale waits for the end; with a scale for each AB blocks of 32 k it becomes
// the rounded values themselves. A row with a NaN or an Inf has the scale NaN.
constexpr int XB = 16;  // bytes of 4 k of one row
constexpr bool STEPPED = AB > 0;

struct Rows {
  int8_t* x;  // float [K][R]
  int32_t* start;
  float *step, *sums;
  float* scale;  // [R]
  static size_t bytes(int R, int64_t blocks, int64_t) { return ((size_t)R * (blocks * 8 * XB + 8) + 63) / 64 * 64; }
  Rows(char* at, int R, int64_t blocks, int64_t) {
    x = (int8_t*)at;
    start = nullptr, step = nullptr;
    scale = (float*)(at + R * blocks * 8 * XB);
    sums = scale + R;  // one per row that nothing uses: float formats have no zero point
  }
};

static __attribute__((noinline)) void take_row(const X::T* x, int64_t K, int r, int R, const Rows& rows) {
  const int64_t padded = (K + 31) / 32 * 32, unit = AB ? AB * 32 : padded;
  constexpr float NONE = std::numeric_limits<float>::quiet_NaN();
  float* out = (float*)rows.x + r;
  alignas(64) float lanes[16];
  rows.scale[r] = 1.0f, rows.sums[r] = 0;
  for (int64_t from = 0; from < padded; from += unit) {
    const int64_t to = std::min(from + unit, padded);
    VI top = iset(0);
    for (int64_t k = from; k < to; k += 16)
      top = imax(top, iand(fbits(load_part<X>(x + k, K - k)), iset(0x7fffffff)));  // sizes, ordered as integers
    const int32_t bits = itop(top);
    float absmax;
    memcpy(&absmax, &bits, 4);
    const bool bad = bits >= 0x7f800000;
    const float inverse = absmax > 0 ? TOP / absmax : 0.0f, step = std::max(absmax / TOP, std::numeric_limits<float>::min());
    if (bad) rows.scale[r] = NONE;
    else if (ROUNDED && !AB) rows.scale[r] = absmax / TOP;
    for (int64_t k = from; k < to; k += 16) {
      VF v = bad ? fset(0.0f) : load_part<X>(x + k, K - k);
      if constexpr (ROUNDED && AB) {
        v = fmul(fcvt(fround(fdiv(v, fset(step)))), fset(step));
      } else if constexpr (ROUNDED) {
        if (std::isinf(inverse)) [[unlikely]]  // absmax below 127 / FLT_MAX: the reference clamps to -TOP, 0 or TOP
          v = fsel(flt(fset(0.0f), v), fset((float)TOP), fsel(flt(v, fset(0.0f)), fset(-(float)TOP), fset(0.0f)));
        else
          v = fcvt(fround(fmul(v, fset(inverse))));
      }
      fstore(lanes, v);
      for (int i = 0; i < 16; i++) out[(k + i) * R] = lanes[i];
    }
  }
}
