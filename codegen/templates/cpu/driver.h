// One call: quantize rows, walk over panels with all threads, finish each panel (scales, epilogue, store).
// Panels are handed out by a counter, so a core that somebody else is using delays its own panels only.
struct Segment {
  const uint8_t* codes;
  const S::T* scale;
  const Z::T* zero;
  int64_t n, panels, column;  // column: where the segment's results begin in y
};
struct Problem {
  const X::T* x;
  Segment segment[SEGMENTS];
  Extras extras;
  Y::T* y;
  int64_t m, k, ldx, ldy, blocks, groups, units;
};
constexpr int64_t MOST_BYTES = 32 << 20;
constexpr int TOGETHER = PAIRED ? SEGMENTS : 1;  // panels that one unit of work multiplies before its epilogue

struct NoMemory : std::bad_alloc {  // thrown outside of parallel regions, which no exception may leave
  const char* what() const noexcept override { return "qmm: no memory for quantized rows"; }
};
class Scratch {  // memory of one thread, kept between calls; nullptr when there is none
  char* at = nullptr;
  size_t size = 0;

 public:
  char* get(size_t want) {
    if (want > size) {
      free(at);
      size = (want + want / 4 + 4095) / 4096 * 4096;
      at = (char*)aligned_alloc(4096, size);
      if (!at) size = 0;
    }
    return at;
  }
  ~Scratch() { free(at); }
};
static thread_local Scratch shared_rows, own_panels;

struct Unit {
  int segment;
  int64_t panel;
};
INL Unit unit_of(const Problem& p, int64_t u) {
  Unit at{0, u};
  if constexpr (!PAIRED)
    while (at.panel >= p.segment[at.segment].panels) at.panel -= p.segment[at.segment++].panels;
  return at;
}

INL Rows moved(Rows rows, int64_t block, int R) {
  const int64_t group = GB ? block / (GB ? GB : 1) : 0, unit = STEPPED ? block / (AB ? AB : 1) : group;
  rows.x += block * 8 * R * XB;
  rows.start += unit * R, rows.step += unit * R, rows.sums += group * R;
  return rows;
}
INL Span span_of(const Problem& p, const Segment& s, int64_t panel, Rows rows, int R, int64_t from, int64_t to) {
  const int64_t group = GB ? from / (GB ? GB : 1) : 0;
  const int64_t scale = SCALES_PER_GROUP ? (panel * p.groups + group) * 16 : panel * 16;
  return {s.codes + (panel * p.blocks + from) * Packed::BYTES, s.scale + scale, s.zero + (ZERO == Zero::NONE ? 0 : scale),
          moved(rows, from, R), to - from, from == 0};
}

// Rows m .. m + count of one unit: c[i] holds R x 16 sums of the unit's i-th panel.
static __attribute__((noinline)) void finish(const Problem& p, Unit at, Rows rows, int64_t m, int count, const float* const* c) {
  VF s[TOGETHER], z[TOGETHER];
  for (int i = 0; i < TOGETHER; i++) {
    const Segment& segment = p.segment[at.segment + i];
    s[i] = SINGLE ? S::load(segment.scale + at.panel * 16) : fset(1.0f);
    z[i] = SINGLE && ZERO != Zero::NONE ? Z::load(segment.zero + at.panel * 16) : fset(0.0f);
  }
  const Segment& segment = p.segment[at.segment];
  const int64_t column = segment.column + at.panel * 16, left = segment.n - at.panel * 16;
  for (int r = 0; r < count; r++) {
    VF a[TOGETHER];
    float scale = rows.scale[r];
    for (int i = 0; i < TOGETHER; i++) a[i] = fmul(result(c[i] + r * 16, s[i], z[i], rows.sums[r]), fset(scale));
    VF y = epilogue(a, p.extras, m + r, column, left);
    if (scale != scale) y = fset(scale);  // the row held a NaN or an Inf
    store_part<Y>(p.y + (m + r) * p.ldy + column, left, y);
  }
}

// Few rows: every thread quantizes them for itself (cheaper than a barrier) and streams its panels' codes once.
template <int R> static void few_rows(const Problem& p, int threads) {
  const int64_t chunk = std::max<int64_t>(1, p.units / (threads * CHUNKS));
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  auto claim = [&] { return next.fetch_add(chunk, std::memory_order_relaxed); };
#pragma omp parallel num_threads(threads) if (threads > 1)
  if (int64_t u = claim(); u >= p.units) {  // nothing is left
  } else if (char* own = shared_rows.get(Rows::bytes(R, p.blocks, p.groups)); !own) {
    failed = true;
  } else {
    Rows rows(own, R, p.blocks, p.groups);
    for (int r = 0; r < p.m; r++) take_row(p.x + r * p.ldx, p.k, r, R, rows);
    alignas(64) float c[TOGETHER][R * 16];
    const float* cs[TOGETHER];
    for (int i = 0; i < TOGETHER; i++) cs[i] = c[i];
    for (; u < p.units; u = claim())
      for (int64_t e = std::min(u + chunk, p.units); u < e; u++) {
        const Unit at = unit_of(p, u);
        for (int i = 0; i < TOGETHER; i++)
          multiply<Packed, R>(span_of(p, p.segment[at.segment + i], at.panel, rows, R, 0, p.blocks), c[i]);
        finish(p, at, rows, 0, p.m, cs);
      }
  }
  if (failed) throw NoMemory();
}

