"""FashionSAP (hssip/FashionSAP): ALBEF for fashion, with products' ids and masks of the dataset.

`patch` gives one model a forward of our own on the host's submodules, queues and parameters; see
docs/integrations/children.md. What is done as in ALBEF is taken from `integrations.albef`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from syncmask_kernels import _checks
from syncmask_kernels.backends.overloads.negatives import MODES
from syncmask_kernels.integrations.albef import (
    TEMPERATURES,
    Encoded,
    HardNegatives,
    contrast,
    hard_negatives,
    masked_lm_loss,
    matching_loss,
)
from syncmask_kernels.integrations.albef.patching import Enqueue, MomentumUpdate
from syncmask_kernels.integrations.checking import check_host
from syncmask_kernels.integrations.replacing import Patched, Replacement, install, unpatch

__all__ = [
    "HardNegatives",
    "Losses",
    "Patched",
    "encode",
    "patch",
    "unpatch",
]

_ENCODERS = (
    "visual_encoder",
    "vision_proj",
    "text_encoder",
    "text_proj",
    "combine_vision_proj",
    "combine_text_proj",
)
_OTHERS = ("itm_head", "decoder_layer", "replace_predict_layer")


class Losses(NamedTuple):
    """The host's five losses, in its order."""

    itc: Tensor
    itm: Tensor
    symbol: Tensor
    mlm: Tensor
    replaced: Tensor


def encode(
    model: Any, image: Tensor, input_ids: Tensor, attention_mask: Tensor, *, momentum: bool = False
) -> tuple[Encoded, Tensor]:
    """Image and text, and the feature ``[B, E]`` of the symbol that is the second token."""
    parts = [getattr(model, f"{name}_m" if momentum else name) for name in _ENCODERS]
    visual_encoder, vision_proj, text_encoder, text_proj, combine_vision, combine_text = parts
    with torch.set_grad_enabled(torch.is_grad_enabled() and not momentum):
        seen = visual_encoder(image)
        read = text_encoder(
            input_ids, attention_mask=attention_mask, return_dict=True, mode="text"
        ).last_hidden_state
        image_feat = F.normalize(combine_vision(vision_proj(seen[:, 0])), dim=-1)
        text_feat, symbol = F.normalize(combine_text(text_proj(read[:, :2])), dim=-1).unbind(1)
    return Encoded(seen, read, image_feat, text_feat), symbol


class _Forward(Replacement):
    def __init__(self, model: nn.Module, negatives: str) -> None:
        super().__init__(model)
        self.negatives = negatives

    def __str__(self) -> str:
        return (
            f"ITC that copies no queue; {self.negatives} negatives of other products without a "
            "loop; MLM head on masked words alone"
        )

    def __call__(
        self,
        image: Tensor,
        text_input_ids: Tensor,
        text_attention_mask: Tensor,
        alpha: float | Tensor,
        idx: Tensor,
        mask_labels: Tensor,
        replace_labels: Tensor,
        *,
        negatives: HardNegatives | None = None,
    ) -> Losses:
        model, ids = self.module, idx.view(-1)
        text = text_input_ids, text_attention_mask
        with torch.no_grad():
            model.temp.clamp_(*TEMPERATURES)
        student, symbol = encode(model, image, *text)
        model._momentum_update()
        teacher, _ = encode(model, image, *text, momentum=True)
        itc, *sims = contrast(model, student, teacher, alpha, item_ids=ids)
        model._dequeue_and_enqueue(teacher.image_feat, teacher.text_feat, idx)
        if negatives is None:
            negatives = hard_negatives(*sims, item_ids=ids, mode=self.negatives)
        fused = model.text_encoder(
            encoder_embeds=student.text,
            attention_mask=text_attention_mask,
            encoder_hidden_states=student.image,
            return_dict=True,
            mode="fusion",
        ).last_hidden_state
        replaced = model.replace_predict_layer(fused)
        return Losses(
            itc,
            matching_loss(model, student, text_attention_mask, negatives, right=fused),
            (1 - (symbol * student.image_feat).sum(dim=1).mean()) / 2,
            masked_lm_loss(model.decoder_layer.predictions, fused, mask_labels),
            F.cross_entropy(replaced.flatten(0, 1), replace_labels.flatten()),
        )


def patch(model: nn.Module, *, negatives: str = "multinomial") -> Patched:
    """Let one FashionSAP pretraining model train with these operators. `unpatch` undoes it.

    Replaced, on this instance alone, are `forward`, `_momentum_update` and `_dequeue_and_enqueue`;
    state dict and hooks are untouched. The model is called as before, and takes by keyword
    `negatives` (`integrations.albef.HardNegatives`) to use instead of what it would draw.

    Args:
        model: ``FashionSAP`` of `models/model_fashion_pretrain.py`, not wrapped.
        negatives: mode of `sample_negatives`.

    Raises:
        TypeError: `model` is not what it should be; the message names what it lacks or has besides.
        ValueError: `model` is patched already, or `negatives` is no mode.

    Losses are those of the host, within rounding, but: other views of the product (equal `idx`) are
    no negatives, which the host draws although its contrastive targets know them; over no masked
    word MLM is 0 (there NaN); a row without negatives is not counted.
    """
    check_host(
        model,
        "FashionSAP's pretraining model",
        ["model_pairs", "momentum"],
        _Forward,
        modules=[*_ENCODERS, *(f"{name}_m" for name in _ENCODERS), *_OTHERS],
        parameters=["temp"],
        buffers=["image_queue", "text_queue", "queue_ptr", "idx_queue"],
    )
    _checks.choice("negatives", negatives, MODES)
    return install(
        model,
        {
            "forward": _Forward(model, negatives),
            "_momentum_update": MomentumUpdate(model),
            "_dequeue_and_enqueue": Enqueue(model),
        },
    )
