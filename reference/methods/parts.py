"""Losses that several methods share.

- **ITC** within the batch, or against a queue of teacher features (`queue_size`) with a share of
  the teacher's own similarities in the targets (`distillation`), both as in ALBEF. Several images
  of an item share a text, so all pairs of an item are positives with equal shares of the target, as
  in FashionSAP.
- **ITM** against one wrong text per image and one wrong image per text of the batch, never of the
  same item.
- **MLM** with BERT's 80 % mask (`mlm_mask`), 10 % random word, 10 % unchanged, and with
  `distillation` the teacher's words for the same text as soft targets, as in ALBEF.
- **MIM** with L1 to pixels or features, or cross entropy to codes: see `reference.model.mim`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import syncmask_kernels as smk
from reference import ranks
from reference.config import PretrainConfig
from reference.step import Step


class Similarities(NamedTuple):
    """Logits ``[B, N]`` of a batch's images and texts, and of whose columns, without gradient."""

    image_to_text: Tensor
    text_to_image: Tensor
    item_ids: Tensor
    """``[N]``: of the columns"""
    own: Tensor
    """``[B]``: the column of each row's own pair"""


def contrast(step: Step[Any], image: Tensor, text: Tensor) -> tuple[Tensor, Similarities]:
    """ITC of encoded images and texts, and the similarities it looks at within the batch."""
    student, teacher, items = step.student, step.teacher, step.batch.item_ids
    image_feat, text_feat = student.image_features(image), student.text_features(text)
    step.features = image_feat.detach(), text_feat.detach()
    own = torch.arange(len(items), device=items.device)
    if student.queue is None and step.config.distillation == 0:
        i2t = image_feat @ ranks.of_all(text_feat).T / student.temperature
        t2i = text_feat @ ranks.of_all(image_feat).T / student.temperature
        columns, own = ranks.of_all(items), own + ranks.rank() * len(items)
        loss = (itc_loss(i2t, items, columns) + itc_loss(t2i, items, columns)) / 2
        return loss, Similarities(i2t.detach(), t2i.detach(), columns, own)
    with torch.no_grad():
        keys = teacher.image_features(step.teacher_image), teacher.text_features(step.teacher_text)
    empty = image_feat.new_empty(image_feat.shape[1], 0)
    queue = student.queue
    loss, image_to_text, text_to_image = smk.queue_contrastive_loss(
        *(image_feat, text_feat, *keys),
        *((empty, empty) if queue is None else (queue.images, queue.texts)),
        student.temperature,
        alpha=step.alpha,
        item_ids=items,
        queue_ids=None if queue is None else queue.item_ids,
    )
    if queue is not None:
        queue.enqueue_(*keys, items)
    return loss, Similarities(image_to_text.detach(), text_to_image.detach(), items, own)


def itc_loss(logits: Tensor, row_ids: Tensor, col_ids: Tensor) -> Tensor:
    """Contrast ``[B, N]`` one way; all pairs of an item are positives."""
    same = (row_ids[:, None] == col_ids).to(logits.dtype)
    return F.cross_entropy(logits, same / same.sum(dim=1, keepdim=True))


def choose_negatives(
    similarities: Similarities, item_ids: Tensor, config: PretrainConfig
) -> tuple[smk.Negatives, smk.Negatives]:
    """A wrong text for each image and a wrong image for each text, by similarity.

    Ids count columns of the similarities: of the batches of all ranks, in their order, or, where
    there is a queue or distillation, of this rank's batch, as in ALBEF.
    """
    semi_hard = config.negatives == "semi_hard"
    choose = partial(
        smk.sample_negatives,
        positive=similarities.own,
        row_ids=item_ids,
        col_ids=similarities.item_ids,
        mode=config.negatives,
        quantile=config.negative_quantile if semi_hard else None,
    )
    return choose(similarities.image_to_text), choose(similarities.text_to_image)


class Sides(NamedTuple):
    """What pairs are fused from: a text (states or ids), what of it is attended to, an image."""

    text: Tensor
    attended: Tensor
    image: Tensor


