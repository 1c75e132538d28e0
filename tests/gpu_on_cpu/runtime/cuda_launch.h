// Launches of compiled CUDA sources.
#pragma once

#include <functional>

#include "fibers.h"

namespace gpu {

// Runs `body` in every thread; or, where PTX is given, the PTX kernel of the same mangled name.
void launch_kernel(const void* kernel, const Grid& grid, const void* const* arguments,
                   const std::function<void()>& body);

}  // namespace gpu
