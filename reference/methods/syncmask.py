"""The four losses of SyncMask: ITC + ITM + MLM + MIM, equally weighted.

The names are the paper's; their form is ALBEF's (see `reference.methods.parts`), since the paper's
is unknown to us. Decided here:

- **Negatives.** The paper prefers semi-hard ones, "of lower similarity", in its batch sampling;
  here ITM chooses so within a batch: of the candidates less similar than the pair itself, the one
  at a quantile. (ALBEF's draw by exp(similarity / temperature) is an option; from scratch on little
  data its negatives are so hard that the loss stays at chance.)
- **MLM** on the clean image and the masked text (the caption of the paper's figure 3 says so).
- **MIM** on the masked image and the clean text, its mirror image.
"""

from __future__ import annotations

from torch import Tensor

import syncmask_kernels as smk
from reference.masks import choose_masks
from reference.methods.parts import Sides, choose_negatives, contrast, itm_loss, mim_loss, mlm_loss
from reference.model import SyncMaskModel
from reference.step import Step


def losses(step: Step[SyncMaskModel]) -> dict[str, Tensor]:
    """Losses of a step: ``{"itc", "itm", "mlm", "mim"}``, scalars."""
    return losses_of(step, choose_masks(step))


def losses_of(step: Step[SyncMaskModel], masks: smk.SyncMask) -> dict[str, Tensor]:
    """The same with these masks."""
    model, batch = step.student, step.batch
    image = model.encode_image(batch.pixels)
    text = model.encode_text(batch.input_ids, batch.attended)
    itc, similarities = contrast(step, image, text)

    def see(viewer: SyncMaskModel, masked: Tensor) -> Tensor:
        words = text if viewer is model else step.teacher_text
        return viewer.fuse_image(masked, words, batch.attended)

    def read(reader: SyncMaskModel, masked_ids: Tensor, seen: Tensor) -> Tensor:
        return reader.fuse(reader.encode_text(masked_ids, batch.attended), batch.attended, seen)

    sides = Sides(text, batch.attended, image)
    wrong = choose_negatives(similarities, batch.item_ids, step.config)
    return {
        "itc": itc,
        "itm": itm_loss(model.itm_head, model.fuse, sides, *wrong, len(similarities.item_ids)),
        "mlm": mlm_loss(step, read, image, masks),
        "mim": mim_loss(step, see, masks.patch_mask, masks.patch_ids),
    }
