"""The SyncMask model: a reconstruction.

SyncMask (Song et al., CVPR 2024, arXiv 2404.01156) has no public code, and neither its layers nor
its sizes are known to us. Its vocabulary (momentum model, multi-modal encoder, ITC, ITM, MLM) is
that of ALBEF (Li et al., NeurIPS 2021, arXiv 2107.07651), so the layout here is ALBEF's: an image
encoder, a text encoder, and a fusion encoder whose words query the image. What the paper leaves
open is decided here:

- **MIM path.** ALBEF's fusion encoder has word positions only, so patches are rebuilt by a second,
  smaller fusion encoder in which patches query the words, as in MaskVLM (arXiv 2208.02131).
- **MIM head.** One linear layer from a fused patch to its target, its pixels unless chosen
  otherwise, as in SimMIM (arXiv 2111.09886).
- **MLM head.** BERT's, its output matrix tied to the word embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertModel
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform

from reference.model.config import ModelConfig
from reference.model.dual import DualEncoder, bert_config
from reference.model.fusion import Captured, FusionEncoder, fusion_config
from reference.model.mim import MimHead


class SyncMaskModel(DualEncoder):
    """Image encoder, text encoder, two fusion encoders and the heads of ITC, ITM, MLM and MIM.

    Args:
        config: sizes.
        vocab_size: words of the tokenizer.
        pad_id: id of its padding.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, pad_id: int) -> None:
        super().__init__(config)
        bert = bert_config(config, vocab_size, pad_id, config.text_layers)
        self.text_encoder = BertModel(bert, add_pooling_layer=False)
        self.fusion = FusionEncoder(fusion_config(bert, config.fusion_layers))
        self.image_fusion = FusionEncoder(fusion_config(bert, config.image_fusion_layers))
        self.itm_head = nn.Linear(config.width, 2)
        self.word_transform = BertPredictionHeadTransform(bert)
        self.word_bias = nn.Parameter(torch.zeros(vocab_size))
        self.mim_head = MimHead(config, "pixels")

    @property
    def word_embeddings(self) -> Tensor:
        """``[vocab, width]``: embeds words and, tied, scores them in MLM."""
        weight: Tensor = self.text_encoder.embeddings.word_embeddings.weight
        return weight

    def encode_text(self, input_ids: Tensor, attended: Tensor) -> Tensor:
        """Encode texts ``[B, T]``; `attended` ``[B, T]`` is False at padding."""
        hidden: Tensor = self.text_encoder(input_ids, attention_mask=attended).last_hidden_state
        return hidden

    def encode_pair(self, input_ids: Tensor, attended: Tensor, image: Tensor) -> Tensor:
        """Texts that have seen their encoded images ``[B, T, width]``."""
        return self.fuse(self.encode_text(input_ids, attended), attended, image)

    def fuse(
        self,
        text: Tensor,
        attended: Tensor,
        image: Tensor | None,
        captured: Captured | None = None,
    ) -> Tensor:
        """Words query the image (None: no cross-attention); see `FusionEncoder.forward`."""
        fused: Tensor = self.fusion(text, attended, image, captured=captured)
        return fused

    def fuse_image(self, image: Tensor, text: Tensor, attended: Tensor) -> Tensor:
        """Patches query the words."""
        fused: Tensor = self.image_fusion(image, None, text, attended)
        return fused
