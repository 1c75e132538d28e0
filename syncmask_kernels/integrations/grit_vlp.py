"""GRIT-VLP (jaeseokbyun/GRIT-VLP): ALBEF without a momentum model, in grouped batches.

`patch` gives one model a forward of our own on the host's submodules, `patch_groups` one `GRIT` its
groups in one launch; see docs/integrations/children.md. What is done as in ALBEF is taken from
`integrations.albef`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from syncmask_kernels import _checks
from syncmask_kernels.backends.overloads.negatives import MODES
from syncmask_kernels.grouping import MODES as GROUP_MODES
from syncmask_kernels.grouping import grouped_order
from syncmask_kernels.integrations.albef import (
    ENCODERS,
    TEMPERATURES,
    Encoded,
    HardNegatives,
    MaskedWords,
    encode,
    hard_negatives,
    masked_lm_loss,
    matching_loss,
    random_words,
)
from syncmask_kernels.integrations.albef.patching import MASKING
from syncmask_kernels.integrations.checking import check_host
from syncmask_kernels.integrations.replacing import Patched, Replacement, install, unpatch

__all__ = [
    "CONSISTENCY",
    "HardNegatives",
    "MaskedWords",
    "Patched",
    "contrast",
    "group",
    "mlm_loss",
    "patch",
    "patch_groups",
    "unpatch",
]

CONSISTENCY = 0.2  # the host's weight of each direction's softmax as the other's target


def contrast(encoded: Encoded, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ITC within the batch, with the consistency of both directions -> loss, similarities."""
    image, text = encoded.image_feat, encoded.text_feat
    i2t = image @ text.detach().t() / temperature
    t2i = text @ image.detach().t() / temperature
    right = torch.arange(len(image), device=image.device)
    loss = F.cross_entropy(i2t, right) + F.cross_entropy(t2i, right)
    consistency = F.cross_entropy(i2t, t2i.detach().softmax(dim=1)) + F.cross_entropy(
        t2i, i2t.detach().softmax(dim=1)
    )
    return (loss + CONSISTENCY * consistency) / 2, i2t, t2i


def mlm_loss(model: Any, words: MaskedWords, attention_mask: Tensor, image: Tensor) -> Tensor:
    """MLM beside the image, projecting masked words only; 0 where there are none."""
    encoder = model.text_encoder
    hidden = encoder.bert(
        words.input_ids,
        attention_mask=attention_mask,
        encoder_hidden_states=image,
        return_dict=True,
    ).last_hidden_state
    return masked_lm_loss(encoder.cls.predictions, hidden, words.labels, ids=words.ids)


def group(image_queue: Tensor, text_queue: Tensor, ids: Tensor, **options: Any) -> list[int]:
    """The ids of a part of the queue in grouped order, as `GRIT.grouping` returns them.

    Args:
        image_queue: ``[D, M]`` features in columns.
        text_queue: ``[D, M]``.
        ids: ``[M]`` of the examples, integers in any type. (The host's `idx_queue` is float32,
            which holds integers up to 2^24.)
        options: of `grouped_order`: `start`, `item_ids`, `mode`, `window`.
    """
    _checks.rank("ids", ids, "[M]")
    _checks.rank("image_queue", image_queue, "[D, M]")
    _checks.shape("ids", ids, "[M]", image_queue.shape[1:])
    order = grouped_order(image_queue.t(), text_queue.t(), **options)
    return ids.index_select(0, order).long().tolist()


class _Forward(Replacement):
    def __init__(self, model: nn.Module, negatives: str) -> None:
        super().__init__(model)
        self.negatives = negatives

    def __str__(self) -> str:
        return f"{self.negatives} negatives without a loop; MLM head on masked words alone"

    def __call__(
        self,
        image: Tensor,
        text: Any,
        *,
        item_ids: Tensor | None = None,
        negatives: HardNegatives | None = None,
        words: MaskedWords | None = None,
    ) -> tuple[Tensor, ...]:
        model = self.module
        with torch.no_grad():
            model.temp.clamp_(*TEMPERATURES)
        encoded = encode(model, image, text)
        itc, *sims = contrast(encoded, model.temp)
        if negatives is None:
            negatives = hard_negatives(*sims, item_ids=item_ids, mode=self.negatives)
        itm = matching_loss(model, encoded, text.attention_mask, negatives)
        words = random_words(model, text) if words is None else words
        mlm = mlm_loss(model, words, text.attention_mask, encoded.image)
        return mlm, itc, itm, encoded.image_feat.detach(), encoded.text_feat.detach()


class _Grouping(Replacement):
    def __init__(self, grit: Any, mode: str) -> None:
        super().__init__(grit)
        self.mode = mode

    def __str__(self) -> str:
        return f"{self.mode} chain in one launch, by similarities instead of their softmax"

    def __call__(
        self, image_queue: Tensor, text_queue: Tensor, ids: Tensor, temp: object = None
    ) -> list[int]:
        # The host draws its start so, and never from the last example.
        start = int(torch.randint(max(len(ids) - 1, 1), (1,)))
        return group(image_queue, text_queue, ids, start=start, mode=self.mode)


def patch(model: nn.Module, *, negatives: str = "hardest") -> Patched:
    """Let one GRIT-VLP pretraining model train with these operators. `unpatch` undoes it.

    Replaced, on this instance alone, is `forward`; state dict and hooks are untouched. It returns
    the host's five values and takes, by keyword, `item_ids`, `negatives` and `words` as ALBEF's
    (`integrations.albef.patch`): ids keep pairs of one item apart in ITM, not in ITC.

    Args:
        model: ``ALBEF_Base`` of `models/model_pretrain_GRIT_VLP.py`, not wrapped.
        negatives: mode of `sample_negatives`. Default: ``"hardest"``, as the host.

    Raises:
        TypeError: `model` is not what it should be; the message names what it lacks or has besides.
        ValueError: `model` is patched already, or `negatives` is no mode.

    Losses are those of the host, within rounding, but: over no masked word MLM is 0 (there NaN);
    where the softmax of all other pairs underflows, the host takes an arbitrary one, even the pair
    itself; special tokens are never random words.
    """
    check_host(
        model,
        "GRIT-VLP's pretraining model",
        MASKING,
        _Forward,
        modules=[*ENCODERS, "itm_head"],
        parameters=["temp"],
        buffers=[],
    )
    _checks.choice("negatives", negatives, MODES)
    return install(model, {"forward": _Forward(model, negatives)})


def patch_groups(grit: Any, *, mode: str = "hardest") -> Patched:
    """Let one `GRIT` of `models/GRIT_utils.py` group its queue with `grouped_order`.

    Args:
        grit: the host's object; its `grouping` is replaced, on this instance alone.
        mode: of `grouped_order`. Default: ``"hardest"``, the host's rule; ``"semi_hard"`` passes
            over examples that are more similar than the pair itself.

    Raises:
        TypeError: `grit` has no `grouping`.
        ValueError: `grit` is patched already, or `mode` is no mode.

    The order is the host's, but where two similarities round to the same softmax, or underflow (the
    host then goes on with an arbitrary example, even one that it has used).
    """
    _checks.choice("mode", mode, GROUP_MODES)
    return install(grit, {"grouping": _Grouping(grit, mode)})
