"""The three losses of SyCoCa: ITC + 2 captioning + text-guided masked image modelling.

As in the paper: a patch counts by its largest similarity with a word (its equation 7), half of the
patches, the most similar ones, is rebuilt from the text, and the caption is told with the other
half, the least similar ones, hidden. Decided here, where the paper is silent:

- **Similarities** are those of unit features, patches and words projected as the CLS are, of the
  clean pair, without gradient; CLS, SEP and padding are no words.
- **Hidden patches** are replaced by a mask token in the input of the image encoder, which thus runs
  three times, as the paper's figure has it.
- **L_TM** is the mean over hidden patches of the mean absolute difference of their pixels.
- **Words** are predicted up to and with SEP, which says that the caption ends.
"""

from __future__ import annotations

import torch
from torch import Tensor

import syncmask_kernels as smk
from reference import ranks
from reference.batch import Batch
from reference.config import PretrainConfig
from reference.methods.parts import contrast, mim_loss, word_head
from reference.model import SyCoCaModel
from reference.model.sycoca import last_word_first
from reference.step import Step


def losses(step: Step[SyCoCaModel]) -> dict[str, Tensor]:
    """Losses of a step: ``{"itc", "caption", "mim"}``, scalars that are already weighted."""
    model, batch, config = step.student, step.batch, step.config
    image = model.encode_image(batch.pixels)
    words = model.read(batch.input_ids, batch.attended)
    text = last_word_first(words, batch.attended)
    itc, _ = contrast(step, image, text)
    scores = patch_scores(model, batch, image, text)
    high, low = smk.attentive_mask(scores, high_ratio=config.high_ratio, low_ratio=config.low_ratio)

    def see(viewer: SyCoCaModel, masked: Tensor) -> Tensor:
        own = words if viewer is model else viewer.read(batch.input_ids, batch.attended)
        return viewer.draw(masked, own, batch.attended)

    return {
        "itc": itc,
        "caption": config.caption_weight * caption_loss(model, batch, words, low.mask),
        "mim": config.image_weight * mim_loss(step, see, high.mask, high.ids),
    }


@torch.no_grad()
def patch_scores(model: SyCoCaModel, batch: Batch, image: Tensor, text: Tensor) -> Tensor:
    """``[B, P]``: the largest similarity of each patch with a word."""
    return smk.max_similarity(
        model.patch_features(image), model.word_features(text), batch.token_valid
    )


def caption_loss(model: SyCoCaModel, batch: Batch, words: Tensor, hidden: Tensor) -> Tensor:
    """Predict each word from those before it and the image whose patches `hidden` are not seen."""
    image = model.encode_image(batch.pixels, hidden)
    told = model.describe(words, batch.attended, image)
    following = batch.input_ids[:, 1:].masked_fill(~batch.attended[:, 1:], -100)
    states, weight, bias = word_head(model, told[:, :-1])
    loss = smk.masked_linear_cross_entropy(states, weight, following, bias=bias)
    return ranks.share(loss, batch.attended[:, 1:].sum())


@torch.no_grad()
def shown_masks(
    model: SyCoCaModel, batch: Batch, image: Tensor, text: Tensor, config: PretrainConfig
) -> smk.SyncMask:
    """The patches to rebuild; no word is masked, but each has its largest similarity."""
    scores = patch_scores(model, batch, image, text)
    high = smk.topk_mask(scores, ratio=config.high_ratio)
    none = torch.zeros_like(batch.token_valid)
    word_scores = smk.max_similarity(model.word_features(text), model.patch_features(image))
    return smk.SyncMask(high.mask, none, high.ids, none[:, :0].long(), scores, word_scores)
