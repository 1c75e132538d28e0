"""ALBEF of TorchMultimodal (facebookresearch/multimodal): its retrieval step with these operators.

`patch` gives one `ALBEFModelForRetrieval` a training step of our own on the host's submodules,
queues and parameters; the functions that it is made of can be called by hand in a step that
differs. Names of modules and buffers are the host's; see docs/integrations/torchmultimodal.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from syncmask_kernels import _checks
from syncmask_kernels.backends.overloads.negatives import MODES
from syncmask_kernels.integrations.albef import (
    Encoded,
    HardNegatives,
    contrast,
    enqueue_keys_,
    fused_matching_loss,
    hard_negatives,
)
from syncmask_kernels.integrations.bert_attention import Attended, Captured, masked_keys
from syncmask_kernels.integrations.checking import check_host
from syncmask_kernels.integrations.replacing import Patched, Replacement, install, unpatch
from syncmask_kernels.momentum import ema_update_

__all__ = [
    "Encoded",
    "HardNegatives",
    "Patched",
    "capture_attention",
    "contrast",
    "encode",
    "enqueue_keys_",
    "hard_negatives",
    "matching_loss",
    "patch",
    "teacher_attention",
    "unpatch",
    "update_teacher_",
]

_ENCODERS = ("vision_encoder", "text_encoder", "multimodal_encoder")
_PROJECTIONS = ("vision_proj", "text_proj")
_BUFFERS = ("image_queue", "text_queue", "idx_queue", "queue_ptr")
_LEARNING = (*(f"albef_model.{name}" for name in _ENCODERS), *_PROJECTIONS)
_INNER = (*_LEARNING, *(f"{name}_m" for name in _LEARNING), *_BUFFERS, "temp")


def encode(
    model: Any, image: Tensor, text: Tensor, text_atts: Tensor, *, momentum: bool = False
) -> Encoded:
    """Image and text by the student, or by the momentum model.

    Args:
        model: `ALBEFModelWithSimilarity`.
        image: ``[B, 3, H, W]``.
        text: ``[B, T]`` ids.
        text_atts: ``[B, T]``, 0 at padding.
        momentum: default False. True does not record gradients.
    """
    suffix = "_m" if momentum else ""
    with torch.set_grad_enabled(torch.is_grad_enabled() and not momentum):
        seen = getattr(model.albef_model, f"vision_encoder{suffix}")(image)
        encoder = getattr(model.albef_model, f"text_encoder{suffix}")
        read = encoder(text, text_atts).last_hidden_state
        image_feat, text_feat = (
            F.normalize(getattr(model, f"{name}{suffix}")(hidden[:, 0]), dim=-1)
            for name, hidden in zip(_PROJECTIONS, (seen, read), strict=True)
        )
    return Encoded(seen, read, image_feat, text_feat)


def update_teacher_(model: Any) -> None:
    """Every `momentum_update` of a step, in place and at once.

    Args:
        model: `ALBEFModelWithSimilarity`.
    """
    named = [(model.albef_model, name) for name in _ENCODERS]
    named += [(model, name) for name in _PROJECTIONS]
    students, teachers = (
        [p for owner, name in named for p in getattr(owner, name + suffix).parameters()]
        for suffix in ("", "_m")
    )
    ema_update_(teachers, students, model.albef_model.momentum)


def matching_loss(
    model: Any, encoded: Encoded, text_atts: Tensor, negatives: HardNegatives
) -> Tensor:
    """ITM: pairs against each text with a wrong image and each image with a wrong text.

    Args:
        model: `ALBEFModelForRetrieval`.
        encoded: of the student.
        text_atts: ``[B, T]``.
        negatives: as `hard_negatives` finds them. What was not found is not counted.
    """
    fuse = model.model_with_similarity.albef_model.multimodal_encoder
    return fused_matching_loss(fuse, model.itm_head, encoded, text_atts, negatives)


def _seeing(attended: Attended) -> Any:
    """A hook that keeps what an attention was handed: q, k, v by head, and a mask of keys."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        mask = given.get("attention_mask")
        names = {"query": "q", "key": "k", "value": "v"}
        attended.seen = {name: given[short].detach() for name, short in names.items()}
        attended.key_valid = None if mask is None else masked_keys(mask) != 0

    return hook


