// What threads of a warp and of a block tell each other: a row of results for each way to do so.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace example {

// results [kWays, threads], filled by one block.
__global__ void exchange(float* results, unsigned* counters) {
  extern __shared__ float all[];
  const int i = threadIdx.x, threads = blockDim.x, lane = i % 32;
  const unsigned lanes = 0xffffffffu;
  float* mine = results + i;
  const auto give = [&](float value) {
    *mine = value;
    mine += threads;
  };
  all[i] = static_cast<float>(i);
  __syncthreads();
  give(all[threads - 1 - i]);
  give(__shfl_sync(lanes, i, 5, 8));
  give(__shfl_up_sync(lanes, i, 3, 16));
  give(__shfl_down_sync(lanes, i, 3, 16));
  give(__shfl_xor_sync(lanes, i, 9));
  give(__popc(__ballot_sync(lanes, lane < 7)));
  give(__any_sync(lanes, i == 40));
  give(__all_sync(lanes, i < 40));
  give(__reduce_add_sync(lanes, i));
  give(__reduce_min_sync(lanes, -i));
  give(__reduce_max_sync(lanes, static_cast<unsigned>(i)));
  give(__popc(__match_any_sync(lanes, lane / 5)));
  give(__syncthreads_count(i % 3 == 0));
  give(__syncthreads_or(i == 1));
  give(__syncthreads_and(i == 1));
  give(__half2float(__float2half_rn(static_cast<float>(i) / 7)));
  give(__uint_as_float(__float_as_uint(1.0f) + i));
  give(__ffs(i) + __clz(i));
  atomicAdd(counters, 2u);
  atomicMax(counters + 1, static_cast<unsigned>(i));
  atomicMin(counters + 2, static_cast<unsigned>(i));
  atomicCAS(counters + 3, 9u, 11u);
}

}  // namespace example

extern "C" void exchange(float* results, unsigned* counters, int threads) {
  example::exchange<<<1, threads, threads * sizeof(float)>>>(results, counters);
}
