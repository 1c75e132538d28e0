"""The parts of ALBEF's pretraining step, each to be called by hand.

`model` is the host's: a module with the submodules, buffers and attributes that are named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from syncmask_kernels import _checks
from syncmask_kernels.integrations.bert_attention import Captured, capture_attention
from syncmask_kernels.integrations.mlm import masked_lm_loss
from syncmask_kernels.masking import mask_tokens, token_valid
from syncmask_kernels.momentum import ema_update_
from syncmask_kernels.negatives import Negatives, sample_negatives
from syncmask_kernels.queue_losses import enqueue_, queue_contrastive_loss
from syncmask_kernels.selection import SyncMask

IGNORED = -100
TEMPERATURES = 0.001, 0.5  # the host clamps its temperature to these
ENCODERS = ("visual_encoder", "vision_proj", "text_encoder", "text_proj")  # teacher's: with "_m"


class Encoded(NamedTuple):
    """``image [B, 1 + P, D]`` and ``text [B, T, D]`` as encoded, and their features ``[B, E]``."""

    image: Tensor
    text: Tensor
    image_feat: Tensor
    text_feat: Tensor


class HardNegatives(NamedTuple):
    """The wrong text for each image of the batch, and the wrong image for each text."""

    texts: Negatives
    images: Negatives


class MaskedWords(NamedTuple):
    """``input_ids`` and ``labels`` ``[B, T]``, and ``ids [B, K]`` of the labels where known."""

    input_ids: Tensor
    labels: Tensor
    ids: Tensor | None = None


def encode(model: Any, image: Tensor, text: Any, *, momentum: bool = False) -> Encoded:
    """Image and text by the student, or by the momentum model.

    Args:
        model: ALBEF.
        image: ``[B, 3, H, W]``.
        text: with `input_ids` and `attention_mask` ``[B, T]``, as the tokenizer returns it.
        momentum: default False. True does not record gradients.
    """
    parts = [getattr(model, f"{name}_m" if momentum else name) for name in ENCODERS]
    visual_encoder, vision_proj, text_encoder, text_proj = parts
    with torch.set_grad_enabled(torch.is_grad_enabled() and not momentum):
        seen = visual_encoder(image)
        read = text_encoder.bert(
            text.input_ids, attention_mask=text.attention_mask, return_dict=True, mode="text"
        ).last_hidden_state
        image_feat = F.normalize(vision_proj(seen[:, 0]), dim=-1)
        text_feat = F.normalize(text_proj(read[:, 0]), dim=-1)
    return Encoded(seen, read, image_feat, text_feat)


def update_teacher_(model: Any) -> None:
    """The body of `_momentum_update`: all of ``model.model_pairs``, (student, teacher), in place.

    Args:
        model: with `model_pairs` and `momentum`.
    """
    students, teachers = (
        [parameter for pair in model.model_pairs for parameter in pair[side].parameters()]
        for side in (0, 1)
    )
    ema_update_(teachers, students, model.momentum)


def contrast(
    model: Any,
    student: Encoded,
    teacher: Encoded,
    alpha: float | Tensor,
    *,
    item_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """ITC with the queues of `model` as they lie -> the loss, and both in-batch similarities.

    `enqueue_keys_` may follow at once: the backward pass does not read the queues.

    Args:
        model: with `image_queue`, `text_queue` and `temp`; with ids also `idx_queue` ``[1, Q]``.
        student: of this batch.
        teacher: likewise.
        alpha: weight of the teacher's softmax.
        item_ids: ``[B]`` int64: pairs of one id are positives of each other. Default: each alone.
    """
    return queue_contrastive_loss(
        student.image_feat,
        student.text_feat,
        teacher.image_feat,
        teacher.text_feat,
        model.image_queue,
        model.text_queue,
        model.temp,
        alpha=alpha,
        item_ids=item_ids,
        queue_ids=None if item_ids is None else model.idx_queue[0],
    )


def enqueue_keys_(
    model: Any, image_feat: Tensor, text_feat: Tensor, item_ids: Tensor | None = None
) -> None:
    """The body of `_dequeue_and_enqueue`: of all ranks where there are any, any batch size.

    Args:
        model: with `image_queue`, `text_queue` and `queue_ptr`; with ids also `idx_queue`.
        image_feat: ``[B, E]`` of the momentum model.
        text_feat: ``[B, E]`` likewise.
        item_ids: ``[B]`` int64, where the host keeps ids beside its keys.

    Raises:
        ValueError: the model has an `idx_queue`, and no ids came: it would tell those of old keys.
    """
    if item_ids is None and hasattr(model, "idx_queue"):
        raise ValueError("item_ids must be given for a model with an idx_queue, got None")
    queue_ids = None if item_ids is None else model.idx_queue[0]
    enqueue_(model.image_queue, model.queue_ptr.clone(), image_feat)
    enqueue_(model.text_queue, model.queue_ptr, text_feat, item_ids, queue_ids)


def hard_negatives(
    sim_i2t: Tensor, sim_t2i: Tensor, *, item_ids: Tensor | None = None, **options: Any
) -> HardNegatives:
    """A wrong text for each image and a wrong image for each text, without a loop.

    Args:
        sim_i2t: ``[B, B]`` similarities of images with texts, divided by the temperature; not
            softmaxed.
        sim_t2i: ``[B, B]`` of texts with images.
        item_ids: ``[B]`` int64: pairs of one item (views of a product, captions of an image) are no
            negatives of each other. Default: only the pair itself is excluded.
        options: of `sample_negatives`: `mode`, `generator`, ...

    Returns:
        HardNegatives: where a row has no candidate, `found` is False and the id 0.

    Example:
        >>> import torch
        >>> from syncmask_kernels.integrations import albef
        >>> sim = torch.tensor([[9.0, 2.0, 5.0], [4.0, 9.0, 1.0], [1.0, 3.0, 9.0]])
        >>> wrong = albef.hard_negatives(sim, sim.T, mode="hardest")
        >>> wrong.texts.ids, wrong.images.ids
        (tensor([2, 0, 1]), tensor([1, 2, 0]))
    """
    texts, images = (
        sample_negatives(sim, row_ids=item_ids, col_ids=item_ids, **options)
        for sim in (sim_i2t, sim_t2i)
    )
    return HardNegatives(texts, images)


def _fused(bert: Any, attention_mask: Tensor, image: Tensor, **given: Any) -> Tensor:
    hidden: Tensor = bert(
        attention_mask=attention_mask, encoder_hidden_states=image, return_dict=True, **given
    ).last_hidden_state
    return hidden


def fused_matching_loss(
    fuse: Callable[[Tensor, Tensor, Tensor], Tensor],
    itm_head: nn.Module,
    encoded: Encoded,
    attention_mask: Tensor,
    negatives: HardNegatives,
    right: Tensor | None = None,
) -> Tensor:
    """`matching_loss` of any model.

    Args:
        fuse: of texts ``[N, T, D]``, their attention mask and as many images, to ``[N, T, D]``.
        itm_head: of the first of these T to two logits.
        encoded: see `matching_loss`, as for what follows.
        attention_mask: ``[B, T]``.
        negatives: as `hard_negatives` finds them.
        right: ``[B, T, D]``.
    """
    image, text, (texts, images) = encoded.image, encoded.text, negatives
    if right is None:
        right = fuse(text, attention_mask, image)
    wrong = fuse(
        torch.cat([text, text.index_select(0, texts.ids)]),
        torch.cat([attention_mask, attention_mask.index_select(0, texts.ids)]),
        torch.cat([image.index_select(0, images.ids), image]),
    )
    logits = itm_head(torch.cat([right[:, 0], wrong[:, 0]]))
    missing = torch.where(torch.cat([images.found, texts.found]), 0, IGNORED)
    labels = torch.cat([missing.new_ones(text.shape[0]), missing])
    return F.cross_entropy(logits, labels, ignore_index=IGNORED)


def matching_loss(
    model: Any,
    encoded: Encoded,
    attention_mask: Tensor,
    negatives: HardNegatives,
    *,
    right: Tensor | None = None,
) -> Tensor:
    """ITM: pairs against each text with a wrong image and each image with a wrong text.

    Args:
        model: with `text_encoder` (or its `bert`), which knows ``mode="fusion"``, and `itm_head`.
        encoded: of the student.
        attention_mask: ``[B, T]``.
        negatives: as `hard_negatives` finds them. What was not found is not counted.
        right: ``[B, T, D]`` the pairs of the batch, where they are fused already.
    """
    bert = getattr(model.text_encoder, "bert", model.text_encoder)

    def fuse(text: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        return _fused(bert, mask, image, encoder_embeds=text, mode="fusion")

    return fused_matching_loss(fuse, model.itm_head, encoded, attention_mask, negatives, right)


def cross_attention(bert: Any, layers: Sequence[int] | None = None) -> list[nn.Module]:
    """The cross-attention modules of some layers, for `capture_attention`.

    Args:
        bert: `BertModel` of the family: ``model.text_encoder_m.bert``.
        layers: their indices, counted from the first layer of the encoder; -1 is the last. Default:
            the last. ALBEF looks at layer 8 for Grad-CAM.

    Raises:
        ValueError: a layer does not exist, or has no cross-attention.
    """
    stack = bert.encoder.layer
    crossing = [i for i, layer in enumerate(stack) if hasattr(layer, "crossattention")]
    chosen = [-1] if layers is None else list(layers)
    for i in chosen:
        _checks.integer("layers", i)
        if not -len(stack) <= i < len(stack) or i % len(stack) not in crossing:
            raise ValueError(
                f"layers must be among those with cross-attention, {crossing}, got {i}"
            )
    return [stack[i].crossattention.self for i in chosen]


@torch.no_grad()
def teacher_attention(
    bert: Any,
    text_embeds: Tensor,
    attention_mask: Tensor,
    image_embeds: Tensor,
    layers: Sequence[int] | None = None,
) -> Captured:
    """Cross-attention of the clean pair, from one more pass through the first fusion layers.

    It ends at the last of the layers wanted. (The pass that the host makes for distillation sees
    text that is masked already.)

    Args:
        bert: of the momentum model, ``model.text_encoder_m.bert``, in the mode it is in: in
            training mode its dropout is active, as it is for the host's other targets.
        text_embeds: ``[B, T, D]`` of the momentum model, clean.
        attention_mask: ``[B, T]``.
        image_embeds: ``[B, 1 + P, D]`` of the momentum model.
        layers: see `cross_attention`.

    Returns:
        Captured: with `map` and `sync_masks`.
    """
    with capture_attention(cross_attention(bert, layers), stop=True) as captured:
        _fused(bert, attention_mask, image_embeds, encoder_embeds=text_embeds, mode="fusion")
    return captured


def _special_ids(tokenizer: Any) -> list[int]:
    return [tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id]


def sync_masks(
    model: Any,
    teacher: Encoded,
    text: Any,
    *,
    layers: Sequence[int] | None = None,
    **options: Any,
) -> SyncMask:
    """The words and patches of a clean pair that the teacher relates to each other.

    Args:
        model: ALBEF; used are `text_encoder_m` and `tokenizer`.
        teacher: ``encode(model, image, text, momentum=True)``.
        text: with `input_ids` and `attention_mask`. Padding, CLS and SEP are never chosen.
        layers: see `cross_attention`.
        options: `weigh_by_value`, and those of `sync_topk_mask_qk`.
    """
    valid = token_valid(text.input_ids, _special_ids(model.tokenizer))
    bert = model.text_encoder_m.bert
    attention = teacher_attention(bert, teacher.text, text.attention_mask, teacher.image, layers)
    return attention.sync_masks(valid, **options)


def _masked(model: Any, input_ids: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
    return mask_tokens(
        input_ids,
        token_mask,
        mask_id=model.tokenizer.mask_token_id,
        vocab_size=model.text_encoder.config.vocab_size,
        special_ids=_special_ids(model.tokenizer),
    )


def sync_words(model: Any, text: Any, masks: SyncMask) -> MaskedWords:
    """The words of `masks` masked, with 80, 10 and 10 % of them replaced, random and kept."""
    return MaskedWords(*_masked(model, text.input_ids, masks.token_mask), masks.token_ids)


def random_words(model: Any, text: Any) -> MaskedWords:
    """Words masked as in the host, each but padding and CLS with `model.mlm_probability`."""
    input_ids, tokenizer = text.input_ids, model.tokenizer
    drawn = torch.rand(input_ids.shape, device=input_ids.device) < model.mlm_probability
    drawn &= token_valid(input_ids, [tokenizer.pad_token_id, tokenizer.cls_token_id])
    return MaskedWords(*_masked(model, input_ids, drawn))


def mlm_loss(
    model: Any,
    words: MaskedWords,
    attention_mask: Tensor,
    image: Tensor,
    image_m: Tensor,
    alpha: float | Tensor,
) -> Tensor:
    """MLM beside the clean image, with momentum distillation; the head sees masked words alone.

    Args:
        model: with `text_encoder` and `text_encoder_m`.
        words: their labels are -100 where there is nothing to predict.
        attention_mask: ``[B, T]``.
        image: ``[B, 1 + P, D]`` of the student.
        image_m: of the momentum model.
        alpha: weight of the momentum model; for the float 0 it does not run.
    """
    teacher = None
    if isinstance(alpha, Tensor) or alpha > 0:
        with torch.no_grad():
            encoder_m = model.text_encoder_m
            hidden_m = _fused(encoder_m.bert, attention_mask, image_m, input_ids=words.input_ids)
            teacher = encoder_m.cls.predictions, hidden_m
    encoder = model.text_encoder
    return masked_lm_loss(
        encoder.cls.predictions,
        _fused(encoder.bert, attention_mask, image, input_ids=words.input_ids),
        words.labels,
        ids=words.ids,
        teacher=teacher,
        alpha=alpha,
    )
