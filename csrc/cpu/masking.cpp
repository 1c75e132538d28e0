// mask_patches, gather_masked and scatter_masked for CPU tensors, and the sum of masked rows that a
// gradient needs. A thread takes a range of rows; a row that nothing asks for is not read.
#include "syncmask/masking.h"

#include <algorithm>
#include <vector>

#include "tensors.h"

namespace syncmask::cpu {

constexpr int64_t kSummedRows = 128;  // at most in float32; beyond, their sums are added in double

template <typename T>
Examples<T> examples(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()),
          x.stride(0), x.stride(1), x.stride(2), x.size(1), x.size(2)};
}

// Calls `run` with a null pointer of an unsigned type as large as the tensor's elements.
template <typename Run>
void by_size(const Tensor& tensor, const Run& run) {
  switch (tensor.element_size()) {
    case 1:
      return run(static_cast<uint8_t*>(nullptr));
    case 2:
      return run(static_cast<uint16_t*>(nullptr));
    case 4:
      return run(static_cast<uint32_t*>(nullptr));
    case 8:
      return run(static_cast<uint64_t*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "expected elements of at most 8 bytes");
  }
}

// Calls `write(i, row)` for each row of out [B, N, D], in several threads.
template <typename T, typename Write>
void each_row(const Tensor& out, const Write& write) {
  const int64_t columns = out.size(2), bytes = columns * static_cast<int64_t>(sizeof(T));
  T* first = data<T>(out);
  torch::stable::parallel_for(
      0, out.size(0) * out.size(1), 1 + 65536 / (1 + bytes), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) write(i, first + i * columns);
      });
}

#define SYNCMASK_ADD(T)                                                                    \
  SYNCMASK_CLONES void add(const T* from, int64_t stride, int64_t columns, float* sums) { \
    add_row(from, stride, columns, sums);                                                  \
  }
SYNCMASK_ADD(float)
SYNCMASK_ADD(Half)
SYNCMASK_ADD(BFloat16)
#undef SYNCMASK_ADD

// sums [ceil(B * P / kSummedRows), D] of the masked rows of x.
template <typename T>
void sum_chunks(const Examples<T>& x, const bool* masked, int64_t rows, std::vector<float>& sums) {
  const int64_t chunks = (rows + kSummedRows - 1) / kSummedRows;
  sums.assign(chunks * x.columns, 0.0f);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kSummedRows; i < std::min(end * kSummedRows, rows); ++i) {
      if (masked[i]) {
        add(x.row(i), x.column, x.columns, sums.data() + i / kSummedRows * x.columns);
      }
    }
  });
}

template <typename T>
void scatter(const Examples<T>& x, const RowsByPosition& by_position, const Tensor& out) {
  each_row<T>(out, [&](int64_t i, T* row) {
    const int64_t first = by_position.first(i);
    if (first < 0) {
      std::memset(row, 0, x.columns * sizeof(T));
    } else if (by_position.next(first) < 0) {
      copy_row(x.row(first), x.column, x.columns, row);
    } else {
      std::vector<float> sums(x.columns);
      for (int64_t k = first; k >= 0; k = by_position.next(k)) {
        add(x.row(k), x.column, x.columns, sums.data());
      }
      for (int64_t d = 0; d < x.columns; ++d) narrow(sums[d], row + d);
    }
  });
}

}  // namespace syncmask::cpu

namespace {

using namespace syncmask;
using namespace syncmask::cpu;

Tensor mask_patches(Tensor patches, Tensor patch_mask, MaybeTensor mask_token) {
  const int64_t columns = patches.size(2);
  Tensor out = empty_output(patches, {patches.size(0), patches.size(1), columns}, patches.scalar_type());
  const Rows<bool> masked(patch_mask);
  if (mask_token) mask_token = torch::stable::to(*mask_token, patches.scalar_type());
  by_size(patches, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Examples<T> x = examples<T>(patches);
    const Rows<T> token(mask_token);
    each_row<T>(out, [&](int64_t i, T* row) {
      if (!masked.data()[i]) {
        copy_row(x.row(i), x.column, columns, row);
      } else if (token.data()) {
        copy_row(token.data(), 1, columns, row);
      } else {
        std::memset(row, 0, columns * sizeof(T));
      }
    });
  });
  return out;
}

Tensor masked_sum(Tensor x, Tensor mask) {
  const int64_t columns = x.size(2);
  Tensor out = empty(x, {columns}, ScalarType::Float);
  const Rows<bool> masked(mask);
  std::vector<float> sums;
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    sum_chunks(examples<T>(x), masked.data(), x.size(0) * x.size(1), sums);
  });
  std::vector<double> total(columns);
  for (size_t i = 0; i < sums.size(); i += columns) {
    for (int64_t d = 0; d < columns; ++d) total[d] += sums[i + d];
  }
  std::copy(total.begin(), total.end(), data<float>(out));
  return out;
}

Tensor gather_masked(Tensor x, Tensor ids, double fill) {
  const int64_t columns = x.size(2), positions = x.size(1), width = ids.size(1);
  Tensor out = empty_output(x, {ids.size(0), width, columns}, x.scalar_type());
  Tensor filled = empty(x, {columns}, x.scalar_type());
  torch::stable::fill_(filled, fill);
  const Rows<int64_t> id(ids);
  by_size(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Examples<T> from = examples<T>(x);
    const Rows<T> padding(filled);
    const auto source = [&](int64_t i) {
      const int64_t n = id.data()[i];
      return n >= 0 && n < positions ? from.row(i / width, n) : nullptr;
    };
    each_row<T>(out, [&](int64_t i, T* row) {
      if (i + 1 < ids.size(0) * width) prefetch_row(source(i + 1), columns);
      if (const T* picked = source(i)) {
        copy_row(picked, from.column, columns, row);
      } else {
        copy_row(padding.data(), 1, columns, row);
      }
    });
  });
  return out;
}

Tensor scatter_masked(Tensor x, Tensor ids, int64_t positions) {
  Tensor out = empty_output(x, {x.size(0), positions, x.size(2)}, x.scalar_type());
  const Rows<int64_t> id(ids);
  const RowsByPosition by_position(id.data(), x.size(0), x.size(1), positions);
  by_type(x, [&](auto* type) {
    scatter(examples<std::remove_pointer_t<decltype(type)>>(x), by_position, out);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(syncmask, CPU, library) {
  library.impl("mask_patches.cpu", TORCH_BOX(&mask_patches));
  library.impl("masked_sum.cpu", TORCH_BOX(&masked_sum));
  library.impl("gather_masked.cpu", TORCH_BOX(&gather_masked));
  library.impl("scatter_masked.cpu", TORCH_BOX(&scatter_masked));
}
