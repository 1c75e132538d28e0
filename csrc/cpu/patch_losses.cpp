// masked_patch_loss and its gradient for CPU tensors: a thread takes a range of patches.
#include "syncmask/patch_losses.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "tensors.h"

// One patch at a time, compiled for each instruction set.
namespace syncmask::cpu {

#define SYNCMASK_PATCHES(T)                                                                   \
  SYNCMASK_CLONES void read_patch(const Patch<T>& patch, float* values) { read(patch, values); } \
  SYNCMASK_CLONES void write_gradient(PatchLoss kind, const float* pred, const float* want,   \
                                      int64_t count, float slope, T* grad) {                  \
    patch_gradient(kind, pred, want, count, slope, grad);                                     \
  }
SYNCMASK_PATCHES(float)
SYNCMASK_PATCHES(Half)
SYNCMASK_PATCHES(BFloat16)
#undef SYNCMASK_PATCHES

SYNCMASK_CLONES void normalise_patch(float* values, int64_t count) { normalise(values, count); }

SYNCMASK_CLONES float loss_of(PatchLoss kind, const float* pred, const float* want,
                              int64_t count) {
  return patch_loss(kind, pred, want, count);
}

}  // namespace syncmask::cpu

namespace {

using namespace syncmask;
using namespace syncmask::cpu;

enum Reduction { kMean, kSum, kNone };  // as REDUCTIONS of loss_request.py

constexpr int64_t kGrain = 16;  // patches that are worth a thread

// The patches of a tensor [B, P, C], or of an image [B, channels, Hi, Wi].
class Patches {
 public:
  Patches(const Tensor& tensor, std::optional<int64_t> side)
      : tensor_(tensor), batch_(tensor.stride(0)) {
    if (side) {
      channels_ = tensor.size(1), channel_ = tensor.stride(1);
      row_ = tensor.stride(2), column_ = tensor.stride(3);
      side_ = *side, across_ = tensor.size(3) / side_;
      patches_ = tensor.size(2) / side_ * across_;
      down_ = side_ * row_, right_ = side_ * column_;
    } else {
      channels_ = tensor.size(2), channel_ = tensor.stride(2);
      patches_ = tensor.size(1), down_ = tensor.stride(1);
    }
  }

  int64_t values() const { return side_ * side_ * channels_; }
  int64_t patches() const { return patches_; }

  void read(int64_t b, int64_t patch, float* values) const {
    by_type(tensor_, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* first = static_cast<const T*>(tensor_.const_data_ptr()) + b * batch_ +
                       patch / across_ * down_ + patch % across_ * right_;
      read_patch(Patch<T>{first, side_, side_, channels_, row_, column_, channel_}, values);
    });
  }

 private:
  Tensor tensor_;
  int64_t patches_, channels_, side_ = 1, across_ = 1;
  int64_t batch_, down_, right_ = 0, row_ = 0, column_ = 0, channel_;
};

// The patches that are looked at, of ids [B, K] or a mask [B, P].
class Chosen {
 public:
  Chosen(const Tensor& ids_or_mask, int64_t patches)
      : batch(ids_or_mask.size(0)), width(ids_or_mask.size(1)) {
    if (ids_or_mask.scalar_type() == ScalarType::Bool) {
      mask_.emplace(ids_or_mask);
    } else {
      ids_.emplace(ids_or_mask);
      for (int64_t i = 0; i < batch * width; ++i) {
        const bool inside = ids_->data()[i] >= -1 && ids_->data()[i] < patches;
        STD_TORCH_CHECK(inside, "ids_or_mask must be in [-1, P)");
      }
    }
  }

  // The patch of an entry of [B, width], -1 for none.
  int64_t patch(int64_t entry) const {
    if (ids_) return ids_->data()[entry];
    return mask_->data()[entry] ? entry % width : -1;
  }

  const int64_t batch, width;

 private:
  std::optional<Rows<int64_t>> ids_;
  std::optional<Rows<bool>> mask_;
};

// A prediction and its target, as a thread holds them: with zeros after their values.
class Pair {
 public:
  Pair(const Patches& preds, const Patches& targets, bool norm_pix)
      : preds_(preds), targets_(targets), norm_pix_(norm_pix), pred_(padded()), want_(padded()) {}

  void read(int64_t b, int64_t pred_row, int64_t patch) {
    preds_.read(b, pred_row, pred_.data());
    targets_.read(b, patch, want_.data());
    if (norm_pix_) normalise_patch(want_.data(), preds_.values());
  }

