#include <algorithm>
#include <cstdlib>
#include <sstream>

#include "ptx_define.h"

namespace gpu {
namespace {

const Operations& operations() {
  static const Operations all = [] {
    Operations table;
    define_arithmetic(table);
    define_conversions(table);
    define_memory(table);
    define_warp(table);
    table["nop"] = [](Machine&, const Instruction&) {};
    table["bra"] = [](Machine& machine, const Instruction& i) {
      machine.next = size_t(i.immediate);
    };
    table["trap"] = [](Machine&, const Instruction& i) { fail("line %d: trap", i.line); };
    return table;
  }();
  return all;
}

// Special registers of the thread that runs now.
uint64_t special(const std::string& name) {
  const Grid& grid = block->grid;
  const auto of = [&](const Index& index) {
    return name.back() == 'x' ? index.x : name.back() == 'y' ? index.y : index.z;
  };
  const int lane = thread->lane();
  if (name.rfind("tid", 0) == 0) return of(thread->index);
  if (name.rfind("ntid", 0) == 0) return of(grid.threads);
  if (name.rfind("ctaid", 0) == 0) return of(block->index);
  if (name.rfind("nctaid", 0) == 0) return of(grid.blocks);
  if (name == "laneid") return lane;
  if (name == "warpid") return thread->warp();
  if (name == "lanemask_eq") return 1u << lane;
  if (name == "lanemask_lt") return (1u << lane) - 1;
  if (name == "lanemask_le") return (2u << lane) - 1;
  if (name == "lanemask_gt") return ~((2u << lane) - 1);
  if (name == "lanemask_ge") return ~((1u << lane) - 1);
  fail("no special register %s", name.c_str());
}

}  // namespace

void put(Operations& operations, std::initializer_list<std::string_view> name,
         Operation operation) {
  std::string whole;
  for (std::string_view part : name) whole += part;
  operations[whole] = operation;
}

// Lines of the text, by their first word: "slots", "local" and "shared" with a number; "parameter"
// with offset and size; "constant" with slot and value; "special" with slot and name; else an
// instruction: its line in the PTX, guard, operation, immediate, and slots.
Program::Program(std::string kernel, const std::string& text) : kernel_(std::move(kernel)) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) add(line);
}

void Program::add(const std::string& line) {
  std::istringstream words(line);
  std::string first;
  words >> first;
  if (first == "slots") {
    words >> slots_;
  } else if (first == "local") {
    words >> local_bytes_;
  } else if (first == "shared") {
    words >> shared_bytes_;
  } else if (first == "parameter") {
    auto& [offset, size] = parameters_.emplace_back();
    words >> offset >> size;
  } else if (first == "constant") {
    auto& [slot, value] = constants_.emplace_back();
    words >> slot >> value;
  } else if (first == "special") {
    auto& [slot, name] = specials_.emplace_back();
    words >> slot >> name;
  } else {
    Instruction instruction{};
    std::string name;
    words >> instruction.guard >> name >> instruction.immediate;
    instruction.line = std::stoi(first);
    const auto found = operations().find(name);
    if (found == operations().end()) {
      throw Failure(kernel_ + ": line " + first + ": the instruction is not known: " + name);
    }
    instruction.operation = found->second;
    std::vector<int>& slots = operands_.emplace_back();
    for (int slot; words >> slot;) slots.push_back(slot);
    instruction.slots = slots.data();
    instructions_.push_back(instruction);
  }
}

std::vector<uint64_t> Program::packed(const void* const* arguments) const {
  const size_t bytes =
      parameters_.empty() ? 0 : parameters_.back().offset + parameters_.back().size;
  std::vector<uint64_t> block(bytes / 8 + 1);
  for (const auto& [offset, size] : parameters_) {
    memcpy(reinterpret_cast<char*>(block.data()) + offset, *arguments++, size);
  }
  return block;
}

Traffic Program::run(const Index& blocks, const Index& threads, size_t dynamic_shared,
                     const void* const* arguments, std::vector<Range> ranges) const {
  const std::vector<uint64_t> parameters = packed(arguments);
  const Grid grid{kernel_.c_str(), blocks, threads, shared_bytes_ + dynamic_shared};
  Memory memory(std::move(ranges), grid.shared_bytes);
  memory.progress.resize(threads.count());
  std::vector<uint64_t> registers(threads.count() * slots_);
  using Chunk = unsigned __int128;  // the largest alignment that a vector access asks for
  const size_t local_chunks = local_bytes_ / sizeof(Chunk) + 1;
  std::vector<Chunk> local(threads.count() * local_chunks);
  const auto run_thread = [&] {
    Machine machine{&registers[thread->number * slots_], &memory};
    std::fill_n(machine.slots, slots_, ~uint64_t(0));
    for (const auto& [slot, value] : constants_) machine.slots[slot] = value;
    for (const auto& [slot, name] : specials_) {
      const auto* own_local = &local[thread->number * local_chunks];
      machine.slots[slot] = name == "param"   ? reinterpret_cast<uint64_t>(parameters.data())
                            : name == "local" ? reinterpret_cast<uint64_t>(own_local)
                                              : special(name);
    }
    while (machine.next < instructions_.size()) {
      const Instruction& i = instructions_[machine.next++];
      if (i.guard && (machine.slots[std::abs(i.guard) - 1] & 1) != (i.guard > 0)) continue;
      i.operation(machine, i);
    }
  };
  run_grid(grid, run_thread, [&] { memory.begin_block(); });
  return memory.traffic();
}

}  // namespace gpu

// ---- what Python calls ----

using gpu::Program;

extern "C" {

static std::string last_failure;

const char* gpu_failure() { return last_failure.c_str(); }
void gpu_seed(uint64_t seed) { gpu::seed = seed; }

Program* gpu_program(const char* kernel, const char* text) {
  try {
    return new Program(kernel, text);
  } catch (const std::exception& error) {
    last_failure = error.what();
    return nullptr;
  }
}

// Whether it went well. `size`: blocks and threads along x, y and z.
bool gpu_run(const Program* program, const unsigned* size, size_t dynamic_shared,
             const void* const* arguments, const gpu::Range* ranges, size_t range_count,
             gpu::Traffic* traffic) {
  try {
    *traffic = program->run({size[0], size[1], size[2]}, {size[3], size[4], size[5]},
                            dynamic_shared, arguments, {ranges, ranges + range_count});
    return true;
  } catch (const std::exception& error) {
    last_failure = error.what();
    return false;
  }
}
}