@contextmanager
def capture_attention(
    encoder: nn.Module, layers: Sequence[int] | None = None
) -> Iterator[Captured]:
    """Cross-attention of chosen layers, before dropout, while the block runs.

    Args:
        encoder: `ALBEFMultimodalEncoder`: ``albef_model.multimodal_encoder_m``.
        layers: their indices; -1 is the last. Default: the last.

    Yields:
        Captured: with `map` and `sync_masks`; read it after the encoder has run. The hooks end with
        the block.

    Raises:
        TypeError: `encoder` has no layers with `cross_attention.attn`.
        ValueError: there is no such layer; or, as it runs, its mask is not one of keys alone.
    """
    stack = getattr(encoder, "layer", ())
    if not all(hasattr(getattr(layer, "cross_attention", None), "attn") for layer in stack):
        stack = ()
    if len(stack) == 0:
        raise TypeError(
            "encoder must be ALBEFMultimodalEncoder: "
            f"{type(encoder).__name__} has no layer[i].cross_attention.attn"
        )
    chosen = [-1] if layers is None else list(layers)
    for i in chosen:
        _checks.integer("layers", i)
        if not -len(stack) <= i < len(stack):
            raise ValueError(f"layers must be in [{-len(stack)}, {len(stack)}), got {i}")
    taps = [Attended() for _ in chosen]
    with ExitStack() as hooks:
        for i, tap in zip(chosen, taps, strict=True):
            attention = stack[i].cross_attention.attn
            handle = attention.register_forward_pre_hook(_seeing(tap), with_kwargs=True)
            hooks.callback(handle.remove)
        yield Captured(taps)


@torch.no_grad()
def teacher_attention(
    model: Any, teacher: Encoded, text_atts: Tensor, layers: Sequence[int] | None = None
) -> Captured:
    """Cross-attention of the momentum model, from a pass of its multimodal encoder.

    Args:
        model: `ALBEFModelWithSimilarity`.
        teacher: ``encode(..., momentum=True)``.
        text_atts: ``[B, T]``.
        layers: see `capture_attention`.
    """
    encoder = model.albef_model.multimodal_encoder_m
    with capture_attention(encoder, layers) as captured:
        encoder(teacher.text, text_atts, teacher.image)
    return captured


class _TrainForward(Replacement):
    """One training step -> the sum of the losses, as the host returns it."""

    def __init__(self, model: nn.Module, negatives: str, same_item: bool) -> None:
        super().__init__(model)
        self.negatives, self.same_item = negatives, same_item

    def __str__(self) -> str:
        among = "any other pair" if self.same_item else "pairs of other items"
        return (
            f"EMA in place; ITC that copies no queue; {self.negatives} negatives among {among}, "
            "without a loop; no momentum pass of the multimodal encoder, which nothing reads"
        )

    def __call__(
        self,
        image: Tensor,
        text: Tensor,
        text_atts: Tensor,
        idx: Tensor,
        alpha: float | Tensor,
        *,
        negatives: HardNegatives | None = None,
    ) -> Tensor:
        model, item_ids = self.module.model_with_similarity, idx.reshape(-1)
        student = encode(model, image, text, text_atts)
        update_teacher_(model)
        teacher = encode(model, image, text, text_atts, momentum=True)
        itc, *sims = contrast(model, student, teacher, alpha, item_ids=item_ids)
        enqueue_keys_(model, teacher.image_feat, teacher.text_feat, item_ids)
        if negatives is None:
            ids = None if self.same_item else item_ids
            negatives = hard_negatives(*sims, item_ids=ids, mode=self.negatives)
        return itc + matching_loss(self.module, student, text_atts, negatives)


def patch(model: nn.Module, *, negatives: str = "multinomial", same_item: bool = True) -> Patched:
    """Let one ALBEF for retrieval train with these operators. `unpatch` undoes it.

    Replaced, on this instance alone, is `_train_forward`; ``model(image, text, text_atts, idx,
    alpha)`` returns the loss as before. Modules, parameters, buffers, hooks and the state dict are
    untouched, so checkpoints go either way; evaluation is the host's.

    Args:
        model: `ALBEFModelForRetrieval` of `examples/albef/model.py`, not wrapped.
        negatives: mode of `sample_negatives`, of default margin.
        same_item: True (default, the host's rule) lets another pair of the same `idx`, another
            caption of one image, be a negative; False leaves them out.

    Returns:
        Patched: says what was replaced when it is printed; its `unpatch()` puts it back.

    Raises:
        TypeError: `model` is not what it should be; the message names what it lacks or has besides.
        ValueError: `model` is patched already, or an option does not fit. Nothing is replaced then.

    Losses, gradients, queues and both models are those of the host, within rounding, but: a row
    without negatives is not counted (there an error, as where all other similarities underflow).
    The queue may have any size, the host's is a multiple of the batch.
    """
    check_host(
        model,
        "ALBEFModelForRetrieval of TorchMultimodal",
        [f"model_with_similarity.{name}" for name in (*_INNER, "albef_model.momentum")],
        _TrainForward,
        "_train_forward",
        modules=["model_with_similarity", "itm_head", "itc_loss"],
        parameters=[],
        buffers=[],
    )
    if type(model.itc_loss).__name__ != "ImageTextContrastiveLoss":
        raise TypeError(
            "model.itc_loss must be ImageTextContrastiveLoss, which is what is replaced, got "
            f"{type(model.itc_loss).__name__}"
        )
    _checks.choice("negatives", negatives, MODES)
    return install(model, {"_train_forward": _TrainForward(model, negatives, same_item)})
