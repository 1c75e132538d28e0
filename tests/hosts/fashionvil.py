"""A stand-in for FashionViL (BrandonHanx/mmf): its names and its arithmetic, at any size.

The host itself wants torch 1.9 and transformers 4.10. What it does at the places that the
documentation names is done here in the same way, blemishes included.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, WIDTH, HEADS, FEATURES, CODES = 60, 24, 3, 10, 7
PAD, CLS, SEP, MASK = range(4)
SPECIAL = (PAD, CLS, SEP, MASK)


class SelfAttention(nn.Module):
    """Returns what it mixes the values with: probabilities after dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.num_attention_heads = HEADS
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (
            linear(hidden_states).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5 + attention_mask
        probs = self.dropout(scores.softmax(dim=-1))
        return (probs @ v).transpose(1, 2).flatten(2), probs


class Layer(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.self = SelfAttention(dropout)
        self.intermediate, self.output = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        mixed, probs = self.attention.self(hidden, attention_mask)
        hidden = self.norms[0](hidden + mixed)
        return self.norms[1](hidden + self.output(F.gelu(self.intermediate(hidden)))), probs


class Base(nn.Module):
    """`FashionViLBase`: words first, then patches, no image CLS."""

    def __init__(self, layers: int, dropout: float) -> None:
        super().__init__()
        self.words, self.segments = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(2, WIDTH)
        self.projection, self.kinds = nn.Linear(FEATURES, WIDTH), nn.Embedding(2, WIDTH)
        self.word_places, self.patch_places = nn.Embedding(64, WIDTH), nn.Embedding(64, WIDTH)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Layer(dropout) for _ in range(layers))
        self.pooler = nn.Linear(WIDTH, WIDTH)

    def forward(
        self, parts: list[Tensor], attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        hidden = torch.cat(parts, dim=1)
        added = hidden.new_zeros(())
        if attention_mask is not None:
            added = (1.0 - attention_mask[:, None, None].to(hidden.dtype)) * -10000.0
        attentions = []
        for layer in self.encoder.layer:
            hidden, probs = layer(hidden, added)
            attentions.append(probs)
        return hidden, self.pooler(hidden[:, 0]).tanh(), attentions

    def _text(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        places = self.word_places.weight[: input_ids.shape[1]]
        return self.words(input_ids) + self.segments(token_type_ids) + places

    def get_joint_embedding(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        visual_embeddings: Tensor,
        visual_embeddings_type: Tensor,
        attention_mask: Tensor,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        image = self.projection(visual_embeddings) + self.kinds(visual_embeddings_type)
        image = image + self.patch_places.weight[: image.shape[1]]
        return self.forward([self._text(input_ids, token_type_ids), image], attention_mask)

    def get_image_embedding(self, visual_embeddings: Tensor) -> Tensor:
        return self.projection(visual_embeddings)  # bypass_transformer

    def get_text_embedding(
        self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        return self.forward([self._text(input_ids, token_type_ids)], attention_mask)[0]


class PredictionHead(nn.Module):
    """`BertLMPredictionHead`, tied to the words."""

    def __init__(self, words: nn.Embedding) -> None:
        super().__init__()
        self.transform = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH))
        self.decoder = nn.Linear(WIDTH, VOCABULARY)
        self.decoder.weight = words.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden))


class FashionViL(nn.Module):
    """`FashionViLForPretraining` of the tasks whose lines the documentation changes."""

    def __init__(self, *, layers: int = 2, dropout: float = 0.0, double_view: bool = False) -> None:
        super().__init__()
        self.double_view = double_view
        self.bert = Base(layers, dropout)
        self.norm_s = nn.Parameter(torch.tensor([4.0]))
        self.heads = nn.ModuleDict(
            {
                "itm": nn.Linear(WIDTH, 2),
                "mlm": PredictionHead(self.bert.words),
                "mpfr": nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, FEATURES)),
                "mpfc": nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CODES)),
            }
        )

    def add_post_flatten_params(self, sample_list: dict[str, Any]) -> dict[str, Any]:
        sample_list = dict(sample_list)
        batch, patches, _ = sample_list["image"].shape
        if self.double_view:
            names = ("input_ids", "segment_ids", "input_mask", "image_masks", "input_ids_masked")
            for name in (*names, "lm_label_ids"):
                sample_list[name] = sample_list[name].repeat(2, 1)
            sample_list["targets"] = sample_list["targets"].repeat(2)
        sample_list["visual_embeddings_type"] = torch.zeros((batch, patches)).long()
        ones = torch.ones((batch, patches)).long()
        sample_list["attention_mask"] = torch.cat((sample_list["input_mask"], ones), dim=-1)
        kept = (sample_list["image_masks"] == 0).float().unsqueeze(-1)
        sample_list["masked_image"] = sample_list["image"] * kept
        return sample_list

    def itc_embeddings(self, sample_list: dict[str, Any]) -> tuple[Tensor, Tensor]:
        text = self.bert.get_text_embedding(
            sample_list["input_ids"], sample_list["segment_ids"], sample_list["input_mask"]
        )
        masks = sample_list["input_mask"]
        text = (text * masks.unsqueeze(2)).sum(dim=1) / masks.sum(dim=1, keepdim=True)
        image = self.bert.get_image_embedding(sample_list["image"]).mean(dim=1)
        return self.norm_s * F.normalize(image, dim=-1), self.norm_s * F.normalize(text, dim=-1)

    @torch.no_grad()
    def get_hard_pairs(self, sample_list: dict[str, Any], coins: Tensor) -> dict[str, Any]:
        image, text = self.itc_embeddings(sample_list)
        combine_index, combine_index_index = self.pairs(image @ text.t(), coins)
        sample_list = dict(sample_list)
        for name in ("input_ids", "segment_ids", "input_mask", "attention_mask"):
            sample_list[name] = sample_list[name][combine_index]
        sample_list["targets"] = sample_list["targets"].clone()
        sample_list["targets"][combine_index_index] = 0
        return sample_list

    def pairs(self, correlations: Tensor, coins: Tensor) -> tuple[Tensor, Tensor]:
        """The lines of `get_hard_pairs` that choose; `coins` are its `torch.rand(B)`."""
        batch = correlations.shape[0]
        diag = torch.eye(batch).bool()
        if self.double_view:
            half = batch // 2
            diag[:half, half:] = diag[:half, :half]
            diag[half:, :half] = diag[:half, :half]
        correlations[diag] = -1
        chosen = coins > 0.5
        combine_index = torch.arange(batch)
        combine_index[chosen] = correlations.argmax(dim=1)[chosen]
        return combine_index, chosen

    def joint(self, sample_list: dict[str, Any], words: str, image: str) -> tuple[Tensor, Tensor]:
        hidden, pooled, _ = self.bert.get_joint_embedding(
            sample_list[words],
            sample_list["segment_ids"],
            sample_list[image],
            sample_list["visual_embeddings_type"],
            sample_list["attention_mask"],
        )
        return hidden, pooled

    def forward(self, sample_list: dict[str, Any]) -> Tensor:
        """The loss of ``sample_list["task"]``, of a `sample_list` with its post-flatten params."""
        if sample_list["task"] == "itc":
            image, text = self.itc_embeddings(sample_list)
            logits, labels = image @ text.t(), torch.arange(len(image))
            return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
        if sample_list["task"] == "itm":
            sample_list = self.get_hard_pairs(sample_list, sample_list["coins"])
            pooled = self.joint(sample_list, "input_ids", "image")[1]
            return F.cross_entropy(self.heads["itm"](pooled), sample_list["targets"])
        patches = sample_list["image"].shape[1]
        if sample_list["task"] == "mlm":
            hidden = self.joint(sample_list, "input_ids_masked", "image")[0][:, :-patches]
            return self.mlm_loss(hidden, sample_list)
        hidden = self.joint(sample_list, "input_ids", "masked_image")[0][:, -patches:]
        return self.patch_loss(hidden, sample_list)

    def mlm_loss(self, hidden: Tensor, sample_list: dict[str, Any]) -> Tensor:
        logits = self.heads["mlm"](hidden).flatten(0, 1)
        return F.cross_entropy(logits, sample_list["lm_label_ids"].flatten(), ignore_index=-1)

    def patch_loss(self, hidden: Tensor, sample_list: dict[str, Any]) -> Tensor:
        mask = sample_list["image_masks"] == 1
        predicted = self.heads[sample_list["task"]](hidden[mask])
        if sample_list["task"] == "mpfr":
            return F.mse_loss(predicted, sample_list["image"][mask].detach())
        return F.cross_entropy(predicted, sample_list["codes"][mask])


