"""Contrast with a queue, with the C++ of `csrc/cpu/queue_losses.cpp` between PyTorch's products."""

from __future__ import annotations

from torch import Tensor

from syncmask_kernels.backends import overloads
from syncmask_kernels.backends.eager import queue_losses
from syncmask_kernels.backends.eager.queue_losses import Passes, Sums
from syncmask_kernels.backends.kernel import refuses_compiling, refuses_float64
from syncmask_kernels.backends.queue_losses_request import Keys

_exponentials_overload = overloads.define("queue_contrast_exponentials_", "cpu")
_slopes_ = overloads.define("queue_contrast_slopes_", "cpu")
_room = overloads.define("queue_contrast_room", "cpu")


def _exponentials_(logits: Tensor, own_ids: Tensor, ids: Tensor | None) -> Sums:
    return Sums(*_exponentials_overload(logits, own_ids, ids))


PASSES = Passes(_exponentials_, _slopes_, _room)


def refuses_keys(keys: Keys) -> str | None:
    return refuses_compiling() or refuses_float64(keys.batch)


def queue_contrastive_loss(
    queries: Tensor, teacher: Tensor | None, keys: Keys, alpha: float | Tensor, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    return queue_losses.queue_contrastive_loss(queries, teacher, keys, alpha, wanted, PASSES)
