"""A stand-in for ALBEF (salesforce/ALBEF): its names and its losses, in plain PyTorch, small."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.hosts.albef import TOKENIZER, Size


class SelfAttention(nn.Module):
    """Keeps its probabilities where `save_attention` is on, and drops out a copy."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_attention_heads = config.heads
        self.query, self.key, self.value = (nn.Linear(config.width, config.width) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)
        self.save_attention = False

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_value: None = None,
    ) -> Tensor:
        crossed = encoder_hidden_states is not None
        source, mask = hidden_states, attention_mask
        if crossed:
            source, mask = encoder_hidden_states, encoder_attention_mask
        q, k, v = (
            layer(x).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, hidden_states), (self.key, source), (self.value, source))
        )
        probs = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask).softmax(dim=-1)
        if crossed and self.save_attention:
            self.attention_map = probs
            probs.register_hook(lambda grad: None)
        return (self.dropout(probs) @ v).transpose(1, 2).flatten(2)

    def get_attention_map(self) -> Tensor:
        return self.attention_map


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.dense, self.norm = nn.Linear(config.width, config.width), nn.LayerNorm(config.width)

    def forward(self, hidden: Tensor, *given: Any) -> Tensor:
        return self.norm(hidden + self.dense(self.self(hidden, *given)))


class Layer(nn.Module):
    """Attends to the image from the fusion layer on."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        self.attention = Attention(config)
        if index >= config.fusion_layer:
            self.crossattention = Attention(config)
        self.up, self.down = (
            nn.Linear(config.width, 2 * config.width),
            nn.Linear(2 * config.width, config.width),
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, hidden: Tensor, mask: Tensor, image: Tensor | None, seen: Tensor) -> Tensor:
        hidden = self.attention(hidden, mask)
        if hasattr(self, "crossattention"):
            hidden = self.crossattention(hidden, mask, None, image, seen)
        return self.norm(hidden + self.down(F.gelu(self.up(hidden))))


class Bert(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.places = nn.Embedding(64, config.width)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Layer(config, i) for i in range(config.text_layers))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        return_dict: bool | None = None,
        mode: str = "multi_modal",
    ) -> Any:
        hidden = encoder_embeds
        if hidden is None:
            places = self.places.weight[: input_ids.shape[1]]
            hidden = self.embeddings.word_embeddings(input_ids) + places
        begin = self.config.fusion_layer if mode == "fusion" else 0
        end = self.config.fusion_layer if mode == "text" else self.config.text_layers
        mask = (1.0 - attention_mask[:, None, None].to(hidden.dtype)) * -10000.0
        for layer in self.encoder.layer[begin:end]:
            hidden = layer(hidden, mask, encoder_hidden_states, hidden.new_zeros(1, 1, 1, 1))
        return SimpleNamespace(last_hidden_state=hidden)


class MaskedLM(nn.Module):
    """The head of BERT: a transform, and a layer that shares its weights with the embeddings."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.bert = config, Bert(config)
        self.cls = nn.Module()
        self.cls.predictions = nn.Module()
        self.cls.predictions.transform = nn.Sequential(
            nn.Linear(config.width, config.width), nn.GELU(), nn.LayerNorm(config.width)
        )
        self.cls.predictions.decoder = nn.Linear(config.width, config.vocab_size)
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def logits(self, *given: Any) -> Tensor:
        input_ids, attention_mask, image = given
        hidden = self.bert(input_ids, attention_mask, encoder_hidden_states=image).last_hidden_state
        return self.cls.predictions.decoder(self.cls.predictions.transform(hidden))


class VisualEncoder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, config.width, 16, 16)
        self.cls_token = nn.Parameter(torch.randn(1, 1, config.width))
        self.mix, self.norm = nn.Linear(config.width, config.width), nn.LayerNorm(config.width)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1) + x.mean(1, keepdim=True), x], dim=1)
        return self.norm(x + self.mix(x).tanh())


