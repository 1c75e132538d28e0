// Which example a chain takes next, on host and device.
#pragma once

#include "syncmask/order.h"

namespace syncmask {

constexpr uint32_t kLastExample = (1u << 30) - 1;

// What is looked for at one step of a chain. The example of the highest rank is taken: ranks order
// by kind (below the ceiling, not below it, too near another of its item), by similarity, and by
// index, the lower the earlier. No rank of an example is 0.
struct Wish {
  bool semi_hard;
  float ceiling;

  SYNCMASK_HOST_DEVICE bool fits(float similarity) const {
    return !semi_hard || similarity < ceiling;
  }

  SYNCMASK_HOST_DEVICE uint64_t rank(float similarity, uint32_t example) const {
    const bool fit = fits(similarity);
    return kind(fit ? 2 : 1) | uint64_t{order_key(similarity, fit)} << 30 | last_resort(example);
  }

  static SYNCMASK_HOST_DEVICE uint64_t last_resort(uint32_t example) {
    return kLastExample - example;
  }
  static SYNCMASK_HOST_DEVICE uint64_t kind(uint64_t number) { return number << 62; }

  static SYNCMASK_HOST_DEVICE uint32_t example(uint64_t rank) {
    return kLastExample - static_cast<uint32_t>(rank & kLastExample);
  }
};

}  // namespace syncmask
