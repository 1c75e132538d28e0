"""Hugging Face `transformers` (5 or newer): head-mean maps while SDPA serves the attention.

Importing this module registers the attention implementation ``"syncmask"`` with `transformers`:
SDPA, to the bit, but for the layers whose maps `collect_maps` asks for.

    model.set_attn_implementation("syncmask")  # and back: model.set_attn_implementation("sdpa")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from syncmask_kernels import _checks
from syncmask_kernels.attention import attention_map, attention_with_map, wants_grad
from syncmask_kernels.integrations.mlm import masked_lm_loss

__all__ = ["IMPLEMENTATION", "collect_maps", "masked_lm_loss"]

IMPLEMENTATION = "syncmask"
KINDS = ("cross_attentions", "attentions")
EXCLUDED = -1e4  # the largest additive mask in use: that of BERT before transformers 4.20
REFUSED = ("position_bias", "softcap", "s_aux")


class _Request(NamedTuple):
    """Where the map of one attention module goes, and what of it."""

    maps: dict[int, Tensor]
    layer: int
    queries: slice
    skip_keys: int


# On the module itself, where torch.compile guards it.
REQUEST = "_syncmask_request"


def _key_valid(mask: Tensor | None, queries: slice, batch: int) -> tuple[Tensor | None, Any]:
    """Mask [B, 1, T or 1, S], bool or additive -> key_valid [B, S], and whether it says more."""
    if mask is None:
        return None, None
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise ValueError(
            f"attention_mask must be [B, 1, T, S], the same for every head, got {tuple(mask.shape)}"
        )
    if mask.shape[2] > 1:
        mask = mask[:, :, queries]
    valid, known = mask, None
    if mask.dtype != torch.bool:
        valid = mask == 0
        known = (valid | (mask <= EXCLUDED)).all()
    keys = valid[:, 0, 0]
    alike = (valid[:, 0] == keys.unsqueeze(1)).all()
    return keys.expand(batch, -1), alike if known is None else alike & known


def _refuse(module: nn.Module, query: Tensor, mask: Tensor | None, options: dict[str, Any]) -> None:
    for name in REFUSED:
        if options.get(name) is not None:
            raise ValueError(f"no map of {type(module).__name__}: it attends with a {name}")
    # As SDPA decides it: a module that does not say is causal.
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if causal and mask is None and query.shape[2] > 1:
        raise ValueError(f"no map of {type(module).__name__}: its attention is causal")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function: q [B, H, T, D], k and v [B, H, S, D] -> output [B, T, H, D]."""

    def served() -> tuple[Tensor, None]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )

    request: _Request | None = getattr(module, REQUEST, None)
    if request is None:
        return served()
    _refuse(module, query, attention_mask, options)
    valid, only_padding = _key_valid(attention_mask, request.queries, query.shape[0])
    host_sees = query.device.type == "cpu" and not torch.compiler.is_compiling()
    if only_padding is not None and host_sees and not only_padding:
        raise ValueError(
            f"attention_mask of {type(module).__name__} must tell padding alone, got one that is "
            "causal, differs between queries, or is a bias"
        )
    given: dict[str, Any] = {"key_valid": valid, "scale": scaling, "skip_keys": request.skip_keys}
    queries = query[:, :, request.queries]
    if dropout == 0 and queries.shape == query.shape and not wants_grad(query, key, value):
        output, found = attention_with_map(query, key, value, **given)
        result = output.transpose(1, 2).contiguous(), None
    else:
        found, result = attention_map(queries, key, **given), served()
    if only_padding is not None and not host_sees:
        found = found * torch.where(only_padding, 1.0, float("nan"))
    request.maps[request.layer] = found
    return result


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def _records(spec: Any, name: str, module: nn.Module) -> bool:
    """Whether a value of `_can_record_outputs`, a class or an `OutputRecorder`, means the module"""
    target = spec if isinstance(spec, type) else getattr(spec, "target_class", None)
    layer = (getattr(spec, "layer_name", None) or "").strip(".")
    return target is not None and isinstance(module, target) and f".{layer}." in f"..{name}."


