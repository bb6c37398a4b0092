// The kernel as an operator of torch, through torch's stable C ABI. The functions are declared here by hand and looked up
// in the loaded library: no torch header is read, nothing is linked, and a release without one of them is an answer
// ("missing") instead of a library that cannot be loaded. All of them exist from torch 2.10 on.
// before: OPERATION, a name for errors, and ARGUMENTS, the schema without a name. after: boxed.
#include <cstdarg>
#include <cstdio>
#include <dlfcn.h>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

namespace {
using Handle = void*;
using Slot = uint64_t;  // one value on the dispatcher's stack: a handle, or an integer
using Boxed = void (*)(Slot* stack, uint64_t inputs, uint64_t outputs);
constexpr uint64_t WRITTEN_FOR = 2ull << 56 | 10ull << 48;  // the conventions below are those of 2.10

// Functions that return int32_t return 0 for success, apart from those whose name is a constant's (dtype_*, device_*).
#define TORCH_FUNCTIONS(F)                                                                     \
  F(aoti_torch_library_init_fragment, (const char* ns, const char* file, uint32_t line, Handle* library)) \
  F(aoti_torch_library_init_impl, (const char* ns, const char* key, const char* file, uint32_t line, Handle* library)) \
  F(aoti_torch_library_def, (Handle library, const char* schema))                              \
  F(torch_library_impl, (Handle library, const char* name, Boxed function, uint64_t version))  \
  F(torch_list_size, (Handle list, size_t* size))                                              \
  F(torch_list_get_item, (Handle list, size_t index, Slot* item))                              \
  F(torch_delete_list, (Handle list))                                                          \
  F(aoti_torch_get_dim, (Handle tensor, int64_t* dim))                                         \
  F(aoti_torch_get_sizes, (Handle tensor, int64_t** borrowed))                                 \
  F(aoti_torch_get_strides, (Handle tensor, int64_t** borrowed))                               \
  F(aoti_torch_get_dtype, (Handle tensor, int32_t* dtype))                                     \
  F(aoti_torch_get_device_type, (Handle tensor, int32_t* device))                              \
  F(aoti_torch_get_layout, (Handle tensor, int32_t* layout))                                   \
  F(aoti_torch_get_data_ptr, (Handle tensor, void** data))                                     \
  F(aoti_torch_empty_strided, (int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device, \
                               int32_t index, Handle* tensor))                                 \
  F(aoti_torch_delete_tensor_object, (Handle tensor))                                          \
  F(aoti_torch_device_type_cpu, ())                                                            \
  F(aoti_torch_layout_strided, ())                                                             \
  F(aoti_torch_dtype_float32, ())                                                              \
  F(aoti_torch_dtype_float16, ())                                                              \
  F(aoti_torch_dtype_bfloat16, ())                                                             \
  F(aoti_torch_dtype_uint8, ())                                                                \
  F(aoti_torch_dtype_int8, ())                                                                 \
  F(aoti_torch_dtype_int64, ())
#define DECLARE(name, arguments) int32_t(*name) arguments = nullptr;
struct Torch {
  TORCH_FUNCTIONS(DECLARE)
} torch_;

// Throwing is how a boxed function reports an error: it becomes a RuntimeError.
[[noreturn]] __attribute__((format(printf, 1, 2))) void refuse(const char* format, ...) {
  char text[600];
  const int head = snprintf(text, sizeof text, "%s: ", OPERATION);
  va_list list;
  va_start(list, format);
  vsnprintf(text + head, sizeof text - (size_t)head, format, list);
  va_end(list);
  throw std::runtime_error(text);
}
void must(int32_t code, const char* what) {
  if (code) refuse("torch failed to %s", what);
}

std::string text_of(const int64_t* at, int64_t count) {
  std::string text = "[";
  for (int64_t i = 0; i < count; i++) text += (i ? ", " : "") + std::to_string(at[i]);
  return text + "]";
}

struct Tensor {  // owns its handle
  Handle handle;
  int64_t dim = 0, *size = nullptr, *stride = nullptr;
  int32_t dtype = 0;
  void* data = nullptr;

