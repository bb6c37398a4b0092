// Rows of x as floats, for weights that are decoded to floats: [k][row]. With a quantized activation the floats are the
// integers round(x * (TOP / absmax)), and the row's scale waits for the end. A row with a NaN or an Inf has the scale NaN.
constexpr int XB = 16;  // bytes of 4 k of one row

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
    sums = scale + R;  // one zero per row: float formats have no zero point
    for (int r = 0; r < R; r++) sums[r] = 0;
  }
};

static __attribute__((noinline)) void take_row(const X::T* x, int64_t K, int r, int R, const Rows& rows) {
  VI top = iset(0);
  for (int64_t k = 0; k < K; k += 16)
    top = imax(top, iand(fbits(load_part<X>(x + k, K - k)), iset(0x7fffffff)));  // sizes, ordered as integers
  const int32_t bits = itop(top);
  float absmax;
  memcpy(&absmax, &bits, 4);
  const bool bad = bits >= 0x7f800000;
  const float inverse = ROUNDED ? (absmax > 0 ? TOP / absmax : 0.0f) : 1.0f;
  rows.scale[r] = bad ? std::numeric_limits<float>::quiet_NaN() : ROUNDED ? absmax / TOP : 1.0f;
  float* out = (float*)rows.x + r;
  alignas(64) float lanes[16];
  for (int64_t k = 0; k < (K + 31) / 32 * 32; k += 16) {
    VF v = bad ? fset(0.0f) : load_part<X>(x + k, K - k);
    if constexpr (ROUNDED) {
      if (std::isinf(inverse)) [[unlikely]]  // absmax below 127 / FLT_MAX: the reference clamps to -TOP, 0 or TOP
        v = fsel(flt(fset(0.0f), v), fset((float)TOP), fsel(flt(v, fset(0.0f)), fset(-(float)TOP), fset(0.0f)));
      else
        v = fcvt(fround(fmul(v, fset(inverse))));
    }
    fstore(lanes, v);
    for (int i = 0; i < 16; i++) out[(k + i) * R] = lanes[i];
  }
}
