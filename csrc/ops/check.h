// Argument checks of the ops: device, dtype, shape, layout, range, overlap.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "abi.h"  // before any header of torch

namespace river::ops {

// Of one op's arguments. The first tensor says where the op runs; all others must be there too. Values in a GPU's
// memory are not looked at: that would wait for it. Its kernels treat rows out of range as inactive.
class Check {
 public:
  Check(const char* op, const char* first_name, const Tensor& first) : op_(op), first_name_(first_name) {
    defined(first_name, first);
    if (first.is_cpu()) return;
    require(RIVER_WITH_CUDA, first_name, " is not on the CPU, and this build has no CUDA kernels");
    require(first.is_cuda(), first_name, " is on another device, expected cpu or cuda");
    gpu_ = first.get_device_index();
  }

  bool on_cuda() const { return gpu_ >= 0; }
  int gpu() const { return gpu_; }

  template <class... Parts>
  void require(bool ok, const Parts&... parts) const {
    if (ok) return;
    std::ostringstream out;
    out << "river::" << op_ << ": ";
    (out << ... << parts);
    throw std::runtime_error(out.str());
  }

  // Torch lets None pass for a tensor.
  void defined(const char* name, const Tensor& t) const { require(t.defined(), name, " is None, expected a tensor"); }

  void tensor(const char* name, const Tensor& t, ScalarType type, Sizes sizes) {
    defined(name, t);
    if (!is_here(t)) {
      const std::string here = on_cuda() ? "cuda:" + std::to_string(gpu_) : "cpu";
      require(false, name, " is on ", device_of(t), ", ", first_name_, " on ", here, ", expected one device");
    }
    content(name, t, type, sizes);
  }

  // Of a tensor whose device is the caller's business
  void content(const char* name, const Tensor& t, ScalarType type, Sizes sizes) {
    require(t.scalar_type() == type, name, " is ", name_of(t.scalar_type()), ", expected ", name_of(type));
    const auto have = t.sizes();
    bool same = have.size() == sizes.size();
    for (size_t i = 0; same && i < sizes.size(); i++) same = sizes.begin()[i] == kAny || have[i] == sizes.begin()[i];
    require(same, name, " has shape ", text(have), ", expected ", text(sizes));
    require(t.is_contiguous(), name, " is not contiguous");
    remember(name, t);
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

  // int32 [rows], places of rows in memory: on the CPU a copy that nobody else can change once it has been checked
  const int32_t* places(const char* name, const Tensor& t, int rows) {
    tensor(name, t, ScalarType::Int, {rows});
    if (on_cuda()) return static_cast<const int32_t*>(t.const_data_ptr());
    int32_t* copy = copies_ + num_copies_;
    num_copies_ += rows;
    std::memcpy(copy, t.const_data_ptr(), rows * sizeof(int32_t));
    return copy;
  }

  // A tensor that the CUDA kernels read or write 16 bytes at a time
  void vectors(const char* name, const Tensor& t, ScalarType type, Sizes sizes) {
    tensor(name, t, type, sizes);
    if (!on_cuda()) return;
    const auto remainder = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16;
    require(remainder == 0, name, " starts ", remainder, " bytes past a multiple of 16, expected its data aligned to ",
            "16 bytes on CUDA");
  }

  // Null where absent
  template <class T = void>
  const T* optional(const char* name, const OptionalTensor& t, ScalarType type, Sizes sizes) {
    if (!t) return nullptr;
    tensor(name, *t, type, sizes);
    return data<T>(*t);
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

  // The first dim of a [T, ...] tensor
  int rows(const char* name, const Tensor& t, int dims) const {
    require((int)t.dim() == dims, name, " has ", t.dim(), " dimensions, expected ", dims);
    const int64_t rows = t.size(0);
    require(rows >= 1 && rows <= kMaxRows, name, " has ", rows, " rows, expected 1 to ", kMaxRows);
    return (int)rows;
  }

  // Sizes that fit the int fields of the Args and every product of two of them an int64
  int size(const char* name, int64_t value) const {
    require(value >= 1 && value < (int64_t(1) << 30), name, " is ", value, ", expected 1 to 2^30 - 1");
    return (int)value;
  }

  // The same of rows that the CUDA kernels read 16 bytes at a time
  int vector_size(const char* name, int64_t value) const {
    require(!on_cuda() || value % 8 == 0, name, " is ", value, ", expected a multiple of 8 on CUDA");
    return size(name, value);
  }

  void in_place(const char* name, int row, int64_t value, int64_t first, int64_t last) const {
    require(value >= first && value <= last, name, "[", row, "] is ", value, ", expected ", first, " to ", last);
  }

 private:
  struct Span {
    const char* name;
    uintptr_t begin, end;
  };
  static constexpr int kMaxSpans = 48;  // the tensors of one op

  bool is_here(const Tensor& t) const { return on_cuda() ? t.is_cuda() && t.get_device_index() == gpu_ : t.is_cpu(); }

  // The memory of a contiguous tensor. A storage may be smaller than its tensors: resize_ does not ask them.
  void remember(const char* name, const Tensor& t) {
    const auto size = (int64_t)t.element_size();
    const int64_t bytes = t.numel() * size;
    int64_t stored;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &stored));
    require(t.storage_offset() * size + bytes <= stored || bytes == 0, name, " has a storage of ", stored,
            " bytes, expected at least ", t.storage_offset() * size + bytes);
    require(num_spans_ < kMaxSpans, "more than ", kMaxSpans, " tensors");
    const auto begin = bytes ? reinterpret_cast<uintptr_t>(t.const_data_ptr()) : 0;
    spans_[num_spans_++] = {name, begin, begin + bytes};
  }