def sample_lists(
    seed: int, batch: int = 6, words: int = 9, patches: int = 8, views: int = 1
) -> Iterator[dict[str, Any]]:
    """Batches without end, as the host's loader gives them: random masks, padded captions."""
    draw = torch.Generator().manual_seed(seed)
    rand = SimpleNamespace(
        ints=lambda high, *size, low=0: torch.randint(low, high, size, generator=draw),
        floats=lambda *size: torch.randn(size, generator=draw),
        coins=lambda *size: torch.rand(size, generator=draw),
    )
    while True:
        lengths = rand.ints(words + 1, batch, 1, low=words // 2)
        places = torch.arange(words)
        input_ids = rand.ints(VOCABULARY, batch, words, low=len(SPECIAL))
        input_ids[:, 0] = CLS
        input_ids[places == lengths - 1] = SEP
        input_ids[places >= lengths] = PAD
        word = ~torch.isin(input_ids, torch.tensor(SPECIAL))
        masked = word & (rand.coins(batch, words) < 0.3)
        yield {
            "input_ids": input_ids,
            "segment_ids": torch.zeros_like(input_ids),
            "input_mask": (places < lengths).long(),
            "input_ids_masked": input_ids.masked_fill(masked, MASK),
            "lm_label_ids": input_ids.masked_fill(~masked, -1),
            "image": rand.floats(views * batch, patches, FEATURES),
            "image_masks": (rand.coins(batch, patches) < 0.3).long(),
            "codes": rand.ints(CODES, views * batch, patches),
            "targets": torch.ones(batch, dtype=torch.long),
            "coins": rand.coins(views * batch),
        }
