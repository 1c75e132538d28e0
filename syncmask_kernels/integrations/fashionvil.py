"""FashionViL (BrandonHanx/mmf): one stream, in which words and patches attend to each other.

`patch` replaces what one model does with hard pairs and masked words, and with a teacher its random
masks; what it is made of can be called by hand. Names of arguments and of entries of `sample_list`
are the host's; see docs/integrations/fashionvil.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from syncmask_kernels import _checks
from syncmask_kernels.backends.overloads.negatives import MODES
from syncmask_kernels.integrations.bert_attention import capture_attention
from syncmask_kernels.integrations.checking import check_host
from syncmask_kernels.integrations.mlm import masked_lm_loss
from syncmask_kernels.integrations.replacing import Patched, Replacement, install, unpatch
from syncmask_kernels.losses import masked_linear_cross_entropy
from syncmask_kernels.masking import gather_masked, mask_patches, mask_tokens, token_valid
from syncmask_kernels.negatives import sample_negatives
from syncmask_kernels.patch_losses import masked_patch_loss
from syncmask_kernels.selection import SyncMask, sync_topk_mask_qk

__all__ = [
    "MASKED_TASKS",
    "HardPairs",
    "Masking",
    "Patched",
    "hard_pairs",
    "mask_sample_list",
    "mlm_loss",
    "mpfc_loss",
    "mpfr_loss",
    "patch",
    "sync_masks",
    "unpatch",
]

IGNORE_INDEX = -1
MASKED_TASKS = ("mlm", "mpfr", "mpfc")
_HAS = ("bert", "heads", "double_view", "_forward_itc", "get_joint_embedding")


class HardPairs(NamedTuple):
    """``text_index [B]`` int64, the text to show beside each image, and where it is ``replaced``.

    The host's `combine_index` and `combine_index_index`.
    """

    text_index: Tensor
    replaced: Tensor


@dataclass(frozen=True)
class Masking:
    """Who chooses masks for `patch`, and how.

    Args:
        teacher: a momentum copy of ``model.bert`` in evaluation mode, which the caller updates
            (`ema_update_`). It does not become a part of the model.
        mask_id: `tokenizer.mask_token_id`.
        special_ids: `tokenizer.all_special_ids`.
        options: of `sync_masks`, or a function of the host's `sample_list` that returns them, for
            those that differ from batch to batch (`word_ids`, scores, noise). It is called after
            `add_post_flatten_params`, which repeats words where there are two views.

    Raises:
        TypeError: a tensor is among options that are the same for every batch.
    """

    teacher: nn.Module
    mask_id: int
    special_ids: Sequence[int]
    options: Mapping[str, Any] | Callable[[Mapping[str, Any]], Mapping[str, Any]] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        given = {} if callable(self.options) else self.options
        for name, value in given.items():
            if isinstance(value, Tensor):
                raise TypeError(
                    f"options must be the same for every batch, got a tensor {name}: hand over a "
                    "function of sample_list that returns them"
                )

    def of(self, sample_list: Mapping[str, Any]) -> Mapping[str, Any]:
        """The options for this batch."""
        return self.options(sample_list) if callable(self.options) else self.options

    def __str__(self) -> str:
        by = "options of each batch" if callable(self.options) else dict(self.options)
        return f"words and patches to mask chosen by the teacher, {by}"


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
    mode: str = "hardest",
    replace: Tensor | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> HardPairs:
    """Replace the texts of half of the images by hard negatives, for image-text matching.

    Args:
        correlations: ``[B, B]`` floating, images and texts (as in the host's `get_hard_pairs`).
        double_view: both halves of the batch show the same items, as with the host's option of
            that name. Default: no.
        item_ids: ``[B]`` int64: texts of the image's own item are no negatives. Default: every row
            (with `double_view`, of a half) is an item of its own.
        mode: of `sample_negatives`. Default: ``"hardest"``, the host's `argmax`.
        replace: ``[B]`` bool, the images to be given another text. Default: a fair coin for each.
        generator: of the negatives and of the coins, on the device. Default: torch's own.
        options: of `sample_negatives`: `margin`, `quantile`, `seed`, `noise` (of the negatives;
            coins do not heed them).

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
    if replace is not None:
        _checks.dtype("replace", replace, torch.bool)
        _checks.shape("replace", replace, "[B]", (rows,))
        _checks.same_device("replace", replace, "correlations", correlations)
    negatives = sample_negatives(
        correlations,
        row_ids=item_ids,
        col_ids=item_ids,
        mode=mode,
        generator=generator,
        **options,
    )
    if replace is None:
        replace = torch.rand(rows, device=device, generator=generator) > 0.5
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


class _GetHardPairs(Replacement):
    def __init__(self, model: nn.Module, mode: str) -> None:
        super().__init__(model)
        self.mode = mode

    def __str__(self) -> str:
        return f"{self.mode} negatives, which are never the text of the image"

    @torch.no_grad()
    def __call__(self, sample_list: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        model, training = self.module, self.module.training
        model.eval()
        try:
            features = model._forward_itc(sample_list)
        finally:
            model.train(training)
        text_index, replaced = hard_pairs(
            features["scores"] @ features["targets"].t(),
            double_view=model.double_view,
            mode=self.mode,
        )
        for name in ("input_ids", "segment_ids", "input_mask", "attention_mask"):
            if name in sample_list:
                sample_list[name] = sample_list[name].index_select(0, text_index)
        sample_list["targets"] = sample_list["targets"].masked_fill(replaced, 0)
        return sample_list


class _ForwardMlm(Replacement):
    does = "MLM head on labelled words alone; no `scores` of all words are returned"

    def __call__(self, sample_list: MutableMapping[str, Any]) -> dict[str, Any]:
        model = self.module
        hidden, _, _ = model.get_joint_embedding(
            sample_list["input_ids_masked"],
            sample_list["segment_ids"],
            sample_list["image"],
            sample_list["visual_embeddings_type"],
            sample_list["attention_mask"],
        )
        labels = sample_list["lm_label_ids"]
        words = hidden[:, : labels.shape[1]]
        ids = sample_list.get("token_ids")
        return {"losses": {"mlm_loss": mlm_loss(model.heads["mlm"], words, labels, ids=ids)}}


class _AddPostFlattenParams(Replacement):
    def __init__(self, model: nn.Module, masking: Masking) -> None:
        super().__init__(model)
        self.masking = masking

    def __str__(self) -> str:
        return str(self.masking)

    def __call__(self, sample_list: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        model, masking = self.module, self.masking
        sample_list = type(model).add_post_flatten_params(model, sample_list)
        if model.training and sample_list["task"] in MASKED_TASKS:
            special_ids = masking.special_ids
            options = masking.of(sample_list)
            chosen = sync_masks(masking.teacher, sample_list, special_ids=special_ids, **options)
            mask_sample_list(
                sample_list,
                chosen,
                mask_id=masking.mask_id,
                vocab_size=model.bert.config.vocab_size,
                special_ids=special_ids,
            )
            sample_list["token_ids"] = chosen.token_ids
        return sample_list


def patch(
    model: nn.Module, *, negatives: str = "hardest", masking: Masking | None = None
) -> Patched:
    """Let one FashionViL pretraining model train with these operators. `unpatch` undoes it.

    Replaced, on this instance alone, are `get_hard_pairs` and `_forward_mlm`, and with `masking`
    `add_post_flatten_params`; modules, state dict and hooks are untouched.

    Args:
        model: ``FashionViLForPretraining`` (the `model` of MMF's `FashionViL`).
        negatives: mode of `sample_negatives`. Default: ``"hardest"``, the host's rule.
        masking: lets a teacher choose words and patches while the model trains. Default: the masks
            of the dataset.

    Raises:
        TypeError: `model` lacks what FashionViL has; the message names it.
        ValueError: `model` is patched already, or `negatives` is no mode.

    Losses are those of the host, within rounding, but: over no labelled word MLM is 0 (there NaN);
    no positive is taken for a negative (see `hard_pairs`).
    """
    check_host(model, "FashionViL's pretraining model", _HAS)
    _checks.choice("negatives", negatives, MODES)
    replacements: dict[str, Replacement] = {
        "get_hard_pairs": _GetHardPairs(model, negatives),
        "_forward_mlm": _ForwardMlm(model),
    }
    if masking is not None:
        replacements["add_post_flatten_params"] = _AddPostFlattenParams(model, masking)
    return install(model, replacements)
