// The operands of a matrix multiplication as an operator of torch.
namespace {
struct ExtraKind {
  Dtype dtype;
  bool mat;
};
constexpr int64_t LONGEST = int64_t(1) << 40;  // sizes beyond would overflow their products

// The operands of one call: taken over from the stack (a boxed function owns its arguments), then checked.
struct Call {
  Tensor x;
  std::vector<Tensor> parts, extras;
  std::vector<Slot> n;
  int64_t k, m = 0, columns = 0, ldx = 0;
  std::vector<int64_t> distance;  // of rows, of each "mat" extra

  explicit Call(Slot* stack, const List& part_list, const List& extra_list, const List& n_list)
      : x((Handle)stack[0]), parts(tensors(part_list)), extras(tensors(extra_list)), n(n_list.items()), k((int64_t)stack[4]) {}

  void check(Dtype x_dtype, std::initializer_list<Dtype> part_dtypes, std::initializer_list<ExtraKind> kinds, int64_t longest) {
    if (n.size() != SEGMENTS || parts.size() != SEGMENTS * part_dtypes.size() || extras.size() != kinds.size())
      refuse("%zu segments, %zu parts, %zu extras; expected %d, %zu, %zu", n.size(), parts.size(), extras.size(), SEGMENTS,
             SEGMENTS * part_dtypes.size(), kinds.size());
    if (k < 1 || k > longest) refuse("k=%lld is out of range", (long long)k);
    x.read("x", 0, (torch_.*x_dtype)());
    if (x.dim < 1 || x.size[x.dim - 1] != k) refuse("x is %s, k=%lld", x.sizes().c_str(), (long long)k);
    m = x.rows(), ldx = x.row_stride("x", 0);
    const int64_t blocks = (k + 31) / 32, groups = SCALES_PER_GROUP ? (blocks + GB - 1) / (GB ? GB : 1) : 1;
    for (int s = 0, at = 0; s < SEGMENTS; s++) {
      const int64_t size = (int64_t)n[s];
      if (size < 1 || size > LONGEST || (PAIRED && size != (int64_t)n[0])) refuse("segment %d of size %lld", s, (long long)size);
      columns = PAIRED ? size : columns + size;
      for (const Dtype* dtype = part_dtypes.begin(); dtype != part_dtypes.end(); dtype++, at++) {
        parts[at].read("part", at, (torch_.**dtype)());
        if (dtype == part_dtypes.begin()) parts[at].expect("part", at, {(size + 15) / 16, blocks, BITS * 64});
        else parts[at].expect("part", at, {(size + 15) / 16, groups, 16});
      }
    }
    int i = 0;
    for (const ExtraKind& kind : kinds) {
      Tensor& extra = extras[i];
      extra.read("extra", i, (torch_.*kind.dtype)());
      if (kind.mat) {
        extra.shaped("extra", i, result_size().data(), x.dim);
        distance.push_back(extra.row_stride("extra", i));
      } else {
        extra.expect("extra", i, {columns});
      }
      i++;
    }
  }

  std::vector<int64_t> result_size() const {
    std::vector<int64_t> size(x.size, x.size + x.dim);
    size.back() = columns;
    return size;
  }

  Tensor result(Dtype dtype) const {
    std::vector<int64_t> size = result_size(), stride(x.dim);
    int64_t step = 1;
    for (int64_t d = x.dim; d-- > 0; step *= std::max<int64_t>(size[d], 1)) stride[d] = step;
    Handle handle = nullptr;
    must(torch_.aoti_torch_empty_strided(x.dim, size.data(), stride.data(), (torch_.*dtype)(), torch_.aoti_torch_device_type_cpu(),
                                         0, &handle),
         "allocate the result");
    Tensor y(handle);
    must(torch_.aoti_torch_get_data_ptr(handle, &y.data), "read an address");
    return y;
  }
};
}  // namespace
