"""A stand-in for FashionViL (BrandonHanx/mmf): its names and losses, in plain PyTorch, small."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, WIDTH, HEADS, FEATURES = 60, 24, 3, 10
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
        self.attention: Any = nn.Module()
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
        self.config = SimpleNamespace(vocab_size=VOCABULARY)
        self.words, self.segments = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(2, WIDTH)
        self.projection, self.kinds = nn.Linear(FEATURES, WIDTH), nn.Embedding(2, WIDTH)
        self.word_places, self.patch_places = nn.Embedding(64, WIDTH), nn.Embedding(64, WIDTH)
        self.encoder: Any = nn.Module()
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

    def get_image_embedding(self, visual_embeddings: Tensor, kinds: Tensor) -> tuple[Any, ...]:
        return self.projection(visual_embeddings), None, None  # bypass_transformer

    def get_text_embedding(
        self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        return self.forward([self._text(input_ids, token_type_ids)], attention_mask)


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
    """`FashionViLForPretraining`, of the tasks that masks and hard pairs are for."""

    def __init__(self, *, layers: int = 2, dropout: float = 0.0, double_view: bool = False) -> None:
        super().__init__()
        self.double_view = double_view
        self.bert = Base(layers, dropout)
        self.contrastive_norm: Any = nn.Module()
        self.contrastive_norm.norm_s = nn.Parameter(torch.tensor([4.0]))
        self.heads = nn.ModuleDict(
            {
                "itm": nn.Linear(WIDTH, 2),
                "mlm": PredictionHead(self.bert.words),
                "mpfr": nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, FEATURES)),
            }
        )

    def get_joint_embedding(self, *given: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        return self.bert.get_joint_embedding(*given)

    def add_post_flatten_params(self, sample_list: dict[str, Any]) -> dict[str, Any]:
        batch, patches, _ = sample_list["image"].shape
        if self.double_view and self.training:
            names = ["input_ids", "segment_ids", "input_mask"]
            if sample_list["task"] == "mlm":
                names += ["input_ids_masked", "lm_label_ids"]
            for name in names:
                sample_list[name] = sample_list[name].repeat(2, 1)
            sample_list["targets"] = sample_list["targets"].repeat(2)
        sample_list["visual_embeddings_type"] = torch.zeros((batch, patches)).long()
        if sample_list["task"] != "itc":
            ones = torch.ones((batch, patches)).long()
            sample_list["attention_mask"] = torch.cat((sample_list["input_mask"], ones), dim=-1)
        if sample_list["task"] == "mpfr":
            if self.double_view:
                sample_list["image_masks"] = sample_list["image_masks"].repeat(2, 1)
            kept = (sample_list["image_masks"] == 0).float().unsqueeze(-1)
            sample_list["masked_image"] = sample_list["image"] * kept
        return sample_list

    def forward(self, sample_list: dict[str, Any]) -> dict[str, Any]:
        sample_list = self.add_post_flatten_params(sample_list)
        return getattr(self, f"_forward_{sample_list['task']}")(sample_list)

    def _forward_itc(self, sample_list: dict[str, Any]) -> dict[str, Any]:
        text, _, _ = self.bert.get_text_embedding(
            sample_list["input_ids"], sample_list["segment_ids"], sample_list["input_mask"]
        )
        masks = sample_list["input_mask"]
        text = (text * masks.unsqueeze(2)).sum(dim=1) / masks.sum(dim=1, keepdim=True)
        image, _, _ = self.bert.get_image_embedding(
            sample_list["image"], sample_list["visual_embeddings_type"]
        )
        image = image.mean(dim=1)
        image, text = (
            self.contrastive_norm.norm_s * F.normalize(features, dim=-1)
            for features in (image, text)
        )
        logits, labels = image @ text.t(), torch.arange(len(image))
        loss = F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)
        return {"scores": image, "targets": text, "losses": {"itc_loss": loss / 2}}

    @torch.no_grad()
    def get_hard_pairs(self, sample_list: dict[str, Any]) -> dict[str, Any]:
        found = self._forward_itc(sample_list)
        correlations = found["scores"] @ found["targets"].t()
        batch = len(correlations)
        items = torch.arange(batch) % (batch // 2 if self.double_view else batch)
        correlations[items[:, None] == items] = -1
        chosen = torch.rand(batch) > 0.5
        combine_index = torch.where(chosen, correlations.argmax(dim=1), torch.arange(batch))
        for name in ("input_ids", "segment_ids", "input_mask", "attention_mask"):
            sample_list[name] = sample_list[name][combine_index]
        sample_list["targets"][chosen] = 0
        return sample_list

    def _joint(self, sample_list: dict[str, Any], words: str, image: str) -> tuple[Tensor, Tensor]:
        hidden, pooled, _ = self.get_joint_embedding(
            sample_list[words],
            sample_list["segment_ids"],
            sample_list[image],
            sample_list["visual_embeddings_type"],
            sample_list["attention_mask"],
        )
        return hidden, pooled

    def _forward_itm(self, sample_list: dict[str, Any]) -> dict[str, Any]:
        sample_list = self.get_hard_pairs(sample_list)
        logits = self.heads["itm"](self._joint(sample_list, "input_ids", "image")[1])
        loss = F.cross_entropy(logits, sample_list["targets"])
        return {"scores": logits, "losses": {"itm_loss": loss}}

    def _forward_mlm(self, sample_list: dict[str, Any]) -> dict[str, Any]:
        patches = sample_list["image"].shape[1]
        hidden, _ = self._joint(sample_list, "input_ids_masked", "image")
        logits = self.heads["mlm"](hidden[:, :-patches]).flatten(0, 1)
        labels = sample_list["lm_label_ids"].flatten()
        loss = F.cross_entropy(logits, labels, ignore_index=-1)
        return {"scores": logits, "losses": {"mlm_loss": loss}}

    def _forward_mpfr(self, sample_list: dict[str, Any]) -> dict[str, Any]:
        mask = sample_list["image_masks"] == 1
        hidden, _ = self._joint(sample_list, "input_ids", "masked_image")
        predicted = self.heads["mpfr"](hidden[:, -mask.shape[1] :][mask])
        loss = F.mse_loss(predicted, sample_list["image"][mask].detach())
        return {"scores": predicted, "losses": {"mpfr_loss": loss}}


def sample_lists(
    seed: int, batch: int = 6, words: int = 9, patches: int = 8, views: int = 1
) -> Iterator[dict[str, Any]]:
    """Batches without end, as the host's are after its image encoder: masked at random, padded."""
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
            "targets": torch.ones(batch, dtype=torch.long),
        }
