// Tensors of the stable ABI as launchers see them; the kernels themselves know no torch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
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
    owner_ = tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor);
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

// On the device of `like`. new_empty of the stable ABI would look an operator up by its name and box
// its arguments, which small calls notice.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) {
    strides[i] = stride;
  }
  int32_t device, index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                         sizes.data(), strides.data(), dtype,
                                                         device, index, &made));
  return Tensor(made);
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace syncmask
