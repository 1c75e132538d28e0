"""Stand-ins for GRIT-VLP and FashionSAP: their names and their losses, in plain PyTorch, small."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.hosts import albef_standin
from tests.hosts.albef import TOKENIZER, Size
from tests.hosts.children import REPLACE_KINDS


def _config(size: Size) -> SimpleNamespace:
    return SimpleNamespace(**size._asdict(), vocab_size=size.vocabulary)


def _match(bert: Any, head: nn.Module, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """pairs of (mask, text, image), the right ones first."""
    fused = [
        bert(
            attention_mask=mask, encoder_embeds=text, encoder_hidden_states=image, mode="fusion"
        ).last_hidden_state[:, 0]
        for mask, text, image in pairs
    ]
    right = torch.arange(len(torch.cat(fused))) < len(fused[0])
    return F.cross_entropy(head(torch.cat(fused)), right.long())


class GritVLP(nn.Module):
    """`ALBEF_Base` of `models/model_pretrain_GRIT_VLP.py`."""

    mask = albef_standin.ALBEF.mask

    def __init__(self, size: Size) -> None:
        super().__init__()
        config = _config(size)
        self.tokenizer, self.mlm_probability = TOKENIZER, 0.5
        self.visual_encoder = albef_standin.VisualEncoder(config)
        self.text_encoder = albef_standin.MaskedLM(config)
        self.vision_proj = nn.Linear(size.width, size.embed)
        self.text_proj = nn.Linear(size.width, size.embed)
        self.itm_head = nn.Linear(size.width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))

    def forward(self, image: Tensor, text: Any) -> tuple[Tensor, ...]:
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        ids, attended, bert = text.input_ids, text.attention_mask, self.text_encoder.bert
        seen = self.visual_encoder(image)
        read = bert(ids, attended, mode="text").last_hidden_state
        image_feat = F.normalize(self.vision_proj(seen[:, 0]), dim=-1)
        text_feat = F.normalize(self.text_proj(read[:, 0]), dim=-1)
        sims = [
            a @ b.detach().T / self.temp
            for a, b in ((image_feat, text_feat), (text_feat, image_feat))
        ]
        itc = torch.zeros(())
        for sim, other in (sims, sims[::-1]):
            log = sim.log_softmax(dim=1)
            itc = itc - log.diagonal().mean() / 2
            itc = itc - 0.2 * (log * other.detach().softmax(dim=1)).sum(dim=1).mean() / 2

        hardest = [sim.detach().softmax(dim=1).fill_diagonal_(0).topk(1).indices for sim in sims]
        wrong_texts, wrong_images = (found.squeeze(1) for found in hardest)
        pairs = [
            (attended, read, seen),
            (attended, read, seen[wrong_images]),
            (attended[wrong_texts], read[wrong_texts], seen),
        ]
        itm = _match(bert, self.itm_head, pairs)

        drawn = torch.full(ids.shape, self.mlm_probability)
        vocabulary = self.text_encoder.config.vocab_size
        words, labels = self.mask(
            ids.clone(), vocabulary, image.device, targets=ids.clone(), probability_matrix=drawn
        )
        logits = self.text_encoder.logits(words, attended, seen)
        mlm = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return mlm, itc, itm, image_feat.detach().clone(), text_feat.detach().clone()


class Grit:
    """`GRIT.grouping`: a greedy chain over softmaxes, of which used ones become 0."""

    def grouping(self, images: Tensor, texts: Tensor, ids: Tensor, temp: Any) -> list[Tensor]:
        i2t = (images.T @ texts / temp).softmax(dim=1).fill_diagonal_(0)
        t2i = (texts.T @ images / temp).softmax(dim=1).fill_diagonal_(0)
        at, order = int(torch.randint(0, len(ids) - 1, (1,))), []
        for step in range(len(ids)):
            order.append(ids[at].long())
            found = int((i2t if step % 2 == 0 else t2i)[at].argmax())
            for matrix in (i2t, t2i):
                matrix[at, :] = 0
                matrix[:, at] = 0
            at = found
        return order


class FashionSAP(nn.Module):
    """`FashionSAP` of `models/model_fashion_pretrain.py`."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        config, square = _config(size), (size.embed, size.embed)
        for suffix in ("", "_m"):
            setattr(self, f"visual_encoder{suffix}", albef_standin.VisualEncoder(config))
            setattr(self, f"text_encoder{suffix}", albef_standin.Bert(config))
            setattr(self, f"vision_proj{suffix}", nn.Linear(size.width, size.embed))
            setattr(self, f"text_proj{suffix}", nn.Linear(size.width, size.embed))
            setattr(self, f"combine_vision_proj{suffix}", nn.Linear(*square))
            setattr(self, f"combine_text_proj{suffix}", nn.Linear(*square))
        self.itm_head = nn.Linear(size.width, 2)
        head = albef_standin.MaskedLM(config).cls
        head.predictions.decoder = nn.Linear(size.width, size.vocabulary)  # not tied
        self.decoder_layer = head
        self.replace_predict_layer = nn.Linear(size.width, REPLACE_KINDS)
        self.temp, self.momentum = nn.Parameter(torch.tensor(0.07)), 0.9
        names = [name for name, _ in self.named_children() if hasattr(self, f"{name}_m")]
        self.model_pairs = [[getattr(self, name), getattr(self, f"{name}_m")] for name in names]
        for student, teacher in self.model_pairs:
            teacher.load_state_dict(student.state_dict())
            teacher.requires_grad_(False)
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, F.normalize(torch.randn(size.embed, size.queue), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.register_buffer("idx_queue", torch.full((1, size.queue), -100))

    def _encode(self, image: Tensor, ids: Tensor, mask: Tensor, suffix: str) -> tuple[Tensor, ...]:
        def features(kind: str, hidden: Tensor) -> Tensor:
            projected = getattr(self, f"{kind}_proj{suffix}")(hidden)
            return F.normalize(getattr(self, f"combine_{kind}_proj{suffix}")(projected), dim=-1)

        seen = getattr(self, f"visual_encoder{suffix}")(image)
        read = getattr(self, f"text_encoder{suffix}")(ids, mask, mode="text").last_hidden_state
        image_feat = features("vision", seen[:, 0])
        return seen, read, image_feat, features("text", read[:, 0]), features("text", read[:, 1])

    def forward(
        self,
        image: Tensor,
        text_input_ids: Tensor,
        text_attention_mask: Tensor,
        alpha: float,
        idx: Tensor,
        mask_labels: Tensor,
        replace_labels: Tensor,
    ) -> tuple[Tensor, ...]:
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        attended, idx = text_attention_mask, idx.view(-1, 1)
        seen, read, image_feat, text_feat, symbol = self._encode(
            image, text_input_ids, attended, ""
        )
        same = (idx == torch.cat([idx.T, self.idx_queue], dim=1)).to(image.dtype)
        with torch.no_grad():
            self._momentum_update()
            _, _, image_key, text_key, _ = self._encode(image, text_input_ids, attended, "_m")
            images = torch.cat([image_key.T, self.image_queue], dim=1)
            texts = torch.cat([text_key.T, self.text_queue], dim=1)
        itc, sims = torch.zeros(()), []
        for feat, key, others in ((image_feat, image_key, texts), (text_feat, text_key, images)):
            soft = (key @ others / self.temp).detach().softmax(dim=1)
            target = alpha * soft + (1 - alpha) * same / same.sum(dim=1, keepdim=True)
            sims.append(feat @ others / self.temp)
            itc = itc - (target * sims[-1].log_softmax(dim=1)).sum(dim=1).mean() / 2
        self._dequeue_and_enqueue(image_key, text_key, idx)

        size = len(image)
        weights = []
        for sim in sims:
            weight = sim[:, :size].detach().clone().fill_diagonal_(-1000)
            weights.append(weight.softmax(dim=1).fill_diagonal_(0))
        wrong_images = [int(torch.multinomial(row, 1)) for row in weights[1]]
        wrong_texts = [int(torch.multinomial(row, 1)) for row in weights[0]]
        pairs = [
            (attended, read, seen),
            (attended, read, seen[wrong_images]),
            (attended[wrong_texts], read[wrong_texts], seen),
        ]
        itm = _match(self.text_encoder, self.itm_head, pairs)
        fused = self.text_encoder(None, attended, read, seen, mode="fusion").last_hidden_state
        head = self.decoder_layer.predictions
        words = head.decoder(head.transform(fused)).flatten(0, 1)
        replaced = self.replace_predict_layer(fused).flatten(0, 1)
        return (
            itc,
            itm,
            1 - ((symbol * image_feat).sum(dim=-1) + 1).mean() / 2,
            F.cross_entropy(words, mask_labels.flatten()),
            F.cross_entropy(replaced, replace_labels.flatten()),
        )

    _momentum_update = albef_standin.ALBEF._momentum_update

    @torch.no_grad()
    def _dequeue_and_enqueue(self, image_feat: Tensor, text_feat: Tensor, idx: Tensor) -> None:
        at = int(self.queue_ptr)
        queues = (self.image_queue, image_feat), (self.text_queue, text_feat), (self.idx_queue, idx)
        for queue, keys in queues:
            queue[:, at : at + len(keys)] = keys.T
        self.queue_ptr[0] = (at + len(image_feat)) % self.image_queue.shape[1]
