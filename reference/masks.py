"""Which words and patches a step masks: a reconstruction of SyncMask's rule.

The paper masks what image and text share: it sorts "cross-modal attention weights from the
teacher's multi-modal encoder" in descending order and masks the top. What it leaves open is decided
here, by runs on the drawn catalogue:

- **Words.** A row of the words' attention to patches sums to one whether or not the word can be
  seen, so attention weights say little about words. The default ``leave_one_out`` is what the
  caption loses without the word: how far its similarity to its image falls, by the features of ITC.
  Of a teacher trained with random masks it finds visible words best at every age (docs/study.md),
  for as many passes of the text encoder as there are words. ``image_effect`` takes one pass of the
  fusion: how far its image moves a word, one minus the cosine between the teacher's fused word with
  its image and with the mean image of the batch. (The abstract speaks of "cross-attentional
  features".) A row of the patches' attention to words says which word a patch chose:
  ``image_to_text`` is the most that any patch attends to a word, in the fusion encoder that
  rebuilds patches, ``image_to_text_cls`` what the image's CLS does; both also choose many words
  that name nothing. ``text_softmax``, ``dual`` and ``max`` are the operator's rules on the
  attention of one layer.
- **Patches.** The attention of the text's CLS to each patch, weighted by how far the patch's value
  lies from the mean value (``cls_value``, the default). Attention averaged over words (``mean``, or
  ``value`` with those weights) can rest on the background, and so can, in some runs, that of the
  CLS alone (``cls``, as AttMask does with an image's CLS).
- **Layer and heads.** One fusion layer, the last by default; heads are averaged.
- **Noise.** A teacher that moves slowly would choose the same words of a pair again and again:
  Gaussian noise, in units of the standard deviation of a pair's scores, varies the choice.
- **Start.** A young teacher attends to nothing in particular: the first steps mask at random.
- **Never masked:** CLS, SEP, padding and unknown words.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import syncmask_kernels as smk
from reference import ranks
from reference.batch import Batch
from reference.config import MaskConfig
from reference.model import SyncMaskModel
from reference.model.fusion import Captured
from reference.step import Step


@torch.no_grad()
def choose_masks(step: Step[SyncMaskModel]) -> smk.SyncMask:
    """The masks of a training step: random at first or by choice, else the teacher's with noise."""
    config = step.config
    if config.masks == "random" or step.index < config.random_mask_steps:
        return random_masks(step.batch, config.patches, config)
    image, text = step.teacher_image, step.teacher_text
    by_mean = config.word_score == "image_effect"
    mean = ranks.mean(image.mean(dim=0, keepdim=True)) if by_mean else None
    chosen = teacher_masks(step.teacher, step.batch, image, text, config, config.mask_noise, mean)
    if config.masks == "sync":
        return chosen
    drawn = random_masks(step.batch, config.patches, config)
    words, patches = (chosen, drawn) if config.masks == "words" else (drawn, chosen)
    return smk.SyncMask(
        *(patches.patch_mask, words.token_mask, patches.patch_ids, words.token_ids),
        *(patches.patch_scores, words.token_scores),
    )


@torch.no_grad()
def teacher_masks(
    teacher: SyncMaskModel,
    batch: Batch,
    image: Tensor,
    text: Tensor,
    config: MaskConfig,
    noise: float = 0.0,
    mean_image: Tensor | None = None,
) -> smk.SyncMask:
    """Choose words and patches by the teacher's view of the clean pairs.

    Args:
        teacher: momentum model, in evaluation mode.
        batch: clean pairs.
        image, text: their encodings by the teacher.
        config: rules and ratios.
        noise: standard deviation of the noise, in those of a row's scores. 0: deterministic.
        mean_image: ``[1, 1 + P, D]``, that of all ranks. Default: that of `image`.
    """
    captured = Captured.nothing()
    fused = teacher.fuse(text, batch.attended, image, captured)
    query, key, value = captured.cross_attention[config.mask_layer]
    own_scores = None
    if config.word_score == "image_effect":
        mean_image = image.mean(dim=0, keepdim=True) if mean_image is None else mean_image
        own_scores = image_effect(teacher, mean_image, text, batch.attended, fused)
    elif config.word_score == "leave_one_out":
        own_scores = leave_one_out(teacher, batch, image, text)
    elif config.word_score in ("image_to_text", "image_to_text_cls"):
        chosen_by = image_to_text(teacher, image, text, batch.attended)
        by_cls = config.word_score == "image_to_text_cls"
        own_scores = chosen_by[:, 0] if by_cls else chosen_by[:, 1:].amax(dim=1)
    masks = smk.sync_topk_mask_qk(
        query,
        key,
        batch.token_valid,
        v=value if config.patch_score.endswith("value") else None,
        patch_score="cls" if config.patch_score.startswith("cls") else "mean",
        token_score="max" if own_scores is not None else config.word_score,
        token_scores=own_scores,
        patch_ratio=config.patch_ratio,
        token_ratio=config.token_ratio,
        word_ids=batch.word_ids,
    )
    if noise == 0:
        return masks
    return _select(
        batch,
        config,
        masks.patch_scores,
        masks.token_scores,
        noise * _noise(masks.patch_scores),
        noise * _noise(masks.token_scores, batch.token_valid),
    )


