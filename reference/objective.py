"""The four losses of SyncMask: ITC + ITM + MLM + MIM, equally weighted.

The names are the paper's; their form is ALBEF's, since the paper's is unknown to us. Decided here:

- **ITC** within the batch, without queue or soft targets. Several images of an item share a text,
  so all pairs of an item are positives with equal shares of the target, as in FashionSAP.
- **ITM** against one wrong text per image and one wrong image per text of the batch, never of the
  same item. The paper prefers semi-hard negatives, "of lower similarity", in its batch sampling;
  here they are chosen so within a batch: of the candidates less similar than the pair itself, the
  one at a quantile. (ALBEF's draw by exp(similarity / temperature) is an option; from scratch on
  little data its negatives are so hard that the loss stays at chance.)
- **MLM** on the clean image and the masked text (the caption of the paper's figure 3 says so),
  with BERT's 80 % mask, 10 % random word, 10 % unchanged.
- **MIM** on the masked image and the clean text, its mirror image: L1 between pixels, as in SimMIM.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import syncmask_kernels as smk
from reference.batch import Batch
from reference.config import PretrainConfig
from reference.model import SyncMaskModel


def compute_losses(
    model: SyncMaskModel,
    batch: Batch,
    masks: smk.SyncMask,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainConfig,
) -> dict[str, Tensor]:
    """Losses of a batch: ``{"itc", "itm", "mlm", "mim"}``, scalars."""
    image = model.encode_image(batch.pixels)
    text = model.encode_text(batch.input_ids, batch.attended)
    logits = model.image_features(image) @ model.text_features(text).T / model.temperature
    negatives = choose_negatives(logits.detach(), batch.item_ids, config)
    return {
        "itc": itc_loss(logits, batch.item_ids),
        "itm": itm_loss(model, image, text, batch, *negatives),
        "mlm": mlm_loss(model, image, batch, masks, tokenizer),
        "mim": mim_loss(model, text, batch, masks),
    }


def itc_loss(logits: Tensor, item_ids: Tensor) -> Tensor:
    """Contrast images and texts ``[B, B]``; all pairs of an item are positives."""
    same = (item_ids[:, None] == item_ids).to(logits.dtype)
    targets = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def choose_negatives(
    logits: Tensor, item_ids: Tensor, config: PretrainConfig
) -> tuple[smk.Negatives, smk.Negatives]:
    """A wrong text for each image and a wrong image for each text, by similarity ``[B, B]``."""
    semi_hard = config.negatives == "semi_hard"
    choose = partial(
        smk.sample_negatives,
        row_ids=item_ids,
        col_ids=item_ids,
        mode=config.negatives,
        quantile=config.negative_quantile if semi_hard else None,
    )
    return choose(logits), choose(logits.T)


def itm_loss(
    model: SyncMaskModel,
    image: Tensor,
    text: Tensor,
    batch: Batch,
    wrong_text: smk.Negatives,
    wrong_image: smk.Negatives,
) -> Tensor:
    """Tell pairs from an image with a wrong text and from a text with a wrong image."""
    fused = model.fuse(
        torch.cat([text, text[wrong_text.ids], text]),
        torch.cat([batch.attended, batch.attended[wrong_text.ids], batch.attended]),
        torch.cat([image, image, image[wrong_image.ids]]),
    )
    found = torch.cat([wrong_text.found, wrong_image.found])
    labels = torch.cat([torch.ones_like(batch.item_ids), found.long() - 1])
    return F.cross_entropy(model.itm_head(fused[:, 0]), labels, ignore_index=-1)


def mlm_loss(
    model: SyncMaskModel,
    image: Tensor,
    batch: Batch,
    masks: smk.SyncMask,
    tokenizer: PreTrainedTokenizerBase,
) -> Tensor:
    """Predict the masked words from the other words and the clean image ``[B, 1 + P, D]``."""
    masked_ids, labels = smk.mask_tokens(
        batch.input_ids,
        masks.token_mask,
        mask_id=tokenizer.mask_token_id,
        vocab_size=len(tokenizer),
        special_ids=tokenizer.all_special_ids,
    )
    fused = model.fuse(model.encode_text(masked_ids, batch.attended), batch.attended, image)
    return smk.masked_linear_cross_entropy(
        model.mlm_transform(smk.gather_masked(fused, masks.token_ids)),
        model.word_embeddings,
        smk.gather_masked(labels, masks.token_ids, fill=-100),
        bias=model.mlm_bias,
    )


def mim_loss(model: SyncMaskModel, text: Tensor, batch: Batch, masks: smk.SyncMask) -> Tensor:
    """Rebuild the masked patches from the other patches and the clean text ``[B, T, D]``."""
    image = model.encode_image(batch.pixels, masks.patch_mask)
    fused = model.fuse_image(image, text, batch.attended)
    return smk.masked_patch_loss(
        model.mim_head(smk.gather_masked(fused[:, 1:], masks.patch_ids)),
        batch.pixels,
        masks.patch_ids,
        kind="l1",
        patch_size=model.patch_size,
    )
