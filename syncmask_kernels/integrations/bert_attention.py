"""Attention of the `BertSelfAttention` family, as it passes by.

ALBEF and its children, BLIP, LAVIS and older `transformers` share one attention module, with linear
layers `query`, `key` and `value`. Hooks on these see all that a map is computed from, whatever the
rest of the forward does: its dropout, its probabilities and its `save_attention` play no part.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from syncmask_kernels.attention import attention_map
from syncmask_kernels.selection import SyncMask, sync_topk_mask_qk

PROJECTIONS = ("query", "key", "value")


class _Complete(Exception):
    """Ends a forward of which nothing more is wanted."""


@dataclass
class Attended:
    """What one attention module projected last, ``[B, H, length, D]``, and which keys it saw."""

    seen: dict[str, Tensor] = field(default_factory=dict)
    key_valid: Tensor | None = None

    @property
    def complete(self) -> bool:
        return len(self.seen) == len(PROJECTIONS)


class _Tap(Attended):
    """Filled as the module runs."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        for name in PROJECTIONS:
            if not isinstance(getattr(module, name, None), nn.Module):
                raise TypeError(
                    f"modules must be BERT's self-attention, with {', '.join(PROJECTIONS)}: "
                    f"{type(module).__name__} has no {name}"
                )
        if not isinstance(getattr(module, "num_attention_heads", None), int):
            raise TypeError(
                f"modules must have num_attention_heads, got {type(module).__name__} without"
            )
        if getattr(module, "position_embedding_type", "absolute") != "absolute":
            raise ValueError(
                "modules must not add relative positions to their logits, got "
                f"position_embedding_type={module.position_embedding_type!r}"
            )
        self.module, self.signature = module, inspect.signature(module.forward)

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = self.signature.bind(*args, **kwargs).arguments
        if given.get("past_key_value") is not None:
            raise ValueError("modules must be called without past_key_value, got cached keys")
        crossed = given.get("encoder_hidden_states") is not None
        mask = given.get("encoder_attention_mask" if crossed else "attention_mask")
        self.seen = {}
        self.key_valid = None if mask is None else masked_keys(mask) == 0

    def see(self, name: str, projected: Tensor) -> None:
        heads = self.module.num_attention_heads
        self.seen[name] = projected.detach().unflatten(-1, (heads, -1)).transpose(1, 2)


def masked_keys(mask: Tensor) -> Tensor:
    """A mask ``[B, 1, 1, S]``, of keys alone -> ``[B, S]``, or what expands to it."""
    if mask.dim() != 4 or mask.shape[1:3] != (1, 1):
        raise ValueError(
            f"modules must mask keys alone, [B, 1, 1, S], got a mask of shape {tuple(mask.shape)}"
        )
    return mask[:, 0, 0]


class Captured:
    """Attention of the modules handed to `capture_attention`, each in its last forward."""

    def __init__(self, taps: Sequence[Attended]) -> None:
        self._taps = taps

    def _of_all(self, name: str) -> list[Tensor]:
        for i, tap in enumerate(self._taps):
            if not tap.complete:
                raise RuntimeError(f"nothing was captured: modules[{i}] has not been called")
        return [tap.seen[name] for tap in self._taps]

    @property
    def q(self) -> list[Tensor]:
        """Queries ``[B, H, T, D]`` of each module."""
        return self._of_all("query")

    @property
    def k(self) -> list[Tensor]:
        """Keys ``[B, H, S, D]``."""
        return self._of_all("key")

    @property
    def v(self) -> list[Tensor]:
        """Values ``[B, H, S, D]``."""
        return self._of_all("value")

    @property
    def key_valid(self) -> Tensor | None:
        """``[B, S]`` bool where the model passes a mask, which is the same for all layers."""
        keys, valid = self.k[0], self._taps[0].key_valid
        return None if valid is None else valid.expand(keys.shape[0], keys.shape[2])

    def map(self, *, skip_keys: int = 1) -> Tensor:
        """``[B, T, S - skip_keys]``: `attention_map`, the mean over heads and modules."""
        return attention_map(self.q, self.k, key_valid=self.key_valid, skip_keys=skip_keys)

    def sync_masks(
        self, token_valid: Tensor | None = None, *, weigh_by_value: bool = False, **options: Any
    ) -> SyncMask:
        """`sync_topk_mask_qk`, with the options of that; `weigh_by_value` passes it the values."""
        return sync_topk_mask_qk(
            self.q,
            self.k,
            token_valid,
            v=self.v if weigh_by_value else None,
            key_valid=self.key_valid,
            **options,
        )


@contextmanager
def capture_attention(modules: Sequence[nn.Module], *, stop: bool = False) -> Iterator[Captured]:
    """Queries, keys and values of chosen attention modules while the block runs.

    Args:
        modules: `BertSelfAttention` modules, such as ``bert.encoder.layer[8].crossattention.self``.
        stop: leave the block as soon as each has projected its values, and save what would follow:
            for a forward that is run for the attention alone, without gradients. Default: False.

    Yields:
        Captured: read it after the model has run. Tensors are detached views of what the model
        computes anyway; they are kept as long as this object is. The hooks end with the block.

    Raises:
        TypeError: a module has not the parts of `BertSelfAttention`.
        ValueError: a module adds relative positions to its logits; or, as it runs, it has cached
            keys, or a mask that is not one of keys alone (a causal one).

    Works under `torch.no_grad` and in evaluation or training mode, where the host's own
    `save_attention` fails without gradients. Attention is that before dropout.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> class SelfAttention(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.query, self.key, self.value = (torch.nn.Linear(8, 8) for _ in range(3))
        ...         self.num_attention_heads = 2
        ...     def forward(self, hidden_states, encoder_hidden_states):
        ...         q, k = self.query(hidden_states), self.key(encoder_hidden_states)
        ...         return (q @ k.mT).softmax(-1) @ self.value(encoder_hidden_states)
        >>> layer = SelfAttention()
        >>> with capture_attention([layer]) as captured:
        ...     _ = layer(torch.randn(3, 5, 8), torch.randn(3, 17, 8))
        >>> captured.map().shape, captured.sync_masks(token_ratio=0.4).token_mask.sum(dim=1)
        (torch.Size([3, 5, 16]), tensor([2, 2, 2]))
    """
    taps = [_Tap(module) for module in modules]
    if not taps:
        raise ValueError("modules must hold at least one attention module, got none")

    def seeing(tap: _Tap, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            tap.see(name, output)
            if stop and all(other.complete for other in taps):
                raise _Complete

        return hook

    with ExitStack() as hooks, suppress(_Complete):
        for tap in taps:
            begin = tap.module.register_forward_pre_hook(tap.begin, with_kwargs=True)
            hooks.callback(begin.remove)
            for name in PROJECTIONS:
                handle = getattr(tap.module, name).register_forward_hook(seeing(tap, name))
                hooks.callback(handle.remove)
        yield Captured(taps)
