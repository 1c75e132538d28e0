// Instructions of PTX as C++ functions of their operands.
#pragma once

#include <string>
#include <utility>

#include "ptx.h"

namespace gpu {

template <class Function>
struct Signature;

template <class Result, class... Arguments>
struct Signature<Result (*)(Arguments...)> {
  template <class Function, size_t... n>
  static void apply(Machine& machine, const Instruction& i, std::index_sequence<n...>) {
    machine.write<Result>(i.slots[0], Function{}(machine.read<Arguments>(i.slots[n + 1])...));
  }
  template <class Function>
  static void run(Machine& machine, const Instruction& i) {
    apply<Function>(machine, i, std::index_sequence_for<Arguments...>());
  }
};

// The instruction whose first operand becomes `function`, a lambda, of the others.
template <class Function>
void define(Operations& operations, const std::string& name, Function function) {
  operations[name] = &Signature<decltype(+function)>::template run<Function>;
}

}  // namespace gpu
