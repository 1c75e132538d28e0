// What masked_linear_cross_entropy does beside its matrix products, on float32 CPU tensors: threads
// take columns of the sums, and words of the slopes, whose parts of the loss are added up in order.
#include "syncmask/losses.h"

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace syncmask::cpu {

constexpr int64_t kChunkWords = 16;

SYNCMASK_CLONES void add_to_sums(float* logits, int64_t stride, const float* bias, int64_t words,
                                 int64_t columns, float* top, float* total) {
  add_words(logits, stride, bias, words, columns, top, total);
}

SYNCMASK_CLONES double slopes_and_loss(const Logits& logits, const LogSums& sums,
                                       const SoftLabels& soft, const Shares& shares, int64_t words,
                                       int64_t columns, float* slope) {
  return slope_words(logits, sums, soft, shares, words, columns, slope);
}

}  // namespace syncmask::cpu

namespace {

using namespace syncmask;
using namespace syncmask::cpu;

void add_block(Tensor logits, MaybeTensor bias, Tensor top, Tensor total) {
  const int64_t words = logits.size(0), columns = logits.size(1), stride = logits.stride(0);
  STD_TORCH_CHECK(logits.stride(1) == 1 && top.is_contiguous() && total.is_contiguous(),
                  "columns must lie side by side");
  const Rows<float> biases(bias);
  const int64_t tiles = (columns + kTileColumns - 1) / kTileColumns;
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kTileColumns; i < std::min(end * kTileColumns, columns);
         i += kTileColumns) {
      add_to_sums(data<float>(logits) + i, stride, biases.data(), words,
                  std::min(kTileColumns, columns - i), data<float>(top) + i, data<float>(total) + i);
    }
  });
}

Tensor with_columns_side_by_side(const Tensor& tensor) {
  return tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

Logits from_word(const Logits& logits, int64_t word) {
  return {logits.first ? logits.first + word * logits.stride : nullptr, logits.stride};
}

std::tuple<Tensor, Tensor> slopes(Tensor logits, Tensor top, Tensor log_total, Tensor labels,
                                  Tensor mass, double hard, double even, double alpha,
                                  MaybeTensor soft, MaybeTensor soft_top,
                                  MaybeTensor soft_log_total) {
  const auto view = [](const Tensor& tensor) {
    return Logits{static_cast<const float*>(tensor.const_data_ptr()), tensor.stride(0)};
  };
  const int64_t words = logits.size(0), columns = logits.size(1);
  logits = with_columns_side_by_side(logits);
  if (soft) soft = with_columns_side_by_side(*soft);
  const Rows<float> tops(top), log_totals(log_total), masses(mass), soft_tops(soft_top),
      soft_log_totals(soft_log_total);
  const Rows<int64_t> label(labels);
  const LogSums sums{tops.data(), log_totals.data()};
  const Shares shares{masses.data(), static_cast<float>(even), static_cast<float>(alpha)};
  const Logits values = view(logits), soft_values = soft ? view(*soft) : Logits{};
  Tensor slope = empty(logits, {words, columns}, ScalarType::Float);
  Tensor loss = empty(logits, {}, ScalarType::Float);
  std::vector<double> losses((words + kChunkWords - 1) / kChunkWords);
  torch::stable::parallel_for(0, losses.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t word = i * kChunkWords;
      const SoftLabels chosen{from_word(soft_values, word),
                              {soft_tops.data(), soft_log_totals.data()}};
      losses[i] = slopes_and_loss(from_word(values, word), sums, chosen, shares,
                                  std::min(kChunkWords, words - word), columns,
                                  data<float>(slope) + word * columns);
    }
  });
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t word = label.data()[i];
    if (word >= 0 && word < words) data<float>(slope)[word * columns + i] -= static_cast<float>(hard);
  }
  *data<float>(loss) = static_cast<float>(std::accumulate(losses.begin(), losses.end(), 0.0));
  return {slope, loss};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(syncmask, CPU, library) {
  library.impl("linear_cross_entropy_add_block.cpu", TORCH_BOX(&add_block));
  library.impl("linear_cross_entropy_slopes.cpu", TORCH_BOX(&slopes));
}
