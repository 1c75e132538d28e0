// Built without sanitizers, which are told of every switch instead. GPU_ASAN or GPU_TSAN says
// which.
#include "fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#ifdef GPU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef GPU_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#endif

#ifndef __x86_64__
#error "the switch between fibers is written for x86-64"
#endif

extern "C" void gpu_switch(void** save, void* to);
__asm__(
    ".text\n.globl gpu_switch\n.type gpu_switch,@function\n"
    "gpu_switch:\n"
    "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
    "mov %rsp, (%rdi); mov %rsi, %rsp\n"
    "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret\n"
    ".size gpu_switch, . - gpu_switch\n");

namespace gpu {

Thread* thread = nullptr;
Block* block = nullptr;
uint64_t seed = 0;

namespace {

constexpr size_t kStack = 256 << 10;  // address space: only pages that are touched cost memory
constexpr int kMostThreads = 1024;
constexpr size_t kMostShared = 227 << 10;

enum class State { kReady, kAtBarrier, kAtMeeting, kDone };

// A context that sanitizers follow: its own stack, or that of the caller of run_grid.
struct Context {
  void* stack_pointer = nullptr;
  const void* stack = nullptr;
  size_t stack_size = 0;
  void* sanitizer = nullptr;
};

struct Fiber : Thread {
  Context context;
  State state = State::kDone;
  int site = 0;
  uint32_t mask = 0;
  Action action = nullptr;
  void* argument = nullptr;
  char order[2] = {};  // what ThreadSanitizer knows lane and sync by; two in turn, see Ordering
  unsigned syncs = 0;
};

struct Scheduler : Block {
  std::vector<Fiber> fibers;
  std::vector<Fiber*> ready;
  const std::function<void()>* body = nullptr;
  std::mt19937_64 random;
  Context main;
  size_t done = 0, at_barrier = 0;
  int barrier_site = 0, votes = 0, last_votes = 0;
  unsigned barriers = 0;
  char begin = 0, end = 0, order[2] = {};
  std::string failure;
  const std::unique_ptr<char[]> variable_memory = std::make_unique<char[]>(2 * kMostShared);
  size_t variable_bytes = 0;
  std::map<const void*, char*> variables;
  size_t threads() const { return grid.threads.count(); }
};

Scheduler scheduler;

Fiber& me() { return *static_cast<Fiber*>(thread); }

void release([[maybe_unused]] void* order) {
#ifdef GPU_TSAN
  __tsan_release(order);
#endif
}

void acquire([[maybe_unused]] void* order) {
#ifdef GPU_TSAN
  __tsan_acquire(order);
#endif
}

void arrived([[maybe_unused]] Context& context) {
#ifdef GPU_ASAN
  __sanitizer_finish_switch_fiber(context.sanitizer, nullptr, nullptr);
#endif
}

void go(Context& from, Context& to, [[maybe_unused]] bool for_good = false) {
#ifdef GPU_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.sanitizer, to.stack, to.stack_size);
#endif
#ifdef GPU_TSAN
  constexpr unsigned kNoSynchronization = 1;
  __tsan_switch_to_fiber(to.sanitizer, kNoSynchronization);
#endif
  gpu_switch(&from.stack_pointer, to.stack_pointer);
  arrived(from);
}

void go_to(Fiber& next, Context& from, bool for_good = false) {
  thread = &next;
  go(from, next.context, for_good);
}

void go_to_main(bool for_good = false) {
  Context& from = me().context;
  thread = nullptr;
  go(from, scheduler.main, for_good);
}

void make_ready(Fiber& fiber) {
  fiber.state = State::kReady;
  scheduler.ready.push_back(&fiber);
}

[[noreturn]] void fail_deadlock() {
  std::string waiting;
  for (const Fiber& fiber : scheduler.fibers) {
    if (fiber.state == State::kDone || fiber.number >= int(scheduler.threads())) continue;
    const Fiber* before = fiber.number ? &fiber - 1 : nullptr;
    if (before && before->state == fiber.state && before->site == fiber.site) continue;
    char text[96];
    snprintf(text, sizeof text, "; from thread %d on at line %d, lanes %08x", fiber.number,
             fiber.site, fiber.state == State::kAtBarrier ? ~0u : fiber.mask);
    waiting += text;
  }
  fail("threads wait for each other forever%s", waiting.c_str());
}

Fiber& draw() {
  auto& ready = scheduler.ready;
  if (ready.empty()) fail_deadlock();
  std::swap(ready[scheduler.random() % ready.size()], ready.back());
  Fiber* drawn = ready.back();
  ready.pop_back();
  return *drawn;
}

void wait() {
  Fiber& next = draw();
  if (&next != thread) go_to(next, me().context);
}

void fiber_main() {
#ifdef GPU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, scheduler.main.stack ? nullptr : &scheduler.main.stack,
                                  scheduler.main.stack ? nullptr : &scheduler.main.stack_size);
#endif
  acquire(&scheduler.begin);
  (*scheduler.body)();
  release(&scheduler.end);
  me().state = State::kDone;
  ++scheduler.done;
  if (scheduler.at_barrier > 0) {
    fail("the thread ends while %zu wait at the barrier of line %d", scheduler.at_barrier,
         scheduler.barrier_site);
  }
  if (scheduler.done == scheduler.threads()) go_to_main(true);
  go_to(draw(), me().context, true);
}

// The next switch to the fiber calls fiber_main.
void rewind(Fiber& fiber) {
  void** top =
      reinterpret_cast<void**>(const_cast<char*>(static_cast<const char*>(fiber.context.stack))) +
      kStack / sizeof(void*);
  *--top = nullptr;  // where fiber_main would return to
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.context.stack_pointer = top;
}

void make_fibers(size_t count) {
  scheduler.fibers.reserve(kMostThreads);
  while (scheduler.fibers.size() < count) {
    Fiber& fiber = scheduler.fibers.emplace_back();
    fiber.number = int(scheduler.fibers.size()) - 1;
    fiber.context.stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    fiber.context.stack_size = kStack;
    if (fiber.context.stack == MAP_FAILED) throw Failure("no memory for the stack of a thread");
#ifdef GPU_TSAN
    fiber.context.sanitizer = __tsan_create_fiber(0);
#endif
  }
}

Index unravel(size_t number, const Index& size) {
  return {unsigned(number % size.x), unsigned(number / size.x % size.y),
          unsigned(number / size.x / size.y)};
}

// Filled here rather than by the first thread to use them, which would be a race with the others.
void clear_variables() {
  scheduler.variables.clear();
  scheduler.variable_bytes = 0;
  char* memory = scheduler.variable_memory.get();
#ifdef GPU_ASAN
  __asan_unpoison_memory_region(memory, 2 * kMostShared);
#endif
  memset(memory, 0xFF, 2 * kMostShared);
#ifdef GPU_ASAN
  __asan_poison_memory_region(memory, 2 * kMostShared);
#endif
}

void run_block(size_t number) {
  scheduler.index = unravel(number, scheduler.grid.blocks);
  scheduler.done = scheduler.at_barrier = 0;
  clear_variables();
  scheduler.ready.clear();
  for (size_t i = 0; i < scheduler.threads(); ++i) {
    Fiber& fiber = scheduler.fibers[i];
    fiber.index = unravel(i, scheduler.grid.threads);
    rewind(fiber);
    make_ready(fiber);
  }
  release(&scheduler.begin);
  go_to(draw(), scheduler.main);
  acquire(&scheduler.end);
}

void check(const Grid& grid) {
  const Index &blocks = grid.blocks, &threads = grid.threads;
  const bool fits = blocks.x < 1u << 31 && blocks.y <= 65535 && blocks.z <= 65535 &&
                    threads.count() <= kMostThreads && threads.z <= 64 &&
                    grid.shared_bytes <= kMostShared;
  if (blocks.count() > 0 && threads.count() > 0 && fits) return;
  char text[256];
  snprintf(text, sizeof text,
           "%s: no GPU can launch %u x %u x %u blocks of %u x %u x %u threads with %zu bytes",
           grid.kernel, blocks.x, blocks.y, blocks.z, threads.x, threads.y, threads.z,
           grid.shared_bytes);
  throw Failure(text);
}

}  // namespace