// M > 8: rows are quantized once, in blocks of MR (the last block may have fewer); a panel is unpacked to bytes chunk by
// chunk and each chunk serves all rows of a stripe while it is in the first-level cache.
// Blocks have 1, 2, 4 or 8 rows; what cannot occur is not compiled.
INL void multiply_few(int R, const Span& span, float* c) {
  if (R == 1) return multiply<Packed, 1>(span, c);
  if (R == 2) return multiply<Packed, 2>(span, c);
  if constexpr (MR > 8)
    if (R == 8) return multiply<Packed, 8>(span, c);
  if constexpr (MR > 4) return multiply<Packed, 4>(span, c);
}
// Rows that a block of `left` rows is multiplied as; the rows beyond `left` are computed and dropped.
INL int block_rows(int64_t left, int most) {
  for (int R = 1; R < most && R <= 8; R *= 2)
    if (left <= R) return R;
  return most;
}

// Rows begin .. begin + count.
static void many_rows(const Problem& p, int threads, int64_t begin, int64_t count) {
  const int64_t row_blocks = (count + MR - 1) / MR, stripes = (row_blocks + STRIPE - 1) / STRIPE;
  const int64_t stripe = (row_blocks + stripes - 1) / stripes;
  const int tail = block_rows(count - (row_blocks - 1) * MR, MR);
  const int64_t whole = GB ? GB : AB ? AB : 1, chunk = std::min(std::max<int64_t>(CHUNK_BLOCKS / whole, 1) * whole, p.blocks);
  const size_t row_bytes = Rows::bytes(MR, p.blocks, p.groups);
  char* packed = shared_rows.get(row_bytes * row_blocks);
  if (!packed) throw NoMemory();
  auto rows_of = [&](int64_t b) { return Rows(packed + b * row_bytes, b + 1 < row_blocks ? MR : tail, p.blocks, p.groups); };
  std::atomic<int64_t> next_row{0}, next{0};
  std::atomic<bool> failed{false};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    for (int64_t b; (b = next_row.fetch_add(1, std::memory_order_relaxed)) < row_blocks;) {
      const int R = b + 1 < row_blocks ? MR : tail;
      for (int64_t m = b * MR; m < std::min(count, (b + 1) * MR); m++)
        take_row(p.x + (begin + m) * p.ldx, p.k, (int)(m - b * MR), R, rows_of(b));
    }
#pragma omp barrier
    const size_t c_bytes = stripe * MR * 16 * sizeof(float);
    char* own = own_panels.get(c_bytes * TOGETHER + chunk * Plain::BYTES);
    uint8_t* bytes = (uint8_t*)own + c_bytes * TOGETHER;
    if (!own) failed = true;
    for (int64_t task; own && (task = next.fetch_add(1, std::memory_order_relaxed)) < stripes * p.units;) {
      const Unit at = unit_of(p, task % p.units);
      const int64_t first = task / p.units * stripe, last = std::min(first + stripe, row_blocks);
      for (int i = 0; i < TOGETHER; i++)
        for (int64_t from = 0; from < p.blocks; from += chunk) {
          const Segment& segment = p.segment[at.segment + i];
          const int64_t to = std::min(from + chunk, p.blocks);
          const uint8_t* codes = segment.codes + (at.panel * p.blocks + from) * Packed::BYTES;
          if (!UNPACKED) unpack(codes, to - from, bytes);
          for (int64_t b = first; b < last; b++) {
            const int R = b + 1 < row_blocks ? MR : tail;
            Span span = span_of(p, segment, at.panel, rows_of(b), R, from, to);
            float* c = (float*)(own + i * c_bytes) + (b - first) * MR * 16;
            if (R != MR) {
              multiply_few(R, span, c);
            } else {
              if (!UNPACKED) span.codes = bytes;
              multiply<Plain, MR>(span, c);
            }
          }
        }
      for (int64_t b = first; b < last; b++) {
        const float* cs[TOGETHER];
        for (int i = 0; i < TOGETHER; i++) cs[i] = (float*)(own + i * c_bytes) + (b - first) * MR * 16;
        finish(p, at, rows_of(b), begin + b * MR, (int)std::min<int64_t>(MR, count - b * MR), cs);
      }
    }
  }
  if (failed) throw NoMemory();
}

static void run(Problem& p) {
  if (p.m <= 0) return;
  p.blocks = (p.k + 31) / 32;
  p.groups = GB ? (p.blocks + GB - 1) / (GB ? GB : 1) : 1;
  int64_t column = 0, weights = 0;
  p.units = 0;
  for (Segment& s : p.segment) {
    s.panels = (s.n + 15) / 16;
    s.column = PAIRED ? 0 : column;
    column += s.n;
    weights += s.n * p.k;
    p.units = PAIRED ? s.panels : p.units + s.panels;
  }
  int threads = omp_in_parallel() || weights * std::min<int64_t>(p.m, 16) < SERIAL_BELOW ? 1 : omp_get_max_threads();
  if (p.m > FEW_ROWS) {
    // Quantized rows stay between calls in memory of the calling thread: bounded, however long the prompt is.
    const int64_t fit = std::max<int64_t>(1, MOST_BYTES / (int64_t)Rows::bytes(MR, p.blocks, p.groups)) * MR;
    for (int64_t begin = 0; begin < p.m; begin += fit) many_rows(p, threads, begin, std::min(fit, p.m - begin));
    return;
  }
  const int R = block_rows(p.m, FEW_ROWS);
  if (R == 1) return few_rows<1>(p, threads);
  if (R == 2) return few_rows<2>(p, threads);
  if constexpr (FEW_ROWS > 4)
    if (R > 4) return few_rows<FEW_ROWS>(p, threads);
  return few_rows<4>(p, threads);
}