  const float* pred() const { return pred_.data(); }
  const float* want() const { return want_.data(); }

 private:
  size_t padded() const { return whole_vectors(preds_.values()); }

  const Patches &preds_, &targets_;
  const bool norm_pix_;
  std::vector<float> pred_, want_;
};

std::tuple<Tensor, Tensor> masked_patch_loss(Tensor pred, Tensor target, Tensor ids_or_mask,
                                             int64_t kind, std::optional<int64_t> patch_size,
                                             bool norm_pix, bool gather_pred, int64_t reduction) {
  const Patches preds(pred, std::nullopt), targets(target, patch_size);
  const Chosen chosen(ids_or_mask, targets.patches());
  const int64_t entries = chosen.batch * chosen.width, count = preds.values();
  Tensor losses = empty(pred, {chosen.batch, chosen.width}, ScalarType::Float);
  Tensor divisor = empty(pred, {}, ScalarType::Float);
  float* loss = data<float>(losses);
  torch::stable::parallel_for(0, entries, kGrain, [&](int64_t begin, int64_t end) {
    Pair pair(preds, targets, norm_pix);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t patch = chosen.patch(i);
      loss[i] = 0.0f;
      if (patch < 0) continue;
      pair.read(i / chosen.width, gather_pred ? patch : i % chosen.width, patch);
      loss[i] = loss_of(static_cast<PatchLoss>(kind), pair.pred(), pair.want(), count);
    }
  });
  double total = 0.0;
  int64_t counted = 0;
  for (int64_t i = 0; i < entries; ++i) {
    total += loss[i];
    counted += chosen.patch(i) >= 0;
  }
  const int64_t divided = reduction == kMean ? std::max<int64_t>(counted, 1) : 1;
  *data<float>(divisor) = static_cast<float>(divided);
  if (reduction == kNone) return {losses, divisor};
  Tensor reduced = empty(pred, {}, ScalarType::Float);
  *data<float>(reduced) = static_cast<float>(total / static_cast<double>(divided));
  return {reduced, divisor};
}

// What the gradient of each row of the predictions takes: its patch (-1 for none) and the slope of
// the loss of that patch, summed where ids repeat it.
struct Slopes {
  std::vector<int64_t> patch;
  std::vector<float> slope;

  Slopes(const Tensor& grad, float divisor, const Chosen& chosen, int64_t rows, bool gather_pred)
      : patch(chosen.batch * rows, -1), slope(patch.size(), 0.0f) {
    const Rows<float> grads(grad);
    const bool each = grad.dim() > 0;
    for (int64_t i = 0; i < chosen.batch * chosen.width; ++i) {
      const int64_t p = chosen.patch(i);
      if (p < 0) continue;
      const int64_t row = i / chosen.width * rows + (gather_pred ? p : i % chosen.width);
      patch[row] = p;
      slope[row] += grads.data()[each ? i : 0] / divisor;
    }
  }
};

Tensor masked_patch_loss_backward(Tensor grad, Tensor divisor, Tensor pred, Tensor target,
                                  Tensor ids_or_mask, int64_t kind,
                                  std::optional<int64_t> patch_size, bool norm_pix,
                                  bool gather_pred) {
  const Patches preds(pred, std::nullopt), targets(target, patch_size);
  const int64_t rows = pred.size(1), count = preds.values();
  const Slopes slopes(grad, *static_cast<const float*>(divisor.const_data_ptr()),
                      Chosen(ids_or_mask, targets.patches()), rows, gather_pred);
  Tensor grad_pred = empty_output(pred, {pred.size(0), rows, count}, pred.scalar_type());
  by_type(pred, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    torch::stable::parallel_for(0, pred.size(0) * rows, kGrain, [&](int64_t begin, int64_t end) {
      Pair pair(preds, targets, norm_pix);
      for (int64_t i = begin; i < end; ++i) {
        T* row = data<T>(grad_pred) + i * count;
        if (slopes.patch[i] < 0) {
          std::memset(row, 0, count * sizeof(T));
          continue;
        }
        pair.read(i / rows, i % rows, slopes.patch[i]);
        write_gradient(static_cast<PatchLoss>(kind), pair.pred(), pair.want(), count,
                       slopes.slope[i], row);
      }
    });
  });
  return grad_pred;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(syncmask, CPU, library) {
  library.impl("masked_patch_loss.cpu", TORCH_BOX(&masked_patch_loss));
  library.impl("masked_patch_loss_backward.cpu", TORCH_BOX(&masked_patch_loss_backward));
}