def _attention_modules(model: PreTrainedModel, kind: str) -> list[nn.Module]:
    """The modules whose weights ``model(..., output_attentions=True)`` would list, in its order."""
    specs: list[Any] = []
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            spec = (part._can_record_outputs or {}).get(kind, [])
            specs += spec if isinstance(spec, list) else [spec]
    found = [m for name, m in model.named_modules() if any(_records(s, name, m) for s in specs)]
    if not found:
        raise ValueError(f"model must have {kind} to record, {type(model).__name__} has none")
    return found


@contextmanager
def collect_maps(
    model: PreTrainedModel,
    layers: Sequence[int] | None = None,
    *,
    kind: str = "cross_attentions",
    queries: slice = slice(None),
    skip_keys: int = 1,
) -> Iterator[dict[int, Tensor]]:
    """Collect head-mean attention maps of a model's forward passes inside the `with` block.

    The probabilities ``[B, H, T, S]`` never exist in memory (on the backends with a kernel for it).
    Maps are those before dropout. Under `torch.no_grad` and without dropout, as for a teacher in
    evaluation mode, output and map come from one pass (`attention_with_map`); else SDPA gives the
    output and `attention_map` the map, through which gradients flow where they are enabled.

    Args:
        model: a model of `transformers` with ``model.set_attn_implementation("syncmask")``. Of a
            model of several (vision and text) pass the one that is meant.
        layers: indices into what ``model(..., output_attentions=True)`` would return as `kind`.
            Default: all.
        kind: ``"cross_attentions"`` (default; text queries, image keys) or ``"attentions"``, the
            self-attention.
        queries: the queries whose rows are wanted. Default: all. Of a ViT, ``slice(0, 1)`` is the
            CLS row; of a joint encoder of ``[text | image]``, ``slice(0, T)`` with ``skip_keys=T``
            are the words.
        skip_keys: key columns left out of a map (not of the softmax), default 1: the image CLS.

    Yields:
        dict: layer -> map ``[B, T, P]`` float32 of the latest forward pass, filled as the model
        runs. With ``skip_keys=0``, ``sync_topk_mask(map.unsqueeze(1), ...)`` chooses from it.

    Raises:
        ValueError: there is no such layer or kind, or another attention implementation is set; from
            the forward pass, where a mask is more than padding (causal, different from query to
            query, a bias): a GPU, which is not waited for, makes such a map NaN.

    Nothing of the model is changed; it is as before when the block ends.

    Source: `transformers`, "Attention Interface".

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> from transformers import ViTConfig, ViTModel
        >>> from syncmask_kernels.integrations.transformers import collect_maps
        >>> model = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        ...                            intermediate_size=8, image_size=8, patch_size=4))
        >>> model.set_attn_implementation("syncmask")
        >>> with torch.no_grad(), collect_maps(
        ...     model, [1], kind="attentions", queries=slice(0, 1)
        ... ) as maps:
        ...     _ = model(torch.randn(3, 3, 8, 8))
        >>> maps[1].shape  # what CLS sees of the four patches
        torch.Size([3, 1, 4])
    """
    _checks.choice("kind", kind, KINDS)
    _checks.count("skip_keys", skip_keys)
    if not isinstance(queries, slice):
        raise TypeError(f"queries must be a slice, got {type(queries).__name__}")
    modules = _attention_modules(model, kind)
    chosen = range(len(modules)) if layers is None else layers
    maps: dict[int, Tensor] = {}
    asked: dict[nn.Module, _Request] = {}
    for layer in chosen:
        _checks.index("layers", layer, len(modules), f"number of {kind}")
        asked[modules[layer]] = _Request(maps, layer, queries, skip_keys)
    for module in asked:
        config: Any = module.config
        implementation = config._attn_implementation
        if implementation != IMPLEMENTATION:
            raise ValueError(
                f"model must attend with {IMPLEMENTATION!r}, got {implementation!r}: call "
                f"model.set_attn_implementation({IMPLEMENTATION!r})"
            )
        if hasattr(module, REQUEST):
            raise ValueError("model must not be inside another collect_maps of the same layers")
    for module, request in asked.items():
        setattr(module, REQUEST, request)
    try:
        yield maps
    finally:
        for module in asked:
            delattr(module, REQUEST)