void run_grid(const Grid& grid, const std::function<void()>& body,
              const std::function<void()>& begin_block) {
  if (block) throw Failure("a kernel is running already");
  check(grid);
  make_fibers(grid.threads.count());
  scheduler.grid = grid;
  scheduler.body = &body;
  scheduler.random.seed(seed);
  scheduler.failure.clear();
#ifdef GPU_TSAN
  scheduler.main.sanitizer = __tsan_get_current_fiber();
#endif
  const auto shared = std::make_unique<char[]>(grid.shared_bytes);
  scheduler.shared = shared.get();
  std::vector<size_t> order(grid.blocks.count());
  std::iota(order.begin(), order.end(), size_t(0));
  std::shuffle(order.begin(), order.end(), scheduler.random);
  block = &scheduler;
  for (size_t number : order) {
    memset(scheduler.shared, 0xFF, grid.shared_bytes);
    if (begin_block) begin_block();
    run_block(number);
    if (!scheduler.failure.empty()) break;
  }
  block = nullptr;
  if (!scheduler.failure.empty()) throw Failure(scheduler.failure);
}

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (!thread) throw Failure(text);
  const Index &b = block->index, &t = thread->index;
  char place[256];
  snprintf(place, sizeof place, "%s, block (%u, %u, %u), thread (%u, %u, %u): ", block->grid.kernel,
           b.x, b.y, b.z, t.x, t.y, t.z);
  scheduler.failure = std::string(place) + text;
  go_to_main(true);
  abort();  // nothing comes back to a thread that failed
}

