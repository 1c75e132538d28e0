"""The SyncMask model: a reconstruction.

SyncMask (Song et al., CVPR 2024, arXiv 2404.01156) has no public code, and neither its layers nor
its sizes are known to us. Its vocabulary (momentum model, multi-modal encoder, ITC, ITM, MLM) is
that of ALBEF (Li et al., NeurIPS 2021, arXiv 2107.07651), so the layout here is ALBEF's: an image
encoder, a text encoder, and a fusion encoder whose words query the image. What the paper leaves
open is decided here:

- **MIM path.** ALBEF's fusion encoder has word positions only, so patches are rebuilt by a second,
  smaller fusion encoder in which patches query the words, as in MaskVLM (arXiv 2208.02131).
- **MIM head.** One linear layer from a fused patch to its pixels, as in SimMIM (arXiv 2111.09886).
- **MLM head.** BERT's, its output matrix tied to the word embeddings.
- **Mask token.** Learned, put in place of a patch embedding before the position is added (BEiT).
- **Initialisation.** BERT's and ViT's own, their standard deviation 0.02 at width 768 scaled by
  1 / sqrt(width), which keeps the size of activations at small widths.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform

import syncmask_kernels as smk
from reference.model.config import ModelConfig
from reference.model.fusion import QKV, FusionEncoder, fusion_config


class SyncMaskModel(nn.Module):
    """Image encoder, text encoder, two fusion encoders and the heads of ITC, ITM, MLM and MIM.

    Args:
        config: sizes.
        vocab_size: words of the tokenizer.
        pad_id: id of its padding.

    Hidden states are ``[B, 1 + P, width]`` for an image (CLS first, then patches in row order) and
    ``[B, T, width]`` for a text (CLS first).
    """

    def __init__(self, config: ModelConfig, vocab_size: int, pad_id: int) -> None:
        super().__init__()
        shared: dict[str, Any] = {
            "hidden_size": config.width,
            "num_attention_heads": config.heads,
            "intermediate_size": 4 * config.width,
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": config.dropout,
            "initializer_range": 0.02 * math.sqrt(768 / config.width),
            "attn_implementation": "sdpa",
        }
        vit = ViTConfig(
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_hidden_layers=config.image_layers,
            **shared,
        )
        bert = BertConfig(
            vocab_size=vocab_size,
            pad_token_id=pad_id,
            max_position_embeddings=config.max_tokens,
            type_vocab_size=1,
            num_hidden_layers=config.text_layers,
            **shared,
        )
        self.patch_size = config.patch_size
        self.image_encoder = ViTModel(vit, add_pooling_layer=False, use_mask_token=True)
        self.text_encoder = BertModel(bert, add_pooling_layer=False)
        self.fusion = FusionEncoder(fusion_config(bert, config.fusion_layers))
        self.image_fusion = FusionEncoder(fusion_config(bert, config.image_fusion_layers))
        self.image_projection = nn.Linear(config.width, config.projection)
        self.text_projection = nn.Linear(config.width, config.projection)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.itm_head = nn.Linear(config.width, 2)
        self.mlm_transform = BertPredictionHeadTransform(bert)
        self.mlm_bias = nn.Parameter(torch.zeros(vocab_size))
        self.mim_head = nn.Linear(config.width, 3 * config.patch_size**2)

    @property
    def word_embeddings(self) -> Tensor:
        """``[vocab, width]``: embeds words and, tied, scores them in MLM."""
        weight: Tensor = self.text_encoder.embeddings.word_embeddings.weight
        return weight

    def encode_image(self, pixels: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """Encode images ``[B, 3, S, S]`` in [-1, 1]; patches of `patch_mask` ``[B, P]`` hidden."""
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

    def encode_text(self, input_ids: Tensor, attended: Tensor) -> Tensor:
        """Encode texts ``[B, T]``; `attended` ``[B, T]`` is False at padding."""
        hidden: Tensor = self.text_encoder(input_ids, attention_mask=attended).last_hidden_state
        return hidden

    def fuse(
        self,
        text: Tensor,
        attended: Tensor,
        image: Tensor | None,
        captured: list[QKV] | None = None,
    ) -> Tensor:
        """Words query the image (None: no cross-attention); see `FusionEncoder.forward`."""
        fused: Tensor = self.fusion(text, attended, image, captured=captured)
        return fused

    def fuse_image(self, image: Tensor, text: Tensor, attended: Tensor) -> Tensor:
        """Patches query the words."""
        fused: Tensor = self.image_fusion(image, None, text, attended)
        return fused

    def image_features(self, image: Tensor) -> Tensor:
        """Unit features ``[B, projection]`` of encoded images."""
        return F.normalize(self.image_projection(image[:, 0]), dim=-1)

    def text_features(self, text: Tensor) -> Tensor:
        """Unit features ``[B, projection]`` of encoded texts."""
        return F.normalize(self.text_projection(text[:, 0]), dim=-1)
