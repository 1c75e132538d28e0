"""The dispatcher's view of the fused operators: one schema and one fake for all backends.

Each backend owns the overload that carries its name (``syncmask::sync_topk_mask.cpu``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from syncmask_kernels.backends.overloads import (
    attention,
    grouping,
    losses,
    masking,
    negatives,
    patch_losses,
    queue_losses,
    selection,
)

_ROOMS = (attention, grouping, losses, masking, negatives, patch_losses, queue_losses, selection)
SCHEMAS: dict[str, str] = {op: s for room in _ROOMS for op, s in room.SCHEMAS.items()}
FAKES: dict[str, Callable[..., Any]] = {op: f for room in _ROOMS for op, f in room.FAKES.items()}

_LIBRARY = torch.library.Library("syncmask", "FRAGMENT")


def define(op: str, backend: str) -> Any:
    """Declare the backend's overload of `op` and its fake; returns the overload to call."""
    _LIBRARY.define(f"{op}.{backend}{SCHEMAS[op]}")
    torch.library.register_fake(f"syncmask::{op}.{backend}", FAKES[op], lib=_LIBRARY)
    # What has gradients is called by an autograd.Function: no need to look for them again.
    _LIBRARY.impl(f"{op}.{backend}", torch.library.fallthrough_kernel, "Autograd")
    return getattr(getattr(torch.ops.syncmask, op), backend)
