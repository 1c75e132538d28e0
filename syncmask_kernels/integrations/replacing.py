"""Replacing methods of one instance, so that it copies, pickles, and can be undone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn


class Replacement:
    """Stands on a module in the place of one of its methods.

    An object rather than a bound function: a copy of the module, or one that was pickled, has a
    replacement of its own, bound to it.
    """

    does: ClassVar[str]

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __str__(self) -> str:
        return self.does


@dataclass(frozen=True)
class Patched:
    """The `model`, and the methods that were replaced on it. ``print`` it, or `unpatch` it."""

    model: nn.Module
    replaced: Mapping[str, Replacement]

    def unpatch(self) -> None:
        unpatch(self.model)

    def __str__(self) -> str:
        lines = [f"{type(self.model).__name__}, replaced on this instance:"]
        width = max(map(len, self.replaced))
        lines += [f"  {name:{width}}  {value}" for name, value in self.replaced.items()]
        return "\n".join(lines)


def install(model: nn.Module, replacements: Mapping[str, Replacement]) -> Patched:
    """Put replacements on `model`, all or none."""
    for name in replacements:
        if isinstance(vars(model).get(name), Replacement):
            raise ValueError(f"model must not be patched already: unpatch it first ({name})")
        if name in vars(model):
            raise ValueError(f"model must have the {name} of its class, got one of its own")
        if not callable(getattr(type(model), name, None)):
            raise TypeError(f"model must have a method {name}, got {type(model).__name__} without")
    for name, replacement in replacements.items():
        setattr(model, name, replacement)
    return Patched(model, dict(replacements))


def unpatch(model: nn.Module) -> None:
    """Give a patched model, or a copy of one, the methods of its class back.

    Raises:
        ValueError: `model` is not patched.
    """
    replaced = [name for name, value in vars(model).items() if isinstance(value, Replacement)]
    if not replaced:
        raise ValueError(f"model must be patched, got {type(model).__name__} as its class made it")
    for name in replaced:
        delattr(model, name)
