"""The four losses of SyncMask: ITC + ITM + MLM + MIM, equally weighted.

The names are the paper's; their form is ALBEF's, since the paper's is unknown to us. Decided here:

- **ITC** within the batch, without queue or soft targets. Several images of an item share a text,
  so all pairs of an item are positives with equal shares of the target, as in FashionSAP.
- **ITM** against one drawn negative text per image and one drawn negative image per text, with
  probability proportional to exp(similarity / temperature); never of the same item.
- **MLM** on the clean image and the masked text (the caption of the paper's figure 3 says so),
  with BERT's 80 % mask, 10 % random word, 10 % unchanged.
- **MIM** on the masked image and the clean text, its mirror image: L1 between pixels, as in SimMIM.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import syncmask_kernels as smk
from reference.batch import Batch
from reference.model import SyncMaskModel


def compute_losses(
    model: SyncMaskModel,
    batch: Batch,
    masks: smk.SyncMask,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Tensor]:
    """Losses of a batch: ``{"itc", "itm", "mlm", "mim"}``, scalars."""
    image = model.encode_image(batch.pixels)
    text = model.encode_text(batch.input_ids, batch.attended)
    logits = model.image_features(image) @ model.text_features(text).T / model.temperature
    return {
        "itc": itc_loss(logits, batch.item_ids),
        "itm": itm_loss(model, image, text, batch, logits.detach()),
        "mlm": mlm_loss(model, image, batch, masks, tokenizer),
        "mim": mim_loss(model, text, batch, masks),
    }


def itc_loss(logits: Tensor, item_ids: Tensor) -> Tensor:
    """Contrast images and texts ``[B, B]``; all pairs of an item are positives."""
    same = (item_ids[:, None] == item_ids).to(logits.dtype)
    targets = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def itm_loss(
    model: SyncMaskModel, image: Tensor, text: Tensor, batch: Batch, logits: Tensor
) -> Tensor:
    """Tell pairs from an image with a similar wrong text and a text with a similar wrong image."""
    ids = {"row_ids": batch.item_ids, "col_ids": batch.item_ids}
    negative_text = smk.sample_negatives(logits, **ids)
    negative_image = smk.sample_negatives(logits.T, **ids)
    fused = model.fuse(
        torch.cat([text, text[negative_text.ids], text]),
        torch.cat([batch.attended, batch.attended[negative_text.ids], batch.attended]),
        torch.cat([image, image, image[negative_image.ids]]),
    )
    found = torch.cat([negative_text.found, negative_image.found])
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