  explicit Tensor(Handle owned) : handle(owned) {}
  Tensor(Tensor&& other) noexcept
      : handle(other.handle), dim(other.dim), size(other.size), stride(other.stride), dtype(other.dtype), data(other.data) {
    other.handle = nullptr;
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() {
    if (handle) torch_.aoti_torch_delete_tensor_object(handle);
  }

  std::string sizes() const { return text_of(size, dim); }

  void read(const char* what, int i, int32_t want) {
    int32_t device = 0, layout = 0;
    must(torch_.aoti_torch_get_device_type(handle, &device), "read a device");
    must(torch_.aoti_torch_get_layout(handle, &layout), "read a layout");
    if (device != torch_.aoti_torch_device_type_cpu() || layout != torch_.aoti_torch_layout_strided())
      refuse("%s %d is not a dense tensor on the CPU", what, i);
    must(torch_.aoti_torch_get_dim(handle, &dim), "read dimensions");
    must(torch_.aoti_torch_get_sizes(handle, &size), "read sizes");
    must(torch_.aoti_torch_get_strides(handle, &stride), "read strides");
    must(torch_.aoti_torch_get_dtype(handle, &dtype), "read a dtype");
    if (dtype != want) refuse("%s %d %s has the wrong dtype", what, i, sizes().c_str());
    must(torch_.aoti_torch_get_data_ptr(handle, &data), "read an address");
  }

  void shaped(const char* what, int i, const int64_t* want, int64_t count) const {
    if (dim != count || !std::equal(want, want + count, size))
      refuse("%s %d is %s, expected %s", what, i, sizes().c_str(), text_of(want, count).c_str());
  }

  // Sizes as given, and contiguous.
  void expect(const char* what, int i, std::initializer_list<int64_t> want) const {
    shaped(what, i, want.begin(), (int64_t)want.size());
    dense(what, i);
  }
  void dense(const char* what, int i) const {
    int64_t step = 1;
    for (int64_t d = dim; d-- > 0; step *= size[d])
      if (size[d] != 1 && stride[d] != step && count() != 0) refuse("%s %d %s is not contiguous", what, i, sizes().c_str());
  }

  int64_t count() const { return rows() * (dim ? size[dim - 1] : 1); }

  int64_t rows() const {
    int64_t count = 1;
    for (int64_t d = 0; d + 1 < dim; d++) count *= size[d];
    return count;
  }

  // Distance of rows, for a tensor of dense rows at one common distance.
  int64_t row_stride(const char* what, int i) const {
    if (rows() == 0 || size[dim - 1] == 0) return size[dim - 1];
    if (size[dim - 1] != 1 && stride[dim - 1] != 1) refuse("%s %d %s has rows with gaps", what, i, sizes().c_str());
    int64_t step = size[dim - 1], expected = 0;
    bool known = false;
    for (int64_t d = dim - 1; d-- > 0;) {
      if (size[d] == 1) continue;
      if (!known) step = stride[d], known = true;
      else if (stride[d] != expected) refuse("%s %d %s has rows at several distances", what, i, sizes().c_str());
      expected = stride[d] * size[d];
    }
    return step;
  }
};

struct List {  // owns its handle, not what it holds
  Handle handle;
  explicit List(Slot owned) : handle((Handle)owned) {}
  List(const List&) = delete;
  ~List() { torch_.torch_delete_list(handle); }
  std::vector<Slot> items() const {
    size_t size = 0;
    must(torch_.torch_list_size(handle, &size), "read a list");
    std::vector<Slot> all(size);
    for (size_t i = 0; i < size; i++) must(torch_.torch_list_get_item(handle, i, &all[i]), "read a list");
    return all;
  }
};
std::vector<Tensor> tensors(const List& list) {
  std::vector<Tensor> all;
  const std::vector<Slot> items = list.items();
  all.reserve(items.size());
  for (Slot item : items) all.emplace_back((Handle)item);
  return all;
}

using Dtype = int32_t (*Torch::*)();

void boxed(Slot* stack, uint64_t inputs, uint64_t outputs);
}  // namespace

// Registers the operator `ns::name`. "" on success, otherwise what is wrong. Never undone: libraries are never unloaded.
extern "C" const char* qcompile_register(const char* ns, const char* name) {
  void* loaded = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);  // the one in this process, wherever it lies
  if (!loaded) return "libtorch_cpu.so is not loaded";
#define FIND(function, arguments)                                     \
  *(void**)&torch_.function = dlsym(loaded, #function);               \
  if (!torch_.function) return "torch has no function " #function;
  TORCH_FUNCTIONS(FIND)
  static std::string schema;
  schema = std::string(name) + ARGUMENTS;
  Handle library = nullptr, cpu = nullptr;  // freeing them would take the operator away
  if (torch_.aoti_torch_library_init_fragment(ns, __FILE__, __LINE__, &library)) return "no library";
  if (torch_.aoti_torch_library_def(library, schema.c_str())) return "the schema was refused";
  if (torch_.aoti_torch_library_init_impl(ns, "CPU", __FILE__, __LINE__, &cpu)) return "no library for the CPU";
  if (torch_.torch_library_impl(cpu, name, boxed, WRITTEN_FOR)) return "the function was refused";
  return "";
}