int barrier(int site, bool predicate) {
  if (scheduler.done > 0) {
    fail("line %d: a barrier after %zu threads have ended", site, scheduler.done);
  }
  if (scheduler.at_barrier == 0) {
    scheduler.barrier_site = site;
    scheduler.votes = 0;
  } else if (scheduler.barrier_site != site) {
    fail("the barrier diverges: threads of one block wait at line %d and at line %d",
         scheduler.barrier_site, site);
  }
  scheduler.votes += predicate;
  // Two in turn: what a fast thread releases next must not reach a slow one's acquire.
  char* order = &scheduler.order[scheduler.barriers % 2];
  release(order);
  me().state = State::kAtBarrier;
  me().site = site;
  if (++scheduler.at_barrier == scheduler.threads()) {
    scheduler.last_votes = scheduler.votes;
    scheduler.at_barrier = 0;
    ++scheduler.barriers;
    for (size_t i = 0; i < scheduler.threads(); ++i) make_ready(scheduler.fibers[i]);
  }
  wait();
  acquire(order);
  return scheduler.last_votes;
}

void meet(uint32_t mask, int site, Action action, void* argument) {
  Fiber& self = me();
  if (!(mask >> self.lane() & 1)) {
    fail("line %d: lane %d calls with mask %08x, which lacks it", site, self.lane(), mask);
  }
  self.state = State::kAtMeeting;
  self.site = site;
  self.mask = mask;
  self.action = action;
  self.argument = argument;
  Fiber* warp = &scheduler.fibers[self.warp() * 32];
  const int lanes = std::min<int>(32, int(scheduler.threads()) - self.warp() * 32);
  void* arguments[32] = {};
  bool complete = true;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (lane >= lanes) {
      fail("line %d: mask %08x names lane %d, which the block does not have", site, mask, lane);
    }
    const Fiber& other = warp[lane];
    if (other.state == State::kDone) {
      fail("line %d: mask %08x names lane %d, which has ended", site, mask, lane);
    }
    complete &= other.state == State::kAtMeeting && other.site == site && other.mask == mask &&
                other.action == action;
    arguments[lane] = other.argument;
  }
  if (complete) {
    action(arguments, mask);
    for (int lane = 0; lane < lanes; ++lane) {
      if (mask >> lane & 1) make_ready(warp[lane]);
    }
  }
  wait();
}

