"""BERT layers with cross-attention as a bidirectional encoder that lends out its q, k, v."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import BertConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import (
    BertCrossAttention,
    BertEncoder,
    BertPreTrainedModel,
)

CAPTURING_SDPA = "sdpa_lending_cross_attention"

QKV = tuple[Tensor, Tensor, Tensor]
"""q [B, H, T, D], k and v [B, H, S, D] of one cross-attention."""


def _capturing_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    captured: list[QKV] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """SDPA that appends the inputs of cross-attentions to the caller's list."""
    if captured is not None and isinstance(module, BertCrossAttention):
        captured.append((query, key, value))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


ALL_ATTENTION_FUNCTIONS.register(CAPTURING_SDPA, _capturing_sdpa)


class FusionEncoder(BertPreTrainedModel):
    """Layers of self-attention, cross-attention and feed-forward over already embedded inputs."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.encoder = BertEncoder(config)
        self.post_init()

    def forward(
        self,
        hidden: Tensor,
        attended: Tensor | None = None,
        context: Tensor | None = None,
        context_attended: Tensor | None = None,
        captured: list[QKV] | None = None,
    ) -> Tensor:
        """Fuse `hidden` with `context`.

        Args:
            hidden: ``[B, T, D]`` queries.
            attended: bool ``[B, T]``, False: padding; None: all are attended to.
            context: ``[B, S, D]`` keys; None skips the cross-attention.
            context_attended: bool ``[B, S]``, as `attended`.
            captured: a list to which each layer's cross-attention appends its `QKV`.

        Returns:
            ``[B, T, D]``.
        """
        # BertLayer lends cross-attention to decoders only: is_causal=False makes it bidirectional.
        output = self.encoder(
            hidden,
            attention_mask=_broadcast(attended),
            encoder_hidden_states=context,
            encoder_attention_mask=_broadcast(context_attended),
            captured=captured,
            is_causal=False,
        )
        fused: Tensor = output.last_hidden_state
        return fused


def _broadcast(attended: Tensor | None) -> Tensor | None:
    return None if attended is None else attended[:, None, None, :]


def fusion_config(base: BertConfig, layers: int) -> BertConfig:
    """`base` for a `FusionEncoder` of so many layers."""
    options = base.to_dict() | {
        "num_hidden_layers": layers,
        "is_decoder": True,
        "add_cross_attention": True,
        "attn_implementation": CAPTURING_SDPA,
    }
    return BertConfig(**options)
