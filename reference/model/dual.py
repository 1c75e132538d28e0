"""What the models of all methods share: an image encoder and contrastive features."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, ViTConfig, ViTModel

import syncmask_kernels as smk
from reference.model.config import ModelConfig
from reference.model.queue import FeatureQueue


def _shared(config: ModelConfig) -> dict[str, Any]:
    """Options of every encoder.

    The initialisation is BERT's and ViT's own, whose standard deviation of 0.02 at width 768 is
    scaled by 1 / sqrt(width), which keeps the size of activations at small widths.
    """
    return {
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "intermediate_size": 4 * config.width,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "initializer_range": 0.02 * math.sqrt(768 / config.width),
        "attn_implementation": "sdpa",
    }


def bert_config(
    config: ModelConfig, vocab_size: int, pad_id: int, layers: int, **options: Any
) -> BertConfig:
    """A BERT of this size, with so many layers."""
    chosen = _shared(config) | {"max_position_embeddings": config.max_tokens} | options
    return BertConfig(
        vocab_size=vocab_size,
        pad_token_id=pad_id,
        type_vocab_size=1,
        num_hidden_layers=layers,
        **chosen,
    )


class DualEncoder(nn.Module, ABC):
    """An image encoder, the features of both sides and their temperature.

    Hidden states are ``[B, 1 + P, width]`` for an image (CLS first, then patches in row order) and
    ``[B, T, width]`` for a text, whose first position stands for the whole.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vit = ViTConfig(
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_hidden_layers=config.image_layers,
            **_shared(config),
        )
        self.patch_size = config.patch_size
        self.image_encoder = ViTModel(vit, add_pooling_layer=False, use_mask_token=True)
        self.image_projection = nn.Linear(config.width, config.projection)
        self.text_projection = nn.Linear(config.width, config.projection)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        has_queue = config.queue_size > 0
        self.queue = FeatureQueue(config.projection, config.queue_size) if has_queue else None

    def encode_image(self, pixels: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """Encode images ``[B, 3, S, S]`` in [-1, 1]; patches of `patch_mask` ``[B, P]`` hidden.

        The mask token is learned and takes the place of a patch embedding before the position is
        added, as in BEiT.
        """
        encoder, embed = self.image_encoder, self.image_encoder.embeddings
        patches = embed.patch_embeddings(pixels)
        if patch_mask is not None:
            assert embed.mask_token is not None
            patches = smk.mask_patches(patches, patch_mask, embed.mask_token[0, 0])
        cls = embed.cls_token.expand(len(patches), -1, -1)
        hidden = embed.dropout(torch.cat([cls, patches], dim=1) + embed.position_embeddings)
        for layer in encoder.layers:
            hidden = layer(hidden)
        normed: Tensor = encoder.layernorm(hidden)
        return normed

    @abstractmethod
    def encode_text(self, input_ids: Tensor, attended: Tensor) -> Tensor:
        """Encode texts ``[B, T]``; `attended` ``[B, T]`` is False at padding."""

    @abstractmethod
    def encode_pair(self, input_ids: Tensor, attended: Tensor, image: Tensor) -> Tensor:
        """Texts that have seen their encoded images; the first state stands for the pair."""

    def image_features(self, image: Tensor) -> Tensor:
        """Unit features ``[B, projection]`` of encoded images."""
        return F.normalize(self.image_projection(image[:, 0]), dim=-1)

    def text_features(self, text: Tensor) -> Tensor:
        """Unit features ``[B, projection]`` of encoded texts."""
        return F.normalize(self.text_projection(text[:, 0]), dim=-1)
