// Scales of a weight, one for each run of a row: bit for bit those of qcompile/ir/qparams.py and qcompile/ir/fit.py.
// before: OPERATION, X and SCALE (memory formats), ZERO, SIGNED, SEARCH, LOW and TOP (levels), SMALLEST and LARGEST (scales),
// ON_GRID, TRIALS and TRIAL (factors of the first scale), GROUP (0: whole rows).
// ------------------------------------------------------------------------------------------------------------- sums
typedef float F8 __attribute__((vector_size(32)));
typedef float F4 __attribute__((vector_size(16)));
// 16 numbers: the second half is added to the first until one is left.
INL float fsum(VF a) {
  alignas(64) float v[16];
  fstore(v, a);
  F8 low, high;
  memcpy(&low, v, 32), memcpy(&high, v + 8, 32);
  low += high;
  F4 first, second;
  memcpy(&first, &low, 16), memcpy(&second, (char*)&low + 16, 16);
  first += second;
  return (first[0] + first[2]) + (first[1] + first[3]);
}

// A group of 16 V elements, in registers.
template <int V> struct Short {
  VF x[V];
  static constexpr int64_t n = 16 * V;
  explicit Short(const X::T* from) {
    UNROLL for (int i = 0; i < V; i++) x[i] = X::load(from + 16 * i);
  }
  // S sums at once, of what `f` makes of 16 elements.
  template <int S, class F> INL void sums(float* total, F&& f) const {
    VF t[S][V];
    UNROLL for (int i = 0; i < V; i++) {
      VF terms[S];
      f(x[i], terms);
      UNROLL for (int s = 0; s < S; s++) t[s][i] = terms[s];
    }
    UNROLL for (int s = 0; s < S; s++) {
      UNROLL for (int h = V / 2; h; h /= 2)
        UNROLL for (int i = 0; i < h; i++) t[s][i] = fadd(t[s][i], t[s][i + h]);
      total[s] = fsum(t[s][0]);
    }
  }
  template <class F> INL void each(F&& f) const {
    UNROLL for (int i = 0; i < V; i++) f(x[i]);
  }
};

// A group of any length, in memory.
struct Long {
  static constexpr int TERMS = 3;
  const int64_t n;
  int64_t vectors = 1;  // a power of two
  float *x, *terms;     // padded with the first element

  static int64_t memory(int64_t n) {
    int64_t vectors = 1;
    while (16 * vectors < n) vectors *= 2;
    return 16 * vectors * (1 + TERMS) + 16;
  }
  Long(const X::T* from, int64_t n, float* work) : n(n), x(work) {
    while (16 * vectors < n) vectors *= 2;
    terms = work + 16 * vectors;
    for (int64_t i = 0; i < n; i += 16) fstore(x + i, load_part<X>(from + i, n - i));
    for (int64_t i = n; i % 16; i++) x[i] = x[0];
  }
  template <int S, class F> INL void sums(float* total, F&& f) const {
    static_assert(S <= TERMS);
    const int64_t size = 16 * vectors, whole = n / 16 * 16, begun = (n + 15) / 16 * 16;
    for (int64_t i = 0; i < begun; i += 16) {
      VF t[S];
      f(fload(x + i), t);
      UNROLL for (int s = 0; s < S; s++) fstore(terms + s * size + i, t[s]);
    }
    UNROLL for (int s = 0; s < S; s++) {
      float* t = terms + s * size;
      if (whole < size) memset(t + n, 0, sizeof(float) * (size_t)(size - n));
      for (int64_t h = size / 2; h >= 16; h /= 2)
        for (int64_t i = 0; i < h; i += 16) fstore(t + i, fadd(fload(t + i), fload(t + i + h)));
      total[s] = fsum(fload(t));
    }
  }
  template <class F> INL void each(F&& f) const {
    for (int64_t i = 0; i < n; i += 16) f(fload(x + i));
  }
};