def random_masks(batch: Batch, patches: int, config: MaskConfig) -> smk.SyncMask:
    """Choose as many words and patches as `teacher_masks` does, uniformly at random."""
    patch_scores = torch.rand(len(batch.pixels), patches, device=batch.pixels.device)
    token_scores = torch.rand(batch.input_ids.shape, device=batch.pixels.device)
    return _select(batch, config, patch_scores, token_scores)


def random_like(masks: smk.SyncMask, token_valid: Tensor) -> tuple[Tensor, Tensor]:
    """Random patch and token masks that hide as many patches and words of each pair."""

    def drawn(mask: Tensor, valid: Tensor | None) -> Tensor:
        scores = torch.rand(mask.shape, device=mask.device)
        return smk.topk_mask(scores, k=mask.sum(dim=1), width=0, valid=valid).mask

    return drawn(masks.patch_mask, None), drawn(masks.token_mask, token_valid)


def _select(
    batch: Batch,
    config: MaskConfig,
    patch_scores: Tensor,
    token_scores: Tensor,
    patch_noise: Tensor | None = None,
    token_noise: Tensor | None = None,
) -> smk.SyncMask:
    """Select by scores that are already known; their attention is not read."""
    rows, patches = patch_scores.shape
    attn = patch_scores.new_zeros(()).expand(rows, 1, token_scores.shape[1], 1 + patches)
    return smk.sync_topk_mask(
        attn,
        batch.token_valid,
        patch_ratio=config.patch_ratio,
        token_ratio=config.token_ratio,
        word_ids=batch.word_ids,
        patch_scores=patch_scores,
        token_scores=token_scores,
        patch_noise=patch_noise,
        token_noise=token_noise,
    )


def image_effect(
    teacher: SyncMaskModel, mean_image: Tensor, text: Tensor, attended: Tensor, fused: Tensor
) -> Tensor:
    """``[B, T]``: one minus the cosine between each word fused with its image, and with the mean.

    The mean over the batch ``[1, 1 + P, D]`` stands for no image in particular; without
    cross-attention the layers would see inputs they were never trained on.
    """
    nondescript = mean_image.expand(len(text), -1, -1)
    return 1 - F.cosine_similarity(fused, teacher.fuse(text, attended, nondescript), dim=-1)


def leave_one_out(teacher: SyncMaskModel, batch: Batch, image: Tensor, text: Tensor) -> Tensor:
    """``[B, T]``: how much less a caption is like its image, by ITC's features, without each word.

    As many passes of the text encoder as a caption has words; the host waits for their number.
    """
    scores = torch.zeros(batch.input_ids.shape, device=text.device)
    rows, places = batch.token_valid.nonzero(as_tuple=True)
    if len(rows) == 0:  # BERT takes no empty batch
        return scores
    words = batch.word_ids[rows]
    attended = batch.attended[rows] & (words != batch.word_ids[rows, places].unsqueeze(1))
    without = teacher.encode_text(batch.input_ids[rows], attended)
    with torch.autocast(text.device.type, enabled=False):  # features that differ by little
        lost = teacher.text_features(text)[rows].float() - teacher.text_features(without)
        scores[rows, places] = (lost * teacher.image_features(image)[rows]).sum(dim=1)
    return scores


def image_to_text(teacher: SyncMaskModel, image: Tensor, text: Tensor, attended: Tensor) -> Tensor:
    """``[B, 1 + P, T]``: how much each patch attends to each word, in the fusion that rebuilds
    patches: its last layer's mean over heads.
    """
    captured = Captured.nothing()
    teacher.image_fusion(image, None, text, attended, captured=captured)
    query, key, _ = captured.cross_attention[-1]
    return smk.attention_map(query, key, key_valid=attended, skip_keys=0)


def _noise(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Gaussian noise as wide as the spread of each row's valid scores."""
    counted = torch.ones_like(scores) if valid is None else valid.to(scores.dtype)
    count = counted.sum(dim=1, keepdim=True).clamp(min=1)
    mean = (scores * counted).sum(dim=1, keepdim=True) / count
    variance = ((scores - mean).square() * counted).sum(dim=1, keepdim=True) / count
    return variance.sqrt() * torch.randn_like(scores)