class ALBEF(nn.Module):
    """Pretraining: MLM with distillation, ITC with queues, ITM with hard negatives."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer, self.mlm_probability, self.momentum = tokenizer, 0.15, 0.9
        for suffix in ("", "_m"):
            setattr(self, f"visual_encoder{suffix}", VisualEncoder(config))
            setattr(self, f"vision_proj{suffix}", nn.Linear(config.width, config.embed))
            setattr(self, f"text_encoder{suffix}", MaskedLM(config))
            setattr(self, f"text_proj{suffix}", nn.Linear(config.width, config.embed))
        self.itm_head = nn.Linear(config.width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))
        names = ("visual_encoder", "vision_proj", "text_encoder", "text_proj")
        self.model_pairs = [[getattr(self, name), getattr(self, f"{name}_m")] for name in names]
        for student, teacher in self.model_pairs:
            teacher.load_state_dict(student.state_dict())
            teacher.requires_grad_(False)
        for name in ("image_queue", "text_queue"):
            queue = F.normalize(torch.randn(config.embed, config.queue), dim=0)
            self.register_buffer(name, queue)
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, image: Tensor, text: Any, alpha: float = 0) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        seen, read, image_feat, text_feat = self._encode(image, text, "")
        with torch.no_grad():
            self._momentum_update()
            seen_m, _, image_key, text_key = self._encode(image, text, "_m")
            images = torch.cat([image_key.T, self.image_queue], dim=1)
            texts = torch.cat([text_key.T, self.text_queue], dim=1)
        pairs, own = len(image), torch.eye(len(image), images.shape[1])
        itc, sims = 0.0, []
        for feat, key, others in ((image_feat, image_key, texts), (text_feat, text_key, images)):
            soft = (key @ others / self.temp).detach().softmax(dim=1)
            sims.append(feat @ others / self.temp)
            target = alpha * soft + (1 - alpha) * own
            itc = itc - (target * sims[-1].log_softmax(dim=1)).sum(dim=1).mean() / 2
        self._dequeue_and_enqueue(image_key, text_key)

        weights = [sim[:, :pairs].detach().softmax(dim=1).fill_diagonal_(0) for sim in sims]
        wrong_images = [int(torch.multinomial(row, 1)) for row in weights[1]]
        wrong_texts = [int(torch.multinomial(row, 1)) for row in weights[0]]
        attended = text.attention_mask
        fused = [
            self.text_encoder.bert(None, mask, x, y, mode="fusion").last_hidden_state[:, 0]
            for mask, x, y in (
                (attended, read, seen),
                (attended, read, seen[wrong_images]),
                (attended[wrong_texts], read[wrong_texts], seen),
            )
        ]
        matched = torch.arange(3 * pairs) < pairs
        itm = F.cross_entropy(self.itm_head(torch.cat(fused)), matched.long())

        drawn = torch.full(text.input_ids.shape, self.mlm_probability)
        vocabulary = self.text_encoder.config.vocab_size
        words, labels = self.mask(
            text.input_ids.clone(),
            vocabulary,
            image.device,
            targets=text.input_ids.clone(),
            probability_matrix=drawn,
        )
        with torch.no_grad():
            soft = self.text_encoder_m.logits(words, attended, seen_m).softmax(dim=-1)
        logits = self.text_encoder.logits(words, attended, seen)
        hard = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        distilled = -(logits.log_softmax(dim=-1) * soft).sum(dim=-1)[labels != -100].mean()
        return (1 - alpha) * hard + alpha * distilled, itc, itm

    def _encode(self, image: Tensor, text: Any, suffix: str) -> tuple[Tensor, ...]:
        seen = getattr(self, f"visual_encoder{suffix}")(image)
        bert = getattr(self, f"text_encoder{suffix}").bert
        read = bert(text.input_ids, text.attention_mask, mode="text").last_hidden_state
        feats = (
            F.normalize(getattr(self, f"{name}{suffix}")(x[:, 0]), dim=-1)
            for name, x in (("vision_proj", seen), ("text_proj", read))
        )
        return seen, read, *feats

    @torch.no_grad()
    def _momentum_update(self) -> None:
        for student, teacher in self.model_pairs:
            for s, t in zip(student.parameters(), teacher.parameters(), strict=True):
                t.data = t.data * self.momentum + s.data * (1 - self.momentum)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, image_feat: Tensor, text_feat: Tensor) -> None:
        at = int(self.queue_ptr)
        for queue, keys in ((self.image_queue, image_feat), (self.text_queue, text_feat)):
            queue[:, at : at + len(keys)] = keys.T
        self.queue_ptr[0] = (at + len(image_feat)) % self.image_queue.shape[1]

    def mask(
        self,
        input_ids: Tensor,
        vocab_size: int,
        device: Any,
        targets: Tensor,
        masked_indices: Tensor | None = None,
        probability_matrix: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if masked_indices is None:
            masked_indices = torch.bernoulli(probability_matrix).bool()
        for special in (self.tokenizer.pad_token_id, self.tokenizer.cls_token_id):
            masked_indices = masked_indices & (input_ids != special)
        words = torch.where(masked_indices, self.tokenizer.mask_token_id, input_ids)
        return words, torch.where(masked_indices, targets, -100)


def standin(size: Size) -> ALBEF:
    return ALBEF(SimpleNamespace(**size._asdict(), vocab_size=size.vocabulary), TOKENIZER)
