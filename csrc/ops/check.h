// Argument checks of the ops: device, dtype, shape, layout, range, overlap.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/graph.h"
#include "../river.h"
#include "abi.h"  // before any header of torch

namespace river::ops {

inline int64_t strips_of(int64_t output_rows) { return ceil_div(output_rows, kTileRows); }
inline int64_t column_tiles_of(int64_t columns) { return ceil_div(columns, kTileCols); }

// Refuses what an op does not accept. It says so by itself where the values are looked at that tensors on a CPU hold:
// each launch does that anew, a captured one whenever it runs. Values in a GPU's memory are not looked at: that would
// wait for it. Its kernels treat rows out of range as inactive.
class Requirements {
 public:
  explicit Requirements(const char* op) : op_(op) {}

  template <class... Parts>
  void require(bool ok, const Parts&... parts) const {
    if (ok) return;
    std::ostringstream out;
    out << "river::" << op_ << ": ";
    (out << ... << parts);
    throw std::runtime_error(out.str());
  }

  void in_range(const char* name, int64_t index, int64_t value, int64_t first, int64_t last) const {
    require(value >= first && value <= last, name, "[", index, "] is ", value, ", expected ", first, " to ", last);
  }

  const char* op() const { return op_; }

  // A copy, for as long as this lives: nobody else can change it once it has been checked.
  const int32_t* own(const int32_t* values, int count) { return copies_.emplace_back(values, values + count).data(); }

 private:
  const char* op_;
  std::vector<std::vector<int32_t>> copies_;
};

// Checks the arguments of one op. The first tensor says where the op runs; all others must be there too.
class Check : public Requirements {
 public:
  Check(const char* op, const char* first_name, const Tensor& first)
      : Requirements(op), first_name_(first_name), first_(first) {
    defined(first_name, first);
    if (first.is_cpu()) return;
    require(RIVER_WITH_CUDA, first_name, " is not on the CPU, and this build has no CUDA kernels");
    require(first.is_cuda(), first_name, " is on another device, expected cpu or cuda");
    gpu_ = first.get_device_index();
  }

  bool on_cuda() const { return gpu_ >= 0; }
  int gpu() const { return gpu_; }

  // Torch lets None pass for a tensor.
  void defined(const char* name, const Tensor& t) const { require(t.defined(), name, " is None, expected a tensor"); }

  const void* tensor(const char* name, const Tensor& t, ScalarType type, Sizes sizes) {
    defined(name, t);
    if (!is_here(t)) {
      const std::string here = on_cuda() ? "cuda:" + std::to_string(gpu_) : "cpu";
      require(false, name, " is on ", device_of(t), ", ", first_name_, " on ", here, ", expected one device");
    }
    return content(name, t, type, sizes);
  }

  template <class T>
  const T* tensor(const char* name, const Tensor& t, Sizes sizes) {
    return static_cast<const T*>(tensor(name, t, kScalarType<T>, sizes));
  }

  // Null where the tensor is absent.
  const void* optional(const char* name, const OptionalTensor& t, ScalarType type, Sizes sizes) {
    return t ? tensor(name, *t, type, sizes) : nullptr;
  }

  template <class T>
  const T* optional(const char* name, const OptionalTensor& t, Sizes sizes) {
    return t ? tensor<T>(name, *t, sizes) : nullptr;
  }

  // A tensor that the CUDA kernels read or write 16 bytes at a time.
  const void* vectors(const char* name, const Tensor& t, ScalarType type, Sizes sizes) {
    const void* first = tensor(name, t, type, sizes);
    const auto remainder = on_cuda() ? reinterpret_cast<uintptr_t>(first) % 16 : 0;
    require(remainder == 0, name, " starts ", remainder, " bytes past a multiple of 16, expected its data aligned to ",
            "16 bytes on CUDA");
    return first;
  }

  // A packed weight.
  const uint8_t* tiles(const char* name, const Tensor& t, int64_t strips, int64_t columns) {
    return static_cast<const uint8_t*>(
        vectors(name, t, ScalarType::Byte, {strips, column_tiles_of(columns), kTileBytes}));
  }

  // A tensor whose device is the caller's business.
  const void* content(const char* name, const Tensor& t, ScalarType type, Sizes sizes) {
    require(t.scalar_type() == type, name, " is ", name_of(t.scalar_type()), ", expected ", name_of(type));
    const auto have = t.sizes();
    bool same = have.size() == sizes.size();
    for (size_t i = 0; same && i < sizes.size(); i++) same = sizes.begin()[i] == kAny || have[i] == sizes.begin()[i];
    require(same, name, " has shape ", Shape{have}, ", expected ", Shape{sizes});
    require(t.is_contiguous(), name, " is not contiguous");
    return remember(name, t);
  }