// -------------------------------------------------------------------------------------------------------- one group
INL float scalar(VF a) {
  alignas(64) float v[16];
  fstore(v, a);
  return v[0];
}
template <class Better> INL float extreme(VF a, Better&& better) {
  alignas(64) float v[16];
  fstore(v, a);
  for (int i = 1; i < 16; i++) v[0] = better(v[i], v[0]) ? v[i] : v[0];
  return v[0];
}
// As it is stored, and what it reads as.
struct Stored {
  SCALE::T bits;
  float value;
  explicit Stored(float a) {
    alignas(64) SCALE::T all[16];
    SCALE::store(all, fset(a));
    bits = all[0], value = scalar(SCALE::load(all));
  }
};
INL float clamped(float a, float low, float high) { return a < low ? low : a > high ? high : a; }  // NaN stays
INL Stored scale_of(float wanted) { return Stored(wanted == 0 ? 1.0f : clamped(wanted, SMALLEST, LARGEST)); }

// Levels of 16 elements, without the zero point.
struct Levels {
  VF inverse, shift, low, top;
  Levels(float s, float zero) : inverse(fset(1.0f / s)), shift(fset(zero)) {
    const float point = ZERO == POINT ? zero : 0.0f;
    low = fset(LOW - point), top = fset(TOP - point);
  }
  INL VF operator()(VF x) const {
    const VF y = fmul(ZERO == MINIMUM ? fsub(x, shift) : x, inverse);
    return fcvt(fround(fsel(flt(y, low), low, fsel(flt(top, y), top, y))));  // whole numbers: before rounding or after is the same
  }
};
template <class G> INL float error_of(const G& g, float s, float zero) {
  const Levels levels(s, zero);
  const VF scale = fset(s);
  float error;
  g.template sums<1>(&error, [&](VF x, VF* t) __attribute__((always_inline)) {
    VF value = fmul(levels(x), scale);
    if (ZERO == MINIMUM) value = fadd(value, levels.shift);
    const VF d = fsub(value, x);
    t[0] = fmul(d, d);
  });
  return error;
}

using Minimum = std::conditional_t<ZERO == MINIMUM, SCALE::T, uint8_t>;

template <class G> INL void fit(const G& g, SCALE::T* scale, Minimum* stored_zero) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  VF least = fset(std::numeric_limits<float>::infinity()), most = fset(-std::numeric_limits<float>::infinity());
  VI size = iset(0);
  g.each([&](VF x) __attribute__((always_inline)) {
    size = imax(size, iand(fbits(x), iset(0x7fffffff)));
    if (ZERO != NONE || !SIGNED) least = fsel(flt(x, least), x, least), most = fsel(flt(most, x), x, most);
  });
  const int32_t largest = itop(size);
  const bool finite = largest < 0x7f800000;
  float low = 0, high = 0, wanted;
  bool empty;
  if (ZERO != NONE || !SIGNED) {
    low = extreme(least, [](float a, float b) { return a < b; });
    high = extreme(most, [](float a, float b) { return a > b; });
  }
  if (ZERO == NONE) {
    float peak;
    if (SIGNED) memcpy(&peak, &largest, 4);
    else peak = high > 0 ? high : 0.0f;
    wanted = peak / TOP, empty = peak == 0;
  } else {
    if (ZERO == POINT) low = low < 0 ? low : 0.0f, high = high > 0 ? high : 0.0f;
    wanted = (high * 0.5f - low * 0.5f) / (TOP * 0.5f), empty = low == high;
  }
  Stored best = finite ? scale_of(empty ? 0.0f : wanted < TINY ? TINY : wanted) : Stored(nan);
  float zero = 0;
  Stored minimum(0.0f);
  if (ZERO == POINT) {
    const float point = finite ? std::nearbyint(-low / best.value) : 0.0f;
    zero = clamped(point, 0.0f, TOP);
  } else if (ZERO == MINIMUM) {
    minimum = Stored(finite ? clamped(low == 0 ? 0.0f : low, -LARGEST, LARGEST) : nan);
    zero = minimum.value;
  }
  if (SEARCH && finite) {
    float error = error_of(g, best.value, zero), squares, sum_x = 0;
    g.template sums<1>(&squares, [](VF x, VF* t) __attribute__((always_inline)) { t[0] = fmul(x, x); });
    if (ZERO == MINIMUM) g.template sums<1>(&sum_x, [](VF x, VF* t) __attribute__((always_inline)) { t[0] = x; });
    if (!(error <= squares * ON_GRID)) {
      const float first = best.value, shift = zero, count = (float)g.n;
      for (int i = 0; i < TRIALS; i++) {
        const float trial = first * TRIAL[i];
        const Levels levels(trial, shift);
        float sum[3];  // of q q, q x, q
        g.template sums<ZERO == MINIMUM ? 3 : 2>(sum, [&](VF x, VF* t) __attribute__((always_inline)) {
          const VF q = levels(x);
          t[0] = fmul(q, q), t[1] = fmul(q, x);
          if (ZERO == MINIMUM) t[2] = q;
        });
        float s = sum[0] > 0 && sum[1] > 0 ? sum[1] / sum[0] : trial, offset = shift;
        Stored kept = minimum;
        if (ZERO == MINIMUM) {
          const float spread = count * sum[0] - sum[2] * sum[2], slope = (count * sum[1] - sum_x * sum[2]) / spread;
          s = spread > 0 && slope > 0 ? slope : trial;
          kept = Stored(clamped((sum_x - s * sum[2]) / count, -LARGEST, LARGEST)), offset = kept.value;
        }
        const Stored stored = scale_of(s);
        const float found = error_of(g, stored.value, offset);
        if (found < error) error = found, best = stored, minimum = kept;
      }
    }
  }
  *scale = best.bits;
  if constexpr (ZERO == POINT) *stored_zero = (uint8_t)zero;
  if constexpr (ZERO == MINIMUM) *stored_zero = minimum.bits;
}