  const char *op_, *first_name_;
  int gpu_ = -1;  // -1: the CPU
  Span spans_[kMaxSpans];
  int num_spans_ = 0;
  int32_t copies_[2 * kMaxRows];
  int num_copies_ = 0;
};

// What decode_attention and the blocks check alike: the caches, and every row's place in them.
struct Cache {
  int slots, kv_heads, max_len, head_dim;
  const int32_t *row_slots, *row_positions;  // [T]

  Cache(Check& check, ScalarType type, int rows, int heads, const Tensor& k, const Tensor& v, const Tensor& slots_,
        const Tensor& positions, const OptionalTensor& kv_valid) {
    check.vectors("k_cache", k, type, {kAny, kAny, kAny, kAny});
    slots = check.size("slots of k_cache", k.size(0));
    kv_heads = check.size("num_key_value_heads of k_cache", k.size(1));
    max_len = check.size("max_len of k_cache", k.size(2));
    head_dim = check.vector_size("head_dim of k_cache", k.size(3));
    check.vectors("v_cache", v, type, {slots, kv_heads, max_len, head_dim});
    check.require(head_dim % 2 == 0 && head_dim <= kMaxHeadDim, "head_dim is ", head_dim,
                  ", expected an even number up to ", kMaxHeadDim);
    check.require(heads >= 1 && heads % kv_heads == 0 && heads / kv_heads <= kMaxGroup, "num_attention_heads is ",
                  heads, ", expected a multiple of num_key_value_heads = ", kv_heads, ", at most ", kMaxGroup,
                  " times as many");
    check.size("num_attention_heads * head_dim", (int64_t)heads * head_dim);
    row_slots = check.places("slots", slots_, rows);
    row_positions = check.places("positions", positions, rows);
    check.optional("kv_valid", kv_valid, ScalarType::Bool, {slots, max_len});
    for (int row = 0; row < rows && !check.on_cuda(); row++) {
      check.in_place("slots", row, row_slots[row], -1, slots - 1);
      if (row_slots[row] >= 0) check.in_place("positions", row, row_positions[row], 0, max_len - 1);
    }
  }
};

inline int64_t window(const Check& check, std::optional<int64_t> sliding_window) {
  check.require(!sliding_window || *sliding_window >= 1, "sliding_window is ", sliding_window.value_or(0),
                ", expected at least 1");
  return std::min(sliding_window.value_or(0), int64_t(1) << 31);  // no position is larger
}

inline float scale_of(const Check& check, std::optional<double> softmax_scale, int head_dim) {
  const double scale = softmax_scale.value_or(1 / std::sqrt((double)head_dim));
  check.require(std::isfinite((float)scale), "softmax_scale is ", scale, ", expected a finite number");
  return (float)scale;
}

inline float eps_of(const Check& check, double eps) {
  check.require(std::isfinite((float)eps) && eps >= 0, "rms_norm_eps is ", eps, ", expected a finite number >= 0");
  return (float)eps;
}

}  // namespace river::ops
