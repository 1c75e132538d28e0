"""Whether a model is the one that a `patch` was written for."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from operator import attrgetter
from typing import Any

from torch import nn

from syncmask_kernels.integrations.replacing import Replacement


def _arguments(function: Any) -> list[str]:
    named = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in named if parameter.kind != parameter.KEYWORD_ONLY][1:]


def check_host(
    model: Any,
    host: str,
    has: Collection[str] = (),
    step: type[Replacement] | None = None,
    method: str = "forward",
    **parts: Collection[str],
) -> None:
    """Raise a TypeError that names what `model` lacks, or has and `step` would leave out.

    Args:
        model: as it was handed to `patch`.
        host: what it should be, in words.
        has: attributes that it must have, dotted.
        step: takes the place of `method`, and so its arguments. Default: nothing does.
        method: of the host.
        parts: `modules`, `parameters` and `buffers` that are its own, all of them. Default: any.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError("model must be the model itself, got it wrapped: hand over model.module")
    given = f"model must be {host}: {type(model).__name__}"
    own: dict[str, dict[str, Any]] = {
        "modules": dict(model.named_children()),
        "parameters": dict(model.named_parameters(recurse=False)),
        "buffers": dict(model.named_buffers(recurse=False)),
    }
    for kind, wanted in parts.items():
        lacking, besides = set(wanted) - own[kind].keys(), own[kind].keys() - set(wanted)
        if lacking:
            raise TypeError(f"{given} lacks the {kind} {', '.join(sorted(lacking))}")
        if besides:
            raise TypeError(
                f"{given} has the {kind} {', '.join(sorted(besides))} too, which the patched "
                f"{method} would leave out; call the functions of this module by hand"
            )
    for path in (*has, method):
        try:
            attrgetter(path)(model)
        except AttributeError:
            raise TypeError(f"{given} lacks {path}") from None
    if step is not None:
        ours, taken = (_arguments(f) for f in (step.__call__, getattr(type(model), method)))
        if ours != taken:
            raise TypeError(f"{given} takes {', '.join(taken)} in {method}, not {', '.join(ours)}")
