"""Whether a model is as it was: its attributes, parameters, hooks, and methods of the instance."""

from __future__ import annotations

from typing import Any

from torch import nn


def all_of(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every submodule; dictionaries are copied, so that later changes show."""
    return {
        f"{name}.{key}": dict(value) if isinstance(value, dict) else value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether both hold the same objects."""
    if before.keys() != after.keys():
        return False
    return all(
        same(value, after[key]) if isinstance(value, dict) else value is after[key]
        for key, value in before.items()
    )
