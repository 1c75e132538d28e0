"""The five losses of SIMLA: ITC + ITM + MLM + MIM + keywords, equally weighted.

As in the paper and its code: words are masked at random, patches in random blocks, never both at
once, and both are predicted by one stack of layers; the teacher's heads vote for the words of a
caption that its CLS looks at most, and the image alone must tell them. Decided here:

- **Soft targets** of all but ITM come from the teacher with the share `distillation`.
- **Distillation of words** is over the vocabulary; SIMLA's code normalises over the positions.
- **Keywords** are never CLS, SEP or padding; the code leaves out CLS only.
- **The teacher's view** for keywords is wholly the teacher's; in the code its words look at the
  student's image.
- **ITM's negatives** are drawn as `negatives` says (the paper: ``multinomial``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import syncmask_kernels as smk
from reference.batch import Batch
from reference.config import PretrainConfig
from reference.masks import random_masks
from reference.methods.parts import Sides, choose_negatives, contrast, itm_loss, mim_loss, mlm_loss
from reference.model import SimlaModel
from reference.model.fusion import Captured
from reference.step import Step

BLOCKS = 12
SMALLEST_BLOCK = 1 / 16
"""BEiT's least block is 16 of 196 patches; here a share, for any grid."""


def losses(step: Step[SimlaModel]) -> dict[str, Tensor]:
    """Losses of a step: ``{"itc", "itm", "mlm", "mim", "keywords"}``, scalars."""
    model, batch = step.student, step.batch
    image = model.encode_image(batch.pixels)
    text = model.encode_text(batch.input_ids, batch.attended)
    itc, similarities = contrast(step, image, text)
    masks = step_masks(batch, step.config)

    def read(reader: SimlaModel, masked_ids: Tensor, seen: Tensor) -> Tensor:
        return reader.read(masked_ids, batch.attended, seen)

    def see(viewer: SimlaModel, masked: Tensor) -> Tensor:
        return viewer.see(masked, batch.input_ids, batch.attended)

    sides = Sides(batch.input_ids, batch.attended, image)
    wrong = choose_negatives(similarities, batch.item_ids, step.config)
    return {
        "itc": itc,
        "itm": itm_loss(model.itm_head, model.read, sides, *wrong, len(similarities.item_ids)),
        "mlm": mlm_loss(step, read, image, masks),
        "mim": mim_loss(step, see, masks.patch_mask, masks.patch_ids),
        "keywords": keyword_loss(step, image),
    }


def step_masks(batch: Batch, config: PretrainConfig) -> smk.SyncMask:
    """Words at random and patches in random blocks."""
    masks = random_masks(batch, config.patches, config)
    scores = block_scores(len(batch.pixels), config.image_size // config.patch_size, batch.pixels)
    blocks = smk.topk_mask(scores, ratio=config.patch_ratio)
    return masks._replace(patch_mask=blocks.mask, patch_ids=blocks.ids, patch_scores=scores)


def block_scores(rows: int, grid: int, like: Tensor) -> Tensor:
    """Scores ``[rows, grid * grid]`` whose largest fill one random rectangle after the other.

    Rectangles are BEiT's: an aspect of 0.3 to 1 / 0.3, of random size and place.
    """

    def drawn(low: float, high: float) -> Tensor:
        return torch.empty(rows, BLOCKS, 1, device=like.device).uniform_(low, high)

    area, aspect = drawn(SMALLEST_BLOCK, 1 / 3) * grid**2, drawn(-1.2, 1.2).exp()
    centres = torch.arange(grid, device=like.device) + 0.5

    def covered(length: Tensor) -> Tensor:
        length = length.clamp(max=grid)
        start = drawn(0, 1) * (grid - length)
        return (centres >= start) & (centres < start + length)

    tall, wide = covered((area * aspect).sqrt()), covered((area / aspect).sqrt())
    inside = (tall.unsqueeze(3) & wide.unsqueeze(2)).flatten(2)
    turn = torch.arange(BLOCKS, 0, -1, device=like.device).unsqueeze(1)
    return (inside * turn).amax(dim=1) + 0.5 * torch.rand(rows, grid**2, device=like.device)


@torch.no_grad()
def keywords(
    teacher: SimlaModel, batch: Batch, image: Tensor, config: PretrainConfig
) -> tuple[Tensor, Tensor]:
    """Positions ``[B, keywords]`` (-1: none) that the heads vote for, and the votes' mean row.

    The row is the last layer's self-attention of the CLS, which has looked at the image.
    """
    captured = Captured.nothing()
    teacher.read(batch.input_ids, batch.attended, image, captured)
    query, key, _ = captured.self_attention[-1]
    logits = query[:, :, 0].unsqueeze(2) @ key.transpose(2, 3) * query.shape[3] ** -0.5
    row = logits.squeeze(2).masked_fill(~batch.attended.unsqueeze(1), -torch.inf).softmax(dim=2)
    ids = smk.vote_keywords(
        row, votes=config.keyword_votes, keep=config.keywords, valid=batch.token_valid
    )
    return ids, row.mean(dim=1)


def keyword_loss(step: Step[SimlaModel], image: Tensor) -> Tensor:
    """Tell the pseudo-labelled keywords from the image's contrastive feature alone."""
    batch, teacher = step.batch, step.teacher
    logits = step.student.keyword_head(step.student.image_features(image))
    ids, _ = keywords(teacher, batch, step.teacher_image, step.config)
    with torch.no_grad():
        words = smk.gather_masked(batch.input_ids, ids)
        voted = (ids >= 0).to(logits.dtype)
        targets = torch.zeros_like(logits).scatter_add(1, words, voted).clamp(max=1)
        told = teacher.keyword_head(teacher.image_features(step.teacher_image)).sigmoid()
        targets = (1 - step.alpha) * targets + step.alpha * told
    return F.binary_cross_entropy_with_logits(logits, targets)


@torch.no_grad()
def shown_masks(
    model: SimlaModel, batch: Batch, image: Tensor, text: Tensor, config: PretrainConfig
) -> smk.SyncMask:
    """The keywords, with the attention they were chosen by, and a draw of blocks."""
    ids, row = keywords(model, batch, image, config)
    rows, blocks = torch.arange(len(ids), device=ids.device), step_masks(batch, config)
    chosen = torch.zeros(len(ids), 1 + row.shape[1], dtype=torch.bool, device=ids.device)
    chosen[rows.unsqueeze(1), ids + 1] = True
    return blocks._replace(token_mask=chosen[:, 1:], token_ids=ids, token_scores=row)
