"""The SIMLA model (Khan et al., ECCV 2022, arXiv 2203.14395).

One stack of layers on top of the image encoder reads texts alone (no cross-attention), texts with
their image (words query patches) and images with their text (patches query word embeddings), with
the same weights each time. Decided here:

- **Codes.** The targets of masked image modelling are codes of patches, but not DALL-E's, which
  would have to be downloaded: see `reference.model.mim.PatchCodes`.
- **Masked image, clean caption.** As in SIMLA's code, patches enter the stack as the words do, with
  word positions added, and the caption's keys are its embeddings, not its encoding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform

from reference.model.config import ModelConfig
from reference.model.dual import DualEncoder, bert_config
from reference.model.fusion import Captured, SingleStream, fusion_config
from reference.model.mim import MimHead


class SimlaModel(DualEncoder):
    """Image encoder, the shared stack, and heads of ITM, MLM, MIM and keywords.

    `fusion_layers` is the height of the stack; `text_layers` and `image_fusion_layers` are unused.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, pad_id: int) -> None:
        super().__init__(config)
        positions = max(config.max_tokens, 1 + config.patches)
        bert = bert_config(
            config, vocab_size, pad_id, config.fusion_layers, max_position_embeddings=positions
        )
        self.stack = SingleStream(fusion_config(bert, config.fusion_layers))
        self.itm_head = nn.Linear(config.width, 2)
        self.word_transform = BertPredictionHeadTransform(bert)
        self.word_bias = nn.Parameter(torch.zeros(vocab_size))
        self.mim_head = MimHead(config, "codes")
        self.keyword_head = nn.Linear(config.projection, vocab_size)

    @property
    def word_embeddings(self) -> Tensor:
        """``[vocab, width]``: embeds words and, tied, scores them in MLM."""
        weight: Tensor = self.stack.embeddings.word_embeddings.weight
        return weight

    def encode_text(self, input_ids: Tensor, attended: Tensor) -> Tensor:
        """Encode texts ``[B, T]`` alone."""
        hidden: Tensor = self.stack(self.stack.embed(input_ids), attended)
        return hidden

    def encode_pair(self, input_ids: Tensor, attended: Tensor, image: Tensor) -> Tensor:
        """Texts that have seen their encoded images ``[B, T, width]``."""
        return self.read(input_ids, attended, image)

    def read(
        self,
        input_ids: Tensor,
        attended: Tensor,
        image: Tensor,
        captured: Captured | None = None,
    ) -> Tensor:
        """Words, not yet encoded, query the image."""
        fused: Tensor = self.stack(self.stack.embed(input_ids), attended, image, captured=captured)
        return fused

    def see(self, image: Tensor, input_ids: Tensor, attended: Tensor) -> Tensor:
        """Patches query the word embeddings."""
        hidden = self.stack.embed(vectors=image)
        fused: Tensor = self.stack(hidden, None, self.stack.embed(input_ids), attended)
        return fused