def itm_loss(
    head: nn.Module,
    fuse: Callable[[Tensor, Tensor, Tensor], Tensor],
    sides: Sides,
    wrong_text: smk.Negatives,
    wrong_image: smk.Negatives,
    columns: int,
) -> Tensor:
    """Tell pairs from an image with a wrong text and from a text with a wrong image.

    `fuse` gives the fused states of `sides`; where negatives are chosen among more `columns` than
    the batch has, they are those of all ranks.
    """
    text, attended, image = sides
    others = sides if columns == len(text) else Sides(*map(ranks.of_all, sides))
    fused = fuse(
        torch.cat([text, others.text[wrong_text.ids], text]),
        torch.cat([attended, others.attended[wrong_text.ids], attended]),
        torch.cat([image, image, others.image[wrong_image.ids]]),
    )
    found = torch.cat([wrong_text.found, wrong_image.found])
    labels = torch.cat([torch.ones_like(wrong_text.ids), found.long() - 1])
    loss = F.cross_entropy(head(fused[:, 0]), labels, ignore_index=-1)
    return ranks.share(loss, (labels >= 0).sum())


def word_head(model: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The transformed states, weight and bias whose product are the logits of the words."""
    return model.word_transform(hidden), model.word_embeddings, model.word_bias


def mlm_loss(
    step: Step[Any],
    read: Callable[[Any, Tensor, Tensor], Tensor],
    image: Tensor,
    masks: smk.SyncMask,
) -> Tensor:
    """Predict the masked words from the other words and the clean image ``[B, 1 + P, D]``.

    `read` gives a model's fused states of masked texts and an encoded image.
    """
    masked_ids, labels = smk.mask_tokens(
        step.batch.input_ids,
        masks.token_mask,
        mask_id=step.tokenizer.mask_token_id,
        vocab_size=len(step.tokenizer),
        special_ids=step.tokenizer.all_special_ids,
        probs=(step.config.mlm_mask, *[(1 - step.config.mlm_mask) / 2] * 2),
    )
    ids = masks.token_ids
    teacher = None
    if step.alpha > 0:
        with torch.no_grad():
            fused = read(step.teacher, masked_ids, step.teacher_image)
            teacher = word_head(step.teacher, smk.gather_masked(fused, ids))
    fused = read(step.student, masked_ids, image)
    hidden, weight, bias = word_head(step.student, smk.gather_masked(fused, ids))
    loss = smk.masked_linear_cross_entropy(
        hidden,
        weight,
        smk.gather_masked(labels, ids, fill=-100),
        bias=bias,
        teacher=teacher,
        alpha=step.alpha if teacher is not None else 0.0,
    )
    return ranks.share(loss, masks.token_mask.sum())


def mim_loss(
    step: Step[Any], see: Callable[[Any, Tensor], Tensor], patch_mask: Tensor, ids: Tensor
) -> Tensor:
    """Rebuild the patches of `patch_mask`, whose ids are `ids`, from the others and the clean text.

    `see` gives a model's fused states of encoded images with masked patches.
    """
    pixels = step.batch.pixels

    def rebuilt(model: Any) -> Tensor:
        fused = see(model, model.encode_image(pixels, patch_mask))
        return smk.gather_masked(fused[:, 1:], ids)

    hidden, head = rebuilt(step.student), step.student.mim_head
    if head.target == "codes":
        teacher = None
        if step.alpha > 0:
            with torch.no_grad():
                teacher_head = step.teacher.mim_head
                teacher = rebuilt(step.teacher), teacher_head.weight, teacher_head.bias
        return smk.masked_linear_cross_entropy(
            hidden,
            head.weight,
            smk.gather_masked(head.codes(pixels), ids, fill=-100),
            bias=head.bias,
            teacher=teacher,
            alpha=step.alpha if teacher is not None else 0.0,
        )
    if head.target == "features":
        features = F.layer_norm(step.teacher_image[:, 1:], hidden.shape[2:])
        return smk.masked_patch_loss(head(hidden), features, ids, kind="l1")
    return smk.masked_patch_loss(
        head(hidden),
        pixels,
        ids,
        kind="l1",
        patch_size=step.student.patch_size,
        norm_pix=head.target == "norm_pixels",
    )
