// Tensors of the stable ABI as launchers see them; the kernels themselves know no torch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

namespace syncmask {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// A contiguous view or copy that lives as long as the pointers into it.
template <typename T>
class Rows {
 public:
  explicit Rows(const MaybeTensor& tensor, int64_t columns = 0) : columns_(columns) {
    if (!tensor) return;
    owner_ = torch::stable::contiguous(*tensor);
    data_ = static_cast<const T*>(owner_->const_data_ptr());
  }
  const T* data() const { return data_; }
  const T* row(int64_t index) const { return data_ ? data_ + index * columns_ : nullptr; }

 private:
  MaybeTensor owner_;
  const T* data_ = nullptr;
  int64_t columns_;
};

inline MaybeTensor as_float(const MaybeTensor& tensor) {
  if (!tensor || tensor->scalar_type() == ScalarType::Float) return tensor;
  return torch::stable::to(*tensor, ScalarType::Float);
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace syncmask
