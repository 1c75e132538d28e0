"""Hugging Face `transformers` (5 or newer): head-mean maps while SDPA serves the attention.

Importing this module registers the attention implementation ``"syncmask"`` with `transformers`:
SDPA, to the bit, but for the layers that `collect_maps` or `capture_attention` asks for.

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
from syncmask_kernels.integrations.bert_attention import Attended, Captured
from syncmask_kernels.integrations.mlm import masked_lm_loss

__all__ = ["IMPLEMENTATION", "Captured", "capture_attention", "collect_maps", "masked_lm_loss"]

IMPLEMENTATION = "syncmask"
KINDS = ("cross_attentions", "attentions")
EXCLUDED = -1e4  # what additive masks of padding are at most: ALBEF's and the first BERT's
REFUSED = ("position_bias", "softcap", "s_aux")


class _MapWanted(NamedTuple):
    """Where the map of one attention module goes, and what of it."""

    maps: dict[int, Tensor]
    layer: int
    queries: slice
    skip_keys: int


class _InputsWanted(NamedTuple):
    """What `Captured` reads the inputs of one attention module from."""

    attended: Attended
    queries: slice


_Request = _MapWanted | _InputsWanted

# On the module itself, where torch.compile guards it.
REQUEST = "_syncmask_request"


def _key_valid(
    module: nn.Module, mask: Tensor | None, queries: slice, batch: int
) -> tuple[Tensor | None, Tensor | None]:
    """Mask [B, 1, T or 1, S], bool or additive -> key_valid [B, S], and the factor of maps:
    1, NaN where the mask says more than padding, None where the host has seen that it does not.
    """
    if mask is None:
        return None, None
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise ValueError(
            f"attention_mask must be [B, 1, T, S], the same for every head, got {tuple(mask.shape)}"
        )
    if mask.shape[2] > 1:
        mask = mask[:, :, queries]
    valid = mask if mask.dtype == torch.bool else mask == 0
    keys = valid[:, 0, 0]
    only_padding = (valid[:, 0] == keys.unsqueeze(1)).all()
    if mask.dtype != torch.bool:
        only_padding &= (valid | (mask <= EXCLUDED)).all()
    keys = keys.expand(batch, -1)
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return keys, torch.where(only_padding, 1.0, float("nan"))
    if not only_padding:
        raise ValueError(
            f"attention_mask of {type(module).__name__} must tell padding alone, got one that is "
            "causal, differs between queries, or is a bias"
        )
    return keys, None


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
    valid, factor = _key_valid(module, attention_mask, request.queries, query.shape[0])
    queries = query[:, :, request.queries]
    if isinstance(request, _InputsWanted):
        _keep(request.attended, queries, key, value, valid, factor, scaling)
        return served()
    given: dict[str, Any] = {"key_valid": valid, "scale": scaling, "skip_keys": request.skip_keys}
    whole = factor is None and queries.shape == query.shape
    if whole and dropout == 0 and not wants_grad(query, key, value):
        output, found = attention_with_map(query, key, value, **given)
        result = output.transpose(1, 2).contiguous(), None
    else:
        found, result = attention_map(queries, key, **given), served()
    request.maps[request.layer] = found if factor is None else found * factor
    return result


def _keep(
    attended: Attended,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    factor: Tensor | None,
    scaling: float | None,
) -> None:
    """`Captured` scales by D ** -0.5: whatever else is wanted goes into the queries."""
    rest = 1.0 if scaling is None else scaling * query.shape[-1] ** 0.5
    if abs(rest - 1) > 1e-6:
        query = query * rest
    if factor is not None:
        query = query * factor.to(query.dtype)
    inputs = {"query": query, "key": key, "value": value}
    attended.seen = {name: tensor.detach() for name, tensor in inputs.items()}
    attended.key_valid = valid


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


def _chosen_modules(
    model: PreTrainedModel, layers: Sequence[int] | None, kind: str, queries: slice
) -> dict[int, nn.Module]:
    """Layer -> its attention module, ready to be asked."""
    _checks.choice("kind", kind, KINDS)
    if not isinstance(queries, slice):
        raise TypeError(f"queries must be a slice, got {type(queries).__name__}")
    modules = _attention_modules(model, kind)
    chosen = list(range(len(modules)) if layers is None else layers)
    for layer in chosen:
        _checks.index("layers", layer, len(modules), f"number of {kind}")
        config: Any = getattr(modules[layer], "config", None)
        implementation = getattr(config, "_attn_implementation", None)
        if implementation is None:
            raise ValueError(
                "model must attend by transformers' registry of attention functions, "
                f"{type(modules[layer]).__name__} does not"
            )
        if implementation != IMPLEMENTATION:
            raise ValueError(
                f"model must attend with {IMPLEMENTATION!r}, got {implementation!r}: call "
                f"model.set_attn_implementation({IMPLEMENTATION!r})"
            )
        if hasattr(modules[layer], REQUEST):
            raise ValueError(f"model must not be asked twice at a time, layer {layer} is already")
    return {layer: modules[layer] for layer in chosen}


@contextmanager
def _asking(modules: dict[int, nn.Module], requests: dict[int, Any]) -> Iterator[None]:
    for layer, module in modules.items():
        setattr(module, REQUEST, requests[layer])
    try:
        yield
    finally:
        for module in modules.values():
            delattr(module, REQUEST)


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
    evaluation mode, output and map come from one pass (`attention_with_map`) where there is no mask
    or the host has seen that it tells padding alone; else SDPA gives the output and `attention_map`
    the map, through which gradients flow where they are enabled.

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
        ValueError: there is no such layer or kind, another attention implementation is set or the
            model heeds none (GIT, T5), or the layer is asked already; from the forward pass, where
            a mask is more than padding (causal, different from query to query, a bias): on a GPU,
            which is not waited for, and in compiled code such a map is NaN, and the output SDPA's.

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
    _checks.count("skip_keys", skip_keys)
    modules = _chosen_modules(model, layers, kind, queries)
    maps: dict[int, Tensor] = {}
    wanted = {layer: _MapWanted(maps, layer, queries, skip_keys) for layer in modules}
    with _asking(modules, wanted):
        yield maps


@contextmanager
def capture_attention(
    model: PreTrainedModel,
    layers: Sequence[int] | None = None,
    *,
    kind: str = "cross_attentions",
    queries: slice = slice(None),
) -> Iterator[Captured]:
    """Queries, keys and values of attention layers, for rules that need more than a mean map.

    Args:
        model: see `collect_maps`.
        layers: likewise.
        kind: likewise.
        queries: likewise.

    Yields:
        Captured: with `map` (of all layers together) and `sync_masks`; read it after the model has
        run. Tensors are detached and kept as long as this object is.

    Raises:
        ValueError: see `collect_maps`.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> from transformers import BertConfig, BertModel
        >>> from syncmask_kernels.integrations.transformers import capture_attention
        >>> config = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=2, is_decoder=True,
        ...                     num_attention_heads=2, intermediate_size=8, is_causal=False,
        ...                     add_cross_attention=True)
        >>> teacher = BertModel(config).eval()
        >>> teacher.set_attn_implementation("syncmask")
        >>> words, image = torch.randint(4, 50, (3, 6)), torch.randn(3, 17, 8)
        >>> with torch.no_grad(), capture_attention(teacher, [1]) as captured:
        ...     _ = teacher(words, encoder_hidden_states=image)
        >>> chosen = captured.sync_masks(smk.token_valid(words, [0]), weigh_by_value=True)
        >>> chosen.patch_mask.sum(dim=1)
        tensor([8, 8, 8])
    """
    modules = _chosen_modules(model, layers, kind, queries)
    taps = [Attended() for _ in modules]
    wanted = {layer: _InputsWanted(tap, queries) for layer, tap in zip(modules, taps, strict=True)}
    with _asking(modules, wanted):
        yield Captured(taps)
