// The order of scores as an order of integers, on host and device.
#pragma once

#include <cstring>

#include "syncmask/count.h"

namespace syncmask {

// Integers in the order of (NaN, -score), the larger the earlier; none is 0, which is left for
// excluded positions. -0.0 gets the key of 0.0, and denormals stay apart.
SYNCMASK_HOST_DEVICE uint32_t order_key(float score, bool largest) {
  uint32_t bits;
  memcpy(&bits, &score, sizeof bits);
  bits ^= largest ? 0u : 0x80000000u;
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 1;
  return bits > 0x80000000u ? ~bits : bits | 0x80000000u;
}

}  // namespace syncmask
