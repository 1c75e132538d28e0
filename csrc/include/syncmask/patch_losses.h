// Losses of patches and their gradients. A patch is held in the first cache as float32, flattened,
// in room for whole vectors; what is left of the last one is zero, which adds nothing to sums.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "syncmask/vector.h"

namespace syncmask {

enum class PatchLoss { kL1, kMse, kSmoothL1, kCosine };  // as KINDS of patch_losses_request.py

// Values that are flattened as (row, column, channel), and the distances between them.
template <typename T>
struct Patch {
  const T* first;
  int64_t rows, columns, channels;
  int64_t row, column, channel;
};

SYNCMASK_INLINE int64_t whole_vectors(int64_t values) {
  return (values + kLanes - 1) / kLanes * kLanes;
}

// values = the patch
template <typename T>
SYNCMASK_INLINE void read(const Patch<T>& patch, float* values) {
  const int64_t columns = patch.columns, channels = patch.channels, width = columns * channels;
  const bool whole_rows = (channels == 1 || patch.channel == 1) &&
                          (columns == 1 || patch.column == channels);
  for (int64_t y = 0; y < patch.rows; ++y) {
    const T* row = patch.first + y * patch.row;
    float* to = values + y * width;
    if (whole_rows) {
      for (int64_t i = 0; i < width; ++i) to[i] = widen(row[i]);
    } else if (channels == 3 && patch.column == 1) {
      const T *second = row + patch.channel, *third = second + patch.channel;
      for (int64_t x = 0; x < columns; ++x) {
        to[3 * x] = widen(row[x]);
        to[3 * x + 1] = widen(second[x]);
        to[3 * x + 2] = widen(third[x]);
      }
    } else {
      for (int64_t i = 0; i < width; ++i) {
        to[i] = widen(row[i / channels * patch.column + i % channels * patch.channel]);
      }
    }
  }
}

// The sum of term(pred, want) over the vectors of two patches.
template <typename Term>
SYNCMASK_INLINE float sum_of(const float* pred, const float* want, int64_t values,
                             const Term& term) {
  constexpr int kSums = 4;  // side by side: an addition need not wait for the one before it
  Floats sums[kSums] = {}, left, right, value;
  for (int64_t i = 0; i < values; i += kSums * kLanes) {
    for (int j = 0; j < kSums && i + j * kLanes < values; ++j) {
      widen(pred + i + j * kLanes, left);
      widen(want + i + j * kLanes, right);
      term(left, right, value);
      sums[j] += value;
    }
  }
  sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float total = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) total += sums[0][lane];
  return total;
}

#define SYNCMASK_TERM                                                                      \
  [=]([[maybe_unused]] const Floats& pred, [[maybe_unused]] const Floats& want, Floats& term) \
      __attribute__((always_inline))

// To mean 0 and variance 1, as MAE does: unbiased, with 1e-6 added.
SYNCMASK_INLINE void normalise(float* values, int64_t count) {
  const float size = static_cast<float>(count);
  const float mean = sum_of(values, values, count, SYNCMASK_TERM { term = pred; }) / size;
  for (int64_t i = 0; i < count; ++i) values[i] -= mean;
  const float squares = sum_of(values, values, count, SYNCMASK_TERM { term = pred * want; });
  const float deviation = std::sqrt(squares / (size - 1.0f) + 1e-6f);
  for (int64_t i = 0; i < count; ++i) values[i] /= deviation;
}

// What the cosine of prediction and target is made of.
struct Cosine {
  float value, per_pred, per_want;  // per: 1 / the norm

  SYNCMASK_INLINE Cosine(const float* pred, const float* want, int64_t count) {
    constexpr float kLeastNorm = 1e-8f;
    const auto product = SYNCMASK_TERM { term = pred * want; };
    per_pred = 1.0f / std::max(std::sqrt(sum_of(pred, pred, count, product)), kLeastNorm);
    per_want = 1.0f / std::max(std::sqrt(sum_of(want, want, count, product)), kLeastNorm);
    value = sum_of(pred, want, count, product) * per_pred * per_want;
  }
};

SYNCMASK_INLINE float patch_loss(PatchLoss kind, const float* pred, const float* want,
                                 int64_t count) {
  float total;
  switch (kind) {
    case PatchLoss::kCosine:
      return 1.0f - Cosine(pred, want, count).value;
    case PatchLoss::kL1:
      total = sum_of(pred, want, count, SYNCMASK_TERM {
        term = pred - want;
        term = term < 0.0f ? -term : term;
      });
      break;
    case PatchLoss::kMse:
      total = sum_of(pred, want, count, SYNCMASK_TERM {
        term = pred - want;
        term *= term;
      });
      break;
    default:
      total = sum_of(pred, want, count, SYNCMASK_TERM {
        const Floats error = pred - want, size = error < 0.0f ? -error : error;
        term = size < 1.0f ? 0.5f * error * error : size - 0.5f;
      });
  }
  return total / static_cast<float>(count);
}

// grad = term(pred, want)
template <typename T, typename Term>
SYNCMASK_INLINE void write(const float* pred, const float* want, int64_t count, T* grad,
                           const Term& term) {
  Floats left, right, value;
  for (int64_t i = 0; i < count; i += kLanes) {
    widen(pred + i, left);
    widen(want + i, right);
    term(left, right, value);
    if (i + kLanes <= count) {
      store(value, grad + i);
    } else {
      for (int64_t lane = 0; i + lane < count; ++lane) narrow(value[lane], grad + i + lane);
    }
  }
}

// The gradient by pred of slope * patch_loss.
template <typename T>
SYNCMASK_INLINE void patch_gradient(PatchLoss kind, const float* pred, const float* want,
                                    int64_t count, float slope, T* grad) {
  const float share = slope / static_cast<float>(count);
  switch (kind) {
    case PatchLoss::kCosine: {
      const Cosine cosine(pred, want, count);
      const float by_pred = cosine.value * cosine.per_pred * cosine.per_pred * slope;
      const float by_want = cosine.per_pred * cosine.per_want * slope;
      return write(pred, want, count, grad, SYNCMASK_TERM { term = pred * by_pred - want * by_want; });
    }
    case PatchLoss::kL1:
      return write(pred, want, count, grad, SYNCMASK_TERM {
        const Floats error = pred - want;
        term = error > 0.0f ? Floats{} + share : error < 0.0f ? Floats{} - share : Floats{};
      });
    case PatchLoss::kMse:
      return write(pred, want, count, grad, SYNCMASK_TERM { term = (pred - want) * (2.0f * share); });
    default:
      return write(pred, want, count, grad, SYNCMASK_TERM {
        term = pred - want;
        term = term < -1.0f ? Floats{} - 1.0f : term > 1.0f ? Floats{} + 1.0f : term;
        term *= share;
      });
  }
}

#undef SYNCMASK_TERM

}  // namespace syncmask
