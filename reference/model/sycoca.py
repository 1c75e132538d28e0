"""The SyCoCa model (Ma et al., ICML 2024, arXiv 2401.02137).

An image encoder, a causal text encoder, a text decoder (words query patches) and an image decoder
(patches query words). The paper's "CoCa-Base" sizes are open_clip's; here they are `ModelConfig`'s,
`fusion_layers` for the text decoder and `image_fusion_layers` for the image decoder. Decided here:

- **Text CLS.** The encoder is causal, so the last token of a text has seen all of it and its state
  stands first in `encode_text`, where the state of the first token, which sees only itself, is of
  no use.
- **Heads.** The text decoder's words are scored by the tied word embeddings after BERT's transform,
  the image decoder's patches become pixels by one linear layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertModel
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform

from reference.model.config import ModelConfig
from reference.model.dual import DualEncoder, bert_config
from reference.model.fusion import FusionEncoder, fusion_config
from reference.model.mim import MimHead


class SyCoCaModel(DualEncoder):
    """Image encoder, causal text encoder, text decoder and image decoder; see `DualEncoder`."""

    def __init__(self, config: ModelConfig, vocab_size: int, pad_id: int) -> None:
        super().__init__(config)
        bert = bert_config(config, vocab_size, pad_id, config.text_layers)
        causal = bert_config(config, vocab_size, pad_id, config.text_layers, is_decoder=True)
        self.text_encoder = BertModel(causal, add_pooling_layer=False)
        self.text_decoder = FusionEncoder(fusion_config(bert, config.fusion_layers))
        self.image_decoder = FusionEncoder(fusion_config(bert, config.image_fusion_layers))
        self.word_transform = BertPredictionHeadTransform(bert)
        self.word_bias = nn.Parameter(torch.zeros(vocab_size))
        self.mim_head = MimHead(config, "pixels")

    @property
    def word_embeddings(self) -> Tensor:
        """``[vocab, width]``: embeds words and, tied, scores them."""
        weight: Tensor = self.text_encoder.embeddings.word_embeddings.weight
        return weight

    def read(self, input_ids: Tensor, attended: Tensor) -> Tensor:
        """``[B, T, width]``: each word has seen those before it."""
        hidden: Tensor = self.text_encoder(
            input_ids, attention_mask=attended, use_cache=False
        ).last_hidden_state
        return hidden

    def encode_text(self, input_ids: Tensor, attended: Tensor) -> Tensor:
        """Encode texts ``[B, T]``; the state of the last word stands first."""
        return last_word_first(self.read(input_ids, attended), attended)

    def encode_pair(self, input_ids: Tensor, attended: Tensor, image: Tensor) -> Tensor:
        """Texts that have seen their encoded images; the state of the last word stands first."""
        told = self.describe(self.read(input_ids, attended), attended, image)
        return last_word_first(told, attended)

    def describe(self, words: Tensor, attended: Tensor, image: Tensor) -> Tensor:
        """Words, each knowing those before it only, query the image."""
        fused: Tensor = self.text_decoder(words, attended, image, causal=True)
        return fused

    def draw(self, image: Tensor, words: Tensor, attended: Tensor) -> Tensor:
        """Patches query the words."""
        fused: Tensor = self.image_decoder(image, None, words, attended)
        return fused

    def patch_features(self, image: Tensor) -> Tensor:
        """Unit features ``[B, P, projection]`` of all patches of encoded images."""
        return nn.functional.normalize(self.image_projection(image[:, 1:]), dim=-1)

    def word_features(self, words: Tensor) -> Tensor:
        """Unit features ``[B, T, projection]`` of all words of encoded texts."""
        return nn.functional.normalize(self.text_projection(words), dim=-1)


def last_word_first(words: Tensor, attended: Tensor) -> Tensor:
    """``[B, T, D]`` with the state of the last attended word in the place of the first."""
    last = attended.sum(dim=1) - 1
    rows = torch.arange(len(words), device=words.device)
    return torch.cat([words[rows, last].unsqueeze(1), words[:, 1:]], dim=1)
