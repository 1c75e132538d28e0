// The interpreter of PTX. A program is a list of instructions over slots of 64 bits, of which every
// thread has its own: registers, constants and special registers alike. `ptx.py` makes it from PTX.
#pragma once

#include <cstring>
#include <deque>
#include <string>
#include <unordered_map>
#include <vector>

#include "fibers.h"
#include "ptx_memory.h"

namespace gpu {

struct Machine;
struct Instruction;
using Operation = void (*)(Machine&, const Instruction&);

struct Instruction {
  Operation operation;
  int line;           // of the PTX
  int guard;          // 0, or 1 + the slot of a predicate, negative where it must be false
  int64_t immediate;  // an offset of an address, or the instruction that a branch goes to
  const int* slots;   // destinations, then sources
};

// A cp.async that has not happened yet.
struct Copy {
  uint64_t to, from;
  unsigned bytes, filled;
  int line;
};

// One thread of the GPU.
struct Machine {
  uint64_t* slots;
  Memory* memory;
  size_t next = 0;                          // instruction
  std::deque<std::vector<Copy>> copies{1};  // committed groups, then the open one

  template <class T>
  T read(int slot) const {
    T value;
    memcpy(&value, &slots[slot], sizeof value);
    return value;
  }
  template <class T>
  void write(int slot, T value) {
    slots[slot] = 0;
    memcpy(&slots[slot], &value, sizeof value);
  }
};

using Operations = std::unordered_map<std::string, Operation>;
void define_arithmetic(Operations& operations);
void define_conversions(Operations& operations);
void define_memory(Operations& operations);
void define_warp(Operations& operations);

class Program {
 public:
  // Throws a Failure that names the line of an unknown instruction.
  Program(std::string kernel, const std::string& text);
  Program(const Program&) = delete;

  Traffic run(const Index& blocks, const Index& threads, size_t dynamic_shared,
              const void* const* arguments, std::vector<Range> ranges) const;

 private:
  struct Parameter {
    size_t offset, size;
  };
  void add(const std::string& line);
  std::vector<uint64_t> packed(const void* const* arguments) const;

  std::string kernel_;
  std::vector<Instruction> instructions_;
  std::deque<std::vector<int>> operands_;
  std::vector<Parameter> parameters_;
  std::vector<std::pair<int, uint64_t>> constants_;
  std::vector<std::pair<int, std::string>> specials_;
  size_t slots_ = 0, local_bytes_ = 0, shared_bytes_ = 0;
};

}  // namespace gpu
