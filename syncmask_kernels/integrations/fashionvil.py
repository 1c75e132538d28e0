"""FashionViL (BrandonHanx/mmf): one stream, in which words and patches attend to each other.

There is no cross-attention module and no teacher to patch, so these are functions to call by hand;
the lines to change in the host are in docs/integrations/fashionvil.md. Names of arguments and of
entries of `sample_list` are the host's.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from syncmask_kernels import _checks
from syncmask_kernels.integrations.bert_attention import capture_attention
from syncmask_kernels.integrations.mlm import masked_lm_loss
from syncmask_kernels.losses import masked_linear_cross_entropy
from syncmask_kernels.masking import gather_masked, mask_patches, mask_tokens, token_valid
from syncmask_kernels.negatives import sample_negatives
from syncmask_kernels.patch_losses import masked_patch_loss
from syncmask_kernels.selection import SyncMask, sync_topk_mask_qk

IGNORE_INDEX = -1
MASKED_TASKS = ("mlm", "mpfr", "mpfc")


class HardPairs(NamedTuple):
    """``text_index [B]`` int64, the text to show beside each image, and where it is ``replaced``.

    The host's `combine_index` and `combine_index_index`.
    """

    text_index: Tensor
    replaced: Tensor


@torch.no_grad()
def sync_masks(
    teacher: Any,
    sample_list: MutableMapping[str, Any],
    *,
    special_ids: Iterable[int],
    layers: Sequence[int] = (-1,),
    weigh_by_value: bool = False,
    **options: Any,
) -> SyncMask:
    """The words and patches that the teacher relates, from one forward of the clean pair.

    The map is the block of words' queries and patches' keys of the joint attention, ``attn[:, :,
    :T, T:]``, normalised over words and patches as in the host. It is taken from queries and keys:
    the probabilities that the host returns have been through dropout.

    Args:
        teacher: a `FashionViLBase` (``model.bert``, or a momentum copy of it), run as it is: in
            evaluation mode there is no dropout in what its layers are given.
        sample_list: the host's, after `add_post_flatten_params` of a task in `MASKED_TASKS`. Read
            are `input_ids`, `segment_ids`, `image` (features ``[B, P, C]``),
            `visual_embeddings_type` and `attention_mask` ``[B, T + P]``.
        special_ids: `tokenizer.all_special_ids`; these are never chosen.
        layers: indices of layers, whose maps are averaged. Default: the last.
        weigh_by_value: weigh patches by their values (`v` of `sync_topk_mask_qk`). Default: no.
        options: of `sync_topk_mask_qk`: `patch_ratio`, `token_ratio`, `word_ids`, scores, ...

    Returns:
        SyncMask: of T words and P patches.
    """
    input_ids, attention_mask = sample_list["input_ids"], sample_list["attention_mask"].bool()
    words = input_ids.shape[1]
    attentions = [teacher.encoder.layer[i].attention.self for i in layers]
    with capture_attention(attentions, stop=True) as captured:
        teacher.get_joint_embedding(
            input_ids,
            sample_list["segment_ids"],
            sample_list["image"],
            sample_list["visual_embeddings_type"],
            sample_list["attention_mask"],
        )
    return sync_topk_mask_qk(
        [q[:, :, :words] for q in captured.q],
        captured.k,
        token_valid(input_ids, special_ids) & attention_mask[:, :words],
        v=captured.v if weigh_by_value else None,
        key_valid=attention_mask,
        skip_keys=words,
        **options,
    )


def mask_sample_list(
    sample_list: MutableMapping[str, Any],
    chosen: SyncMask,
    *,
    mask_id: int,
    vocab_size: int,
    special_ids: Iterable[int],
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
) -> None:
    """Put synchronized masks where the host has random ones.

    Sets `input_ids_masked` and `lm_label_ids` (-1 where there is nothing to predict), `image_masks`
    and `masked_image` (features of masked patches are zero, as the host has no mask token).

    Args:
        sample_list: the host's, after `add_post_flatten_params`.
        chosen: from `sync_masks`.
        mask_id, vocab_size, special_ids, generator, seed: as in `mask_tokens`.
    """
    image = sample_list["image"]
    sample_list["input_ids_masked"], sample_list["lm_label_ids"] = mask_tokens(
        sample_list["input_ids"],
        chosen.token_mask,
        mask_id=mask_id,
        vocab_size=vocab_size,
        special_ids=special_ids,
        ignore_index=IGNORE_INDEX,
        generator=generator,
        seed=seed,
    )
    sample_list["image_masks"] = chosen.patch_mask.long()
    sample_list["masked_image"] = mask_patches(
        image, chosen.patch_mask, image.new_zeros(image.shape[2])
    )


def hard_pairs(
    correlations: Tensor,
    *,
    double_view: bool = False,
    item_ids: Tensor | None = None,
    mode: str = "semi_hard",
    replace: Tensor | None = None,
    **options: Any,
) -> HardPairs:
    """Replace the texts of half of the images by hard negatives, for image-text matching.

    Args:
        correlations: ``[B, B]`` floating, images and texts (as in the host's `get_hard_pairs`).
        double_view: both halves of the batch show the same items, as with the host's option of
            that name. Default: no.
        item_ids: ``[B]`` int64: texts of the image's own item are no negatives. Default: every row
            (with `double_view`, of a half) is an item of its own.
        mode: of `sample_negatives`; ``"hardest"`` is the host's `argmax`. Default: semi-hard, as
            SyncMask.
        replace: ``[B]`` bool, the images to be given another text. Default: a fair coin for each.
        options: of `sample_negatives`: `margin`, `quantile`, `generator`, `seed`, `noise`.

    Returns:
        HardPairs: images without a candidate keep their text, and `replaced` is False for them.

    No host sync. In the host, positives are set to -1 before the `argmax`; where all other texts
    are less similar than that (features are scaled, so similarities reach -16), it takes a
    positive for a negative.
    """
    _checks.rank("correlations", correlations, "[B, B]")
    rows, device = correlations.shape[0], correlations.device
    _checks.shape("correlations", correlations, "[B, B]", (rows, rows))
    if double_view and rows % 2:
        raise ValueError(f"correlations must have an even B with double_view, got B={rows}")
    if double_view and item_ids is None:
        item_ids = torch.arange(rows // 2, device=device).repeat(2)
    if replace is None:
        replace = torch.rand(rows, device=device) > 0.5
    else:
        _checks.dtype("replace", replace, torch.bool)
        _checks.shape("replace", replace, "[B]", (rows,))
        _checks.same_device("replace", replace, "correlations", correlations)
    negatives = sample_negatives(
        correlations, row_ids=item_ids, col_ids=item_ids, mode=mode, **options
    )
    replaced = replace & negatives.found
    own = torch.arange(rows, device=device)
    return HardPairs(torch.where(replaced, negatives.ids, own), replaced)


def mlm_loss(
    head: Any, sequence_output: Tensor, lm_label_ids: Tensor, *, ids: Tensor | None = None
) -> Tensor:
    """The host's MLM loss, projecting labelled words only; 0 where there are none.

    Args:
        head: ``heads["mlm"]``.
        sequence_output: ``[B, T, D]`` of the words.
        lm_label_ids: ``[B, T]`` int64, -1 where there is nothing to predict.
        ids: ``[B, K]``, the labelled words (`SyncMask.token_ids`), for fixed shapes on a GPU.
    """
    return masked_lm_loss(head, sequence_output, lm_label_ids, ids=ids, ignore_index=IGNORE_INDEX)


def mpfc_loss(head: Any, hidden: Tensor, codes: Tensor, ids: Tensor) -> Tensor:
    """The host's loss of the codes of masked patches, with fixed shapes; 0 where there are none.

    Args:
        head: ``heads["mpfc"]``, a transform and a linear layer.
        hidden: ``[B, P, D]`` of the patches.
        codes: ``[B, P]`` int64, from `get_patch_labels`.
        ids: ``[B, K]`` int64, the masked patches (`SyncMask.patch_ids`), -1 for none.
    """
    transform, decoder = head
    labels = gather_masked(codes, ids, fill=IGNORE_INDEX)
    return masked_linear_cross_entropy(
        transform(gather_masked(hidden, ids)),
        decoder.weight,
        labels,
        bias=decoder.bias,
        capacity=labels.numel(),
        ignore_index=IGNORE_INDEX,
    )


def mpfr_loss(head: nn.Module, hidden: Tensor, image: Tensor, ids: Tensor) -> Tensor:
    """The host's squared error of masked patches' features, with fixed shapes; 0 for none.

    Args:
        head: ``heads["mpfr"]``.
        hidden: ``[B, P, D]`` of the patches.
        image: ``[B, P, C]`` features before masking, a constant.
        ids: ``[B, K]`` int64, the masked patches (`SyncMask.patch_ids`), -1 for none.
    """
    return masked_patch_loss(head(gather_masked(hidden, ids)), image.detach(), ids, kind="mse")
