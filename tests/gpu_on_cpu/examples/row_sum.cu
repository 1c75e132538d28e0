// Sums of rows, one block a row; and the same with a defect that the tests must find.
#include <cuda_runtime.h>

#include <exception>
#include <string>

namespace example {

enum class Defect { kNone, kNoBarrier, kOutOfBounds, kWrongLanes, kDivergentBarrier };

template <Defect defect>
__global__ void row_sum(const float* x, float* sums, int columns) {
  __shared__ float of_warps[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float* row = x + static_cast<long long>(blockIdx.x) * columns;
  float sum = 0.0f;
  const int end = defect == Defect::kOutOfBounds ? columns + 1 : columns;
  for (int i = threadIdx.x; i < end; i += blockDim.x) sum += row[i];
  for (int by = 16; by > 0; by /= 2) sum += __shfl_down_sync(0xffffffffu, sum, by);
  if (lane == 0) of_warps[warp] = sum;
  if (defect != Defect::kNoBarrier && (defect != Defect::kDivergentBarrier || warp > 0)) {
    __syncthreads();
  }
  if (warp > 0) return;
  sum = lane < blockDim.x / 32 ? of_warps[lane] : 0.0f;
  const unsigned lanes = defect == Defect::kWrongLanes ? 0xfffffffeu : 0xffffffffu;
  for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(lanes, sum, by);
  if (lane == 0) sums[blockIdx.x] = sum;
}

template <Defect defect>
void launch(const float* x, float* sums, int rows, int columns) {
  row_sum<defect><<<rows, 128>>>(x, sums, columns);
}

}  // namespace example

// What went wrong, or null.
extern "C" const char* row_sum(const float* x, float* sums, int rows, int columns, int defect) {
  using example::Defect;
  static std::string failure;
  try {
    switch (static_cast<Defect>(defect)) {
      case Defect::kNone:
        example::launch<Defect::kNone>(x, sums, rows, columns);
        break;
      case Defect::kNoBarrier:
        example::launch<Defect::kNoBarrier>(x, sums, rows, columns);
        break;
      case Defect::kOutOfBounds:
        example::launch<Defect::kOutOfBounds>(x, sums, rows, columns);
        break;
      case Defect::kWrongLanes:
        example::launch<Defect::kWrongLanes>(x, sums, rows, columns);
        break;
      case Defect::kDivergentBarrier:
        example::launch<Defect::kDivergentBarrier>(x, sums, rows, columns);
        break;
    }
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
  return nullptr;
}
