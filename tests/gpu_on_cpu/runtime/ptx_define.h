// Instructions of PTX as C++ functions of their operands.
#pragma once

#include <initializer_list>
#include <string_view>
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

// The name is the parts, one after the other.
void put(Operations& operations, std::initializer_list<std::string_view> name, Operation operation);

// The instruction whose first operand becomes `function`, a lambda, of the others.
template <class Function>
void define(Operations& operations, std::string_view name, std::string_view type,
            Function function) {
  put(operations, {name, type}, &Signature<decltype(+function)>::template run<Function>);
}

}  // namespace gpu
