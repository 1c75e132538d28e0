"""`patch`: the pretraining step of one ALBEF model, replaced as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from syncmask_kernels import _checks
from syncmask_kernels.backends.overloads.negatives import MODES
from syncmask_kernels.backends.request import TOKEN_SCORES
from syncmask_kernels.integrations.albef.functions import (
    ENCODERS,
    TEMPERATURES,
    Encoded,
    HardNegatives,
    MaskedWords,
    contrast,
    cross_attention,
    encode,
    enqueue_keys_,
    hard_negatives,
    matching_loss,
    mlm_loss,
    random_words,
    sync_masks,
    sync_words,
    update_teacher_,
)
from syncmask_kernels.integrations.bert_attention import capture_attention
from syncmask_kernels.integrations.checking import check_host
from syncmask_kernels.integrations.replacing import Patched, Replacement, install

_MODULES = (*ENCODERS, *(f"{name}_m" for name in ENCODERS), "itm_head")
_BUFFERS = ("image_queue", "text_queue", "queue_ptr")
_TOKENS = ("pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
_ENCODER = ("bert", "config.vocab_size", "cls.predictions.transform", "cls.predictions.decoder")
MASKING = (  # what random words and their loss read
    "mlm_probability",
    *(f"tokenizer.{name}" for name in _TOKENS),
    *(f"text_encoder.{name}" for name in _ENCODER),
)
_HAS = (*MASKING, *(f"text_encoder_m.{name}" for name in _ENCODER), "model_pairs", "momentum")


class _Masks(NamedTuple):
    """How the teacher chooses words."""

    layers: tuple[int, ...]
    token_ratio: float
    token_score: str


class _Forward(Replacement):
    """The pretraining step; `model(image, text, alpha)` returns the host's three losses."""

    def __init__(self, model: nn.Module, masks: _Masks | None, negatives: str) -> None:
        super().__init__(model)
        self.masks, self.negatives = masks, negatives

    def __str__(self) -> str:
        by = "at random" if self.masks is None else f"by the teacher, {self.masks._asdict()}"
        return (
            f"ITC that copies no queue; {self.negatives} negatives without a loop; "
            f"MLM head on masked words alone; words chosen {by}"
        )

    def _words(self, text: Any, teacher: Encoded) -> MaskedWords:
        if self.masks is None:
            return random_words(self.module, text)
        chosen = sync_masks(self.module, teacher, text, patch_k=0, **self.masks._asdict())
        return sync_words(self.module, text, chosen)

    def __call__(
        self,
        image: Tensor,
        text: Any,
        alpha: float | Tensor = 0,
        *,
        item_ids: Tensor | None = None,
        negatives: HardNegatives | None = None,
        words: MaskedWords | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        model = self.module
        with torch.no_grad():
            model.temp.clamp_(*TEMPERATURES)
        student = encode(model, image, text)
        model._momentum_update()
        teacher = encode(model, image, text, momentum=True)
        itc, *sims = contrast(model, student, teacher, alpha)
        model._dequeue_and_enqueue(teacher.image_feat, teacher.text_feat)
        if negatives is None:
            negatives = hard_negatives(*sims, item_ids=item_ids, mode=self.negatives)
        itm = matching_loss(model, student, text.attention_mask, negatives)
        if words is None:
            words = self._words(text, teacher)
        mlm = mlm_loss(model, words, text.attention_mask, student.image, teacher.image, alpha)
        return mlm, itc, itm


class MomentumUpdate(Replacement):
    does = "in place, batched over parameters"

    def __call__(self) -> None:
        update_teacher_(self.module)


class Enqueue(Replacement):
    does = "any batch size, with or without a process group"

    def __call__(self, image_feat: Tensor, text_feat: Tensor, idx: Tensor | None = None) -> None:
        item_ids = None if idx is None else idx.view(-1)
        enqueue_keys_(self.module, image_feat, text_feat, item_ids)


def _check_masks(
    model: Any,
    syncmask: bool,
    layers: Sequence[int] | None,
    token_ratio: float | None,
    token_score: str,
) -> _Masks | None:
    if not syncmask:
        if layers is not None or token_ratio is not None or token_score != "max":
            raise ValueError(
                "layers, token_ratio and token_score need syncmask=True, got "
                f"layers={layers}, token_ratio={token_ratio}, token_score={token_score!r}"
            )
        return None
    layers = (-1,) if layers is None else tuple(layers)
    with capture_attention(cross_attention(model.text_encoder_m.bert, layers)):
        pass  # refuses what it could not capture
    ratio = model.mlm_probability if token_ratio is None else token_ratio
    _checks.fraction("token_ratio", ratio)
    _checks.choice("token_score", token_score, TOKEN_SCORES)
    return _Masks(layers, ratio, token_score)


def patch(
    model: nn.Module,
    *,
    syncmask: bool = False,
    layers: Sequence[int] | None = None,
    token_ratio: float | None = None,
    token_score: str = "max",
    negatives: str = "multinomial",
) -> Patched:
    """Let one ALBEF pretraining model train with these operators. `unpatch` undoes it.

    Replaced, on this instance alone, are `forward`, `_momentum_update` and `_dequeue_and_enqueue`.
    Modules, parameters, buffers, hooks and the state dict are untouched, so checkpoints go either
    way; the patched model can be copied, pickled and wrapped by DistributedDataParallel.

    ``model(image, text, alpha)`` then returns ``loss_mlm, loss_ita, loss_itm`` as before. It also
    takes, by keyword: `item_ids` ``[B]`` int64 (pairs of one item are no hard negatives of each
    other in ITM; ITC is the host's, whose only positive is the pair itself), and `negatives`
    (`HardNegatives`) and `words` (`MaskedWords`) to use instead of what it would choose.

    Args:
        model: ``ALBEF`` of `models/model_pretrain.py`, not wrapped.
        syncmask: True lets the momentum model's cross-attention of the clean pair choose the words
            to mask, for which it runs once more through the first fusion layers. Default: at
            random, as in the host.
        layers: whose attention is looked at; see `cross_attention`.
        token_ratio: share of the words masked. Default: `model.mlm_probability`.
        token_score: rule of `sync_topk_mask`.
        negatives: mode of `sample_negatives`, of default margin.

    Returns:
        Patched: says what was replaced when it is printed; its `unpatch()` puts it back.

    Raises:
        TypeError: `model` is not what it should be, or has parts that the patched forward would
            leave out; the message names them.
        ValueError: `model` is patched already, or an option does not fit. Nothing is replaced then.

    Losses are those of the host, within rounding, but: over no masked word MLM is 0 (there NaN); a
    row without negatives is not counted (there an error); special tokens are never random words;
    for alpha 0 the momentum model does not run on masked words.
    """
    check_host(
        model,
        "ALBEF's pretraining model",
        _HAS,
        _Forward,
        modules=_MODULES,
        parameters=["temp"],
        buffers=_BUFFERS,
    )
    _checks.choice("negatives", negatives, MODES)
    masks = _check_masks(model, syncmask, layers, token_ratio, token_score)
    replacements = {
        "forward": _Forward(model, masks, negatives),
        "_momentum_update": MomentumUpdate(model),
        "_dequeue_and_enqueue": Enqueue(model),
    }
    return install(model, replacements)
