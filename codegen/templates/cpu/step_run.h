// One call of a step: checks all operands, then hands pieces of all parameters to threads.
// before: PART, STATES, SIZED, NUMBERS, STOCHASTIC, TILE, compute.
namespace {
struct Parameter {
  char* at[PARTS];
  const float* numbers;
  Random random;
  int64_t n, first;  // elements; number of its first piece among all pieces
};
constexpr int64_t PIECE = 1 << 14;  // elements that a thread takes at once: microseconds, and a multiple of TILE
constexpr int64_t SERIAL_BELOW = 1 << 15;
static_assert(PIECE % TILE == 0);

// The last elements of a parameter, in memory of a whole tile.
static __attribute__((noinline)) void compute_some(char* const* at, const float* numbers, int n, const Random& random) {
  alignas(64) char copy[PARTS][TILE * 4];
  char* there[PARTS];
  for (int k = 0; k < PARTS; k++) {
    memset(copy[k], 0, sizeof copy[k]);
    if (PART[k].read) memcpy(copy[k], at[k], PART[k].bytes(n));
    there[k] = copy[k];
  }
  compute(there, numbers, n, random);
  for (int k = 0; k < PARTS; k++)
    if (PART[k].written) memcpy(at[k], copy[k], PART[k].bytes(n));
}

static void piece(const Parameter& p, int64_t begin) {
  const int64_t end = std::min(begin + PIECE, p.n);
  Random random = p.random;
  random.offset += (uint64_t)begin;
  char* at[PARTS];
  for (int k = 0; k < PARTS; k++) at[k] = p.at[k] + PART[k].bytes(begin);
  for (int64_t i = begin; i < end; i += TILE) {
    if (end - i >= TILE) compute(at, p.numbers, TILE, random);
    else compute_some(at, p.numbers, (int)(end - i), random);
    for (int k = 0; k < PARTS; k++) at[k] += PART[k].bytes(TILE);
    random.offset += TILE;
  }
}

static void run(const std::vector<Parameter>& all, int64_t pieces, int64_t elements) {
  const int threads = elements < SERIAL_BELOW ? 1 : (int)std::min<int64_t>(omp_get_max_threads(), pieces);
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Arithmetic arithmetic;
    size_t i = 0;
    for (int64_t c; (c = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
      while (i + 1 < all.size() && all[i + 1].first <= c) i++;
      piece(all[i], (c - all[i].first) * PIECE);
    }
  }
}

void boxed(Slot* stack, uint64_t, uint64_t) {
  List state_list(stack[0]), input_list(stack[1]);
  Tensor hyper((Handle)stack[2]), random((Handle)stack[3]);
  std::vector<Tensor> state = tensors(state_list), inputs = tensors(input_list);
  const int64_t count = (int64_t)state.size() / STATES;
  if ((int64_t)state.size() != count * STATES || (int64_t)inputs.size() != count * (PARTS - STATES))
    refuse("%zu and %zu tensors, not %d and %d for each parameter", state.size(), inputs.size(), STATES, PARTS - STATES);
  hyper.read("hyper", 0, torch_.aoti_torch_dtype_float32());
  if (hyper.dim == 2) hyper.expect("hyper", 0, {count, NUMBERS});
  else hyper.expect("hyper", 0, {NUMBERS});
  if (STOCHASTIC) {
    random.read("random", 0, torch_.aoti_torch_dtype_int64());
    random.expect("random", 0, {count, 4});
  }
  std::vector<Parameter> all((size_t)count);
  int64_t pieces = 0, elements = 0;
  for (int64_t i = 0; i < count; i++) {
    Parameter& p = all[(size_t)i];
    auto part = [&](int k) -> Tensor& {
      return k < STATES ? state[(size_t)(i * STATES + k)] : inputs[(size_t)(i * (PARTS - STATES) + k - STATES)];
    };
    for (int k = 0; k < PARTS; k++) {
      part(k).read("part", k, (torch_.*PART[k].dtype)());
      part(k).dense("part", k);
      p.at[k] = (char*)part(k).data;
    }
    p.n = part(SIZED).count();
    for (int k = 0; k < PARTS; k++)
      if (part(k).count() != PART[k].count(p.n)) refuse("part %d has %lld elements", k, (long long)part(k).count());
    p.numbers = (const float*)hyper.data + (hyper.dim == 2 ? i * NUMBERS : 0);
    const int64_t* r = STOCHASTIC ? (const int64_t*)random.data + 4 * i : nullptr;
    if (r) p.random = {{(uint64_t)r[0], (uint32_t)r[1], (uint32_t)r[2]}, (uint64_t)r[3]};
    p.first = pieces, pieces += (p.n + PIECE - 1) / PIECE, elements += p.n;
  }
  run(all, pieces, elements);
}
}  // namespace
