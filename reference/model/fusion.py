"""BERT layers with cross-attention as a bidirectional encoder that lends out its q, k, v."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BertConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import (
    BertCrossAttention,
    BertEmbeddings,
    BertEncoder,
    BertPreTrainedModel,
)

CAPTURING_SDPA = "sdpa_lending_its_inputs"

QKV = tuple[Tensor, Tensor, Tensor]
"""q [B, H, T, D], k and v [B, H, S, D] of one attention."""


class Captured(NamedTuple):
    """The inputs of each layer's attentions, filled by the caller's `FusionEncoder.forward`."""

    self_attention: list[QKV]
    cross_attention: list[QKV]

    @classmethod
    def nothing(cls) -> Captured:
        return cls([], [])


def _capturing_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    captured: Captured | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """SDPA that appends its inputs to the caller's lists."""
    if captured is not None:
        crossed = isinstance(module, BertCrossAttention)
        lists = captured.cross_attention if crossed else captured.self_attention
        lists.append((query, key, value))
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
        captured: Captured | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Fuse `hidden` with `context`.

        Args:
            hidden: ``[B, T, D]`` queries.
            attended: bool ``[B, T]``, False: padding; None: all are attended to.
            context: ``[B, S, D]`` keys; None skips the cross-attention.
            context_attended: bool ``[B, S]``, as `attended`.
            captured: where each layer appends the inputs of its attentions.
            causal: a position of `hidden` sees none after it.

        Returns:
            ``[B, T, D]``.
        """
        # BertLayer lends cross-attention to decoders only: is_causal=False makes it bidirectional.
        seen = _broadcast(attended)
        if causal:
            length = hidden.shape[1]
            earlier = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
            seen = earlier if seen is None else seen & earlier
        output = self.encoder(
            hidden,
            attention_mask=seen,
            encoder_hidden_states=context,
            encoder_attention_mask=_broadcast(context_attended),
            captured=captured,
            is_causal=False,
        )
        fused: Tensor = output.last_hidden_state
        return fused


class SingleStream(FusionEncoder):
    """A `FusionEncoder` that embeds words, or other vectors, itself."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.post_init()

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the embeddings, too, which no forward pass calls."""
        super().compile(*args, **options)
        self.embeddings.compile(*args, **options)

    def embed(self, input_ids: Tensor | None = None, vectors: Tensor | None = None) -> Tensor:
        """Words ``[B, T]``, or vectors ``[B, S, D]`` in their place, with their positions."""
        embedded: Tensor = self.embeddings(input_ids=input_ids, inputs_embeds=vectors)
        return embedded


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
