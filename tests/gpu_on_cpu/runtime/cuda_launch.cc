#include "cuda_launch.h"

#include <dlfcn.h>

#include <map>
#include <string>

#include "ptx.h"

namespace gpu {
namespace {

using Listener = void (*)(const char* kernel, const Traffic*);

std::map<std::string, const Program*> programs;
Listener listener = nullptr;

std::string mangled_name(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname || info.dli_saddr != kernel) {
    throw Failure("the kernel has no name that other files see");
  }
  return info.dli_sname;
}

}  // namespace

void launch_kernel(const void* kernel, const Grid& grid, const void* const* arguments,
                   const std::function<void()>& body) {
  if (programs.empty()) return run_grid(grid, body);
  const std::string name = mangled_name(kernel);
  const auto found = programs.find(name);
  if (found == programs.end()) throw Failure("the PTX has no kernel " + name);
  const Traffic traffic =
      found->second->run(grid.blocks, grid.threads, grid.shared_bytes, arguments, {});
  if (listener) listener(name.c_str(), &traffic);
}

}  // namespace gpu

extern "C" {

// From now on launches run these kernels and tell the listener; without any, the sources.
void gpu_use_ptx(const char* const* names, const gpu::Program* const* given, size_t count,
                 gpu::Listener listener) {
  gpu::programs.clear();
  for (size_t i = 0; i < count; ++i) gpu::programs[names[i]] = given[i];
  gpu::listener = listener;
}

// The parts of CUDA and LibTorch that a launcher calls and that need a device.
int cudaGetLastError() { return 0; }
int aoti_torch_create_device_guard(int32_t, void** guard) {
  static char none;
  *guard = &none;
  return 0;
}
int aoti_torch_delete_device_guard(void*) { return 0; }
int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
int torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char** message) {
  *message = nullptr;
  return 0;
}
void torch_c10_cuda_free_error_msg(char*) {}
}