// --------------------------------------------------------------------------------------------------------- a weight
constexpr int64_t SERIAL_BELOW = 1 << 14;  // elements

static void rows(const X::T* x, int64_t begin, int64_t end, int64_t k, SCALE::T* scale, Minimum* zero) {
  const Arithmetic arithmetic;
  const int64_t size = GROUP ? GROUP : k, groups = (k + size - 1) / size;
  std::vector<float> memory((size_t)(GROUP == 0 || GROUP > 64 || k % size ? Long::memory(std::min(size, k)) : 16));
  float* work = (float*)(((uintptr_t)memory.data() + 63) / 64 * 64);
  for (int64_t r = begin; r < end; r++)
    for (int64_t g = 0; g < groups; g++) {
      const X::T* at = x + r * k + g * size;
      const int64_t n = std::min(size, k - g * size), to = r * groups + g;
      if constexpr (GROUP == 16 || GROUP == 32 || GROUP == 64) {
        if (n == GROUP) {
          fit(Short<GROUP / 16>(at), scale + to, zero + to);
          continue;
        }
      }
      fit(Long(at, n, work), scale + to, zero + to);
    }
}

void boxed(Slot* stack, uint64_t, uint64_t) {
  Tensor x((Handle)stack[0]), scale((Handle)stack[1]), zero((Handle)stack[2]);
  x.read("x", 0, (torch_.*X_DTYPE)());
  x.dense("x", 0);
  if (x.dim != 2) refuse("x has %lld dimensions", (long long)x.dim);
  const int64_t n = x.size[0], k = x.size[1], groups = GROUP ? (k + GROUP - 1) / GROUP : 1;
  scale.read("scale", 0, (torch_.*SCALE_DTYPE)());
  scale.expect("scale", 0, {n, groups});
  zero.read("zero", 0, (torch_.*ZERO_DTYPE)());
  if (ZERO != NONE) zero.expect("zero", 0, {n, groups});
  const int threads = n * k < SERIAL_BELOW ? 1 : (int)std::min<int64_t>(omp_get_max_threads(), n);
  const int64_t piece = std::max<int64_t>(1, (1 << 13) / std::max<int64_t>(k, 1));
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
  for (int64_t r = 0; r < n; r += piece)
    rows((const X::T*)x.data, r, std::min(r + piece, n), k, (SCALE::T*)scale.data, (Minimum*)zero.data);
}