namespace {

// What each lane of a sync releases, and the other lanes acquire after it.
struct Ordering {
  char* own;
  char* all[32];
};

struct Exchange {
  uint64_t value, result;
  int from;
};

template <class F>
void for_lanes(uint32_t mask, F function) {
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) function(lane);
  }
}

uint64_t exchange(Action action, uint64_t value, int from, uint32_t mask, int site) {
  Exchange own{value, 0, from};
  meet(mask, site, action, &own);
  return own.result;
}

Exchange& at(void** arguments, int lane) { return *static_cast<Exchange*>(arguments[lane]); }

}  // namespace

void sync_warp(uint32_t mask, int site) {
  Ordering ordering{&me().order[me().syncs++ % 2], {}};
  release(ordering.own);
  const Action share = [](void** arguments, uint32_t lanes) {
    for_lanes(lanes, [&](int to) {
      for_lanes(lanes, [&](int from) {
        static_cast<Ordering*>(arguments[to])->all[from] =
            static_cast<Ordering*>(arguments[from])->own;
      });
    });
  };
  meet(mask, site, share, &ordering);
  for_lanes(mask, [&](int lane) { acquire(ordering.all[lane]); });
}

uint64_t shuffle(uint64_t value, int from_lane, uint32_t mask, int site) {
  if (!(mask >> from_lane & 1)) {
    fail("line %d: the shuffle reads lane %d, which mask %08x lacks", site, from_lane, mask);
  }
  const Action swap = [](void** arguments, uint32_t lanes) {
    for_lanes(lanes, [&](int lane) {
      at(arguments, lane).result = at(arguments, at(arguments, lane).from).value;
    });
  };
  return exchange(swap, value, from_lane, mask, site);
}

uint32_t ballot(bool predicate, uint32_t mask, int site) {
  const Action count = [](void** arguments, uint32_t lanes) {
    uint64_t votes = 0;
    for_lanes(lanes, [&](int lane) { votes |= at(arguments, lane).value << lane; });
    for_lanes(lanes, [&](int lane) { at(arguments, lane).result = votes; });
  };
  return uint32_t(exchange(count, predicate, 0, mask, site));
}

uint32_t match_any(uint64_t value, uint32_t mask, int site) {
  const Action compare = [](void** arguments, uint32_t lanes) {
    for_lanes(lanes, [&](int lane) {
      for_lanes(lanes, [&](int other) {
        const bool same = at(arguments, lane).value == at(arguments, other).value;
        at(arguments, lane).result |= uint64_t(same) << other;
      });
    });
  };
  return uint32_t(exchange(compare, value, 0, mask, site));
}

uint32_t reduce(Fold fold, uint32_t value, uint32_t mask, int site) {
  struct Folded {
    Fold fold;
    uint32_t value, result;
  } own{fold, value, 0};
  const Action fold_all = [](void** arguments, uint32_t lanes) {
    const auto of = [&](int lane) { return static_cast<Folded*>(arguments[lane]); };
    const int first = __builtin_ctz(lanes);
    uint32_t result = of(first)->value;
    for_lanes(lanes & (lanes - 1),
              [&](int lane) { result = of(first)->fold(result, of(lane)->value); });
    for_lanes(lanes, [&](int lane) { of(lane)->result = result; });
  };
  meet(mask, site, fold_all, &own);
  return own.result;
}

char* shared_variable(const void* identity, size_t bytes) {
  char*& variable = scheduler.variables[identity];
  if (variable) return variable;
  variable = scheduler.variable_memory.get() + scheduler.variable_bytes;
  constexpr size_t kApart = 32;  // so that a sanitizer sees what goes beyond the end
  scheduler.variable_bytes += (bytes + 2 * kApart) / kApart * kApart;
  if (scheduler.variable_bytes > 2 * kMostShared) fail("%zu bytes of shared memory", bytes);
#ifdef GPU_ASAN
  __asan_unpoison_memory_region(variable, bytes);
#endif
  return variable;
}

}  // namespace gpu