  // The last check: memory that the op writes belongs to one of its tensors alone. Else it would change what was
  // checked before it is used, or what the op has yet to read. An op that reads `read_first` before it writes anything
  // takes one tensor for that and for the first of the names.
  void written(std::initializer_list<const char*> names, const char* read_first = "") const {
    for (const char* name : names) {
      const Span* mine = spans_;
      while (std::strcmp(mine->name, name)) mine++;
      for (const Span* other = spans_; other != spans_ + num_spans_; other++) {
        const bool apart = other->end <= mine->begin || mine->end <= other->begin;
        const bool same =
            other->begin == mine->begin && other->end == mine->end && !std::strcmp(other->name, read_first);
        require(other == mine || apart || (same && name == *names.begin()), name, " and ", other->name,
                " overlap in memory, expected ", name, ", which is written, to have its own");
      }
    }
  }

  DType dense_dtype(const char* name, ScalarType type) const {
    if (type == ScalarType::Float) return DType::kFloat32;
    if (type == ScalarType::BFloat16) return DType::kBFloat16;
    require(type == ScalarType::Half, name, " is ", name_of(type), ", expected bfloat16, float16 or float32");
    return DType::kFloat16;
  }

  DType model_dtype(const char* name, ScalarType type) const {
    require(!on_cuda() || type == ScalarType::BFloat16 || type == ScalarType::Half, name, " is ", name_of(type),
            " on CUDA; accepted there: bfloat16 or float16");
    return dense_dtype(name, type);
  }

  // The first dimension of a [T, ...] tensor.
  int rows(const char* name, const Tensor& t, int dims) const {
    require(t.dim() == dims, name, " has ", t.dim(), " dimensions, expected ", dims);
    const int64_t rows = t.size(0);
    require(rows >= 1 && rows <= kMaxRows, name, " has ", rows, " rows, expected 1 to ", kMaxRows);
    return int(rows);
  }

  // The same for an op that takes all rows of a prompt on the CPU.
  int many_rows(const char* name, const Tensor& t, int dims) const {
    require(t.dim() == dims, name, " has ", t.dim(), " dimensions, expected ", dims);
    const int64_t rows = t.size(0), most = on_cuda() ? kMaxRows : (1 << 30) - 1;
    require(rows >= 1 && rows <= most, name, " has ", rows, " rows, expected 1 to ", kMaxRows,
            " on CUDA, 1 to 2^30 - 1 on the CPU");
    return int(rows);
  }

  // Sizes fit the int fields of the Args, and every product of two of them an int64.
  int size(const char* name, int64_t value) const {
    require(value >= 1 && value < (int64_t(1) << 30), name, " is ", value, ", expected 1 to 2^30 - 1");
    return int(value);
  }

  // The same of what the CUDA kernels read 16 bytes at a time.
  int vector_size(const char* name, int64_t value) const {
    require(!on_cuda() || value % 8 == 0, name, " is ", value, ", expected a multiple of 8 on CUDA");
    return size(name, value);
  }

  // The second dimension of a [T, hidden] tensor.
  int hidden_size(const Tensor& t, int factor) const {
    const int value = size("hidden_size", t.size(1));
    require(value % factor == 0, "hidden_size is ", value, ", expected a multiple of ", factor);
    return value;
  }

  // The number of layers in the state of a step: exited and similarities, [layers, T].
  int layers(const Tensor& exited, const Tensor& similarities, int rows) {
    tensor<int32_t>("exited", exited, {kAny, rows});
    const int layers = size("layers of exited", exited.size(0));
    tensor<float>("similarities", similarities, {layers, rows});
    return layers;
  }

  float rms_norm_eps(double eps) const {
    require(std::isfinite(float(eps)) && eps >= 0, "rms_norm_eps is ", eps, ", expected a finite number >= 0");
    return float(eps);
  }

  // A contiguous tensor on the device of the first one
  Tensor output(Sizes sizes, ScalarType type) {
    const Tensor out = empty(sizes, type, first_);
    hold(out);
    return out;
  }

  // What a captured launch reads and writes
  const std::vector<Tensor>& held() const { return held_; }

 private:
  struct Span {
    const char* name;
    uintptr_t begin, end;
  };
  static constexpr int kMaxSpans = 48;  // the tensors of one op

  bool is_here(const Tensor& t) const { return on_cuda() ? t.is_cuda() && t.get_device_index() == gpu_ : t.is_cpu(); }

  // Notes the memory of a contiguous tensor. A storage may be smaller than its tensors: resize_ does not ask them.
  const void* remember(const char* name, const Tensor& t) {
    const auto size = int64_t(t.element_size());
    const int64_t bytes = t.numel() * size;
    int64_t stored;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &stored));
    require(t.storage_offset() * size + bytes <= stored || bytes == 0, name, " has a storage of ", stored,
            " bytes, expected at least ", t.storage_offset() * size + bytes);
    require(num_spans_ < kMaxSpans, "more than ", kMaxSpans, " tensors");
    const void* first = t.const_data_ptr();
    const auto begin = bytes ? reinterpret_cast<uintptr_t>(first) : 0;
    spans_[num_spans_++] = {.name = name, .begin = begin, .end = begin + bytes};
    hold(t);
    return first;
  }

  void hold(const Tensor& t) {
    if (cpu::Graph::recording()) held_.push_back(t);
  }

  const char* first_name_;
  const Tensor& first_;
  int gpu_ = -1;  // -1: the CPU
  Span spans_[kMaxSpans];
  int num_spans_ = 0;
  std::vector<Tensor> held_;
};

}  // namespace river::ops
