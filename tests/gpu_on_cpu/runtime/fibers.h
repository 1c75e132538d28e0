// Runs a grid on the CPU. Every GPU thread is a fiber; whenever one waits, at a barrier or for
// lanes of its warp, the next one is drawn at random from those that can go on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>

namespace gpu {

struct Index {
  unsigned x = 1, y = 1, z = 1;
  size_t count() const { return size_t(x) * y * z; }
};

struct Grid {
  const char* kernel;
  Index blocks, threads;
  size_t shared_bytes;  // asked for at the launch
};

struct Thread {
  Index index;
  int number;
  int lane() const { return number % 32; }
  int warp() const { return number / 32; }
};

struct Block {
  Grid grid;
  Index index;
  char* shared;
};

extern Thread* thread;  // the one that runs now; null outside of kernels
extern Block* block;    // its block

// What a kernel did wrong, and where.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Run `body` in every thread of the grid, one block after the other in random order.
// `begin_block`, where given, is called before each.
void run_grid(const Grid& grid, const std::function<void()>& body,
              const std::function<void()>& begin_block = {});

// Stops the kernel: run_grid throws a Failure that names kernel, block and thread.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

// Waits for all threads of the block at `site`; how many of them gave a true `predicate`.
int barrier(int site, bool predicate = false);

// Waits for the lanes of `mask` to call with the same `site` and `action`. The last to come runs
// the action for all of them, on the arguments that they brought, by lane.
using Action = void (*)(void** arguments, uint32_t mask);
void meet(uint32_t mask, int site, Action action, void* argument);

// Warp collectives in the words of PTX, made of meet().
void sync_warp(uint32_t mask, int site);
uint64_t shuffle(uint64_t value, int from_lane, uint32_t mask, int site);
uint32_t ballot(bool predicate, uint32_t mask, int site);
uint32_t match_any(uint64_t value, uint32_t mask, int site);
using Fold = uint32_t (*)(uint32_t, uint32_t);
uint32_t reduce(Fold fold, uint32_t value, uint32_t mask, int site);

// Memory of a static shared variable of this block, filled with 0xFF: NaN, and the largest
// integers.
char* shared_variable(const void* identity, size_t bytes);

extern uint64_t seed;  // of the order in which threads and blocks run

}  // namespace gpu
