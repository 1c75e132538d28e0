"""What stands in for TorchMultimodal's ALBEF: its published names, written from scratch, small."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TextOutput(NamedTuple):
    last_hidden_state: Tensor


class SelfAttention(nn.Module):
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        if attention_mask is not None:
            logits = logits.masked_fill(attention_mask == 0, float("-inf"))
        weights = logits.softmax(dim=-1)
        return weights @ v, weights


class MultiHeadAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_head = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.attn = SelfAttention()

    def forward(
        self, q: Tensor, kv: Tensor, return_attn_weights: bool = False, **options: Any
    ) -> Any:
        q, k, v = (
            project(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
            for project, x in ((self.query, q), (self.key, kv), (self.value, kv))
        )
        out, weights = self.attn(q, k, v, **options)
        out = self.output(out.transpose(1, 2).flatten(2))
        return (out, weights) if return_attn_weights else out


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(width, heads)
        self.cross_attention = MultiHeadAttention(width, heads)
        self.feedforward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(
        self, hidden: Tensor, context: Tensor, mask: Tensor, context_mask: Tensor | None
    ) -> Tensor:
        first, second, third = self.norms
        hidden = first(hidden + self.attention(hidden, hidden, attention_mask=mask))
        hidden = second(hidden + self.cross_attention(hidden, context, attention_mask=context_mask))
        return third(hidden + self.feedforward(hidden))


class ALBEFMultimodalEncoder(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(width, heads) for _ in range(layers))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        mask = attention_mask[:, None, None, :]
        if encoder_attention_mask is not None:
            encoder_attention_mask = encoder_attention_mask[:, None, None, :]
        for layer in self.layer:
            hidden_states = layer(
                hidden_states, encoder_hidden_states, mask, encoder_attention_mask
            )
        return hidden_states


class TextEncoder(nn.Module):
    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)

    def forward(self, text: Tensor, text_atts: Tensor) -> TextOutput:
        words = self.embeddings(text)
        mean = (words * text_atts.unsqueeze(-1)).mean(dim=1, keepdim=True)
        return TextOutput(torch.tanh(self.mix(words + mean)))


class VisionEncoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.mix = nn.Linear(width, width)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patches(image).flatten(2).mT
        return torch.tanh(self.mix(torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1)))


def _teacher_of(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def _move(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    for p, p_m in zip(student.parameters(), teacher.parameters(), strict=True):
        p_m.data = momentum * p_m.data + (1 - momentum) * p.data


class ALBEFModel(nn.Module):
    def __init__(
        self,
        vision_encoder: nn.Module,
        text_encoder: nn.Module,
        multimodal_encoder: nn.Module,
        momentum: float = 0.995,
    ) -> None:
        super().__init__()
        self.vision_encoder, self.vision_encoder_m = vision_encoder, _teacher_of(vision_encoder)
        self.text_encoder, self.text_encoder_m = text_encoder, _teacher_of(text_encoder)
        self.multimodal_encoder = multimodal_encoder
        self.multimodal_encoder_m = _teacher_of(multimodal_encoder)
        self.momentum = momentum


class ALBEFModelWithSimilarity(nn.Module):
    def __init__(
        self,
        albef_model: ALBEFModel,
        vision_proj: nn.Linear,
        text_proj: nn.Linear,
        embed_size: int = 256,
        queue_size: int = 65536,
        mask_token_id: int = -100,
        temp: float = 0.07,
    ) -> None:
        super().__init__()
        self.albef_model = albef_model
        self.vision_proj, self.vision_proj_m = vision_proj, _teacher_of(vision_proj)
        self.text_proj, self.text_proj_m = text_proj, _teacher_of(text_proj)
        self.queue_size = queue_size
        self.temp = nn.Parameter(torch.tensor(temp))
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, F.normalize(torch.randn(embed_size, queue_size), dim=0))
        self.register_buffer("idx_queue", torch.full((1, queue_size), mask_token_id))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))


class ImageTextContrastiveLoss(nn.Module):
    def forward(
        self, i2t: Tensor, t2i: Tensor, i2t_m: Tensor, t2i_m: Tensor, targets: Tensor, alpha: float
    ) -> Tensor:
        loss = i2t.new_zeros(())
        for sim, sim_m in ((i2t, i2t_m), (t2i, t2i_m)):
            soft = alpha * sim_m.softmax(dim=1) + (1 - alpha) * targets
            loss = loss - (soft * sim.log_softmax(dim=1)).sum(dim=1).mean() / 2
        return loss


class ALBEFModelForRetrieval(nn.Module):
    def __init__(
        self,
        model_with_similarity: ALBEFModelWithSimilarity,
        itc_loss: ImageTextContrastiveLoss,
        hidden_size: int,
    ) -> None:
        super().__init__()
        self.model_with_similarity = model_with_similarity
        self.itc_loss = itc_loss
        self.itm_head = nn.Linear(hidden_size, 2)

    def forward(
        self, image: Tensor, text: Tensor, text_atts: Tensor, idx: Tensor, alpha: float = 0.0
    ) -> Tensor:
        return self._train_forward(image, text, text_atts, idx, alpha)

    def _train_forward(
        self, image: Tensor, text: Tensor, text_atts: Tensor, idx: Tensor, alpha: float
    ) -> Tensor:
        sim: Any = self.model_with_similarity
        base = sim.albef_model
        seen, read = base.vision_encoder(image), base.text_encoder(text, text_atts)[0]
        feats = [
            F.normalize(project(x[:, 0]), dim=-1)
            for project, x in ((sim.vision_proj, seen), (sim.text_proj, read))
        ]
        for owner, name in (
            (base, "vision_encoder"),
            (base, "text_encoder"),
            (base, "multimodal_encoder"),
            (sim, "vision_proj"),
            (sim, "text_proj"),
        ):
            _move(getattr(owner, name), getattr(owner, f"{name}_m"), base.momentum)
        with torch.no_grad():
            keys = [
                F.normalize(project(x[:, 0]), dim=-1)
                for project, x in (
                    (sim.vision_proj_m, base.vision_encoder_m(image)),
                    (sim.text_proj_m, base.text_encoder_m(text, text_atts)[0]),
                )
            ]
        images = torch.cat([keys[0].T, sim.image_queue.clone()], dim=1)
        texts = torch.cat([keys[1].T, sim.text_queue.clone()], dim=1)
        same = (idx.view(-1, 1) == torch.cat([idx.view(1, -1), sim.idx_queue], dim=1)).to(seen)
        i2t, t2i = feats[0] @ texts / sim.temp, feats[1] @ images / sim.temp
        with torch.no_grad():
            i2t_m, t2i_m = keys[0] @ texts / sim.temp, keys[1] @ images / sim.temp
        itc = self.itc_loss(i2t, t2i, i2t_m, t2i_m, same / same.sum(dim=1, keepdim=True), alpha)

        pairs, start = len(idx), int(sim.queue_ptr)
        for queue, new in ((sim.image_queue, keys[0].T), (sim.text_queue, keys[1].T)):
            queue[:, start : start + pairs] = new
        sim.idx_queue[0, start : start + pairs] = idx
        sim.queue_ptr[0] = (start + pairs) % sim.queue_size

        drawn = []
        for logits in (t2i, i2t):
            weights = logits[:, :pairs].detach().softmax(dim=1)
            weights.fill_diagonal_(0)
            drawn.append([int(torch.multinomial(row, 1)) for row in weights])
        wrong_images, wrong_texts = drawn
        fuse = base.multimodal_encoder
        right = fuse(read, text_atts, seen)
        wrong = fuse(
            torch.cat([read, torch.stack([read[i] for i in wrong_texts])]),
            torch.cat([text_atts, torch.stack([text_atts[i] for i in wrong_texts])]),
            torch.cat([torch.stack([seen[i] for i in wrong_images]), seen]),
        )
        labels = torch.cat([torch.ones(pairs), torch.zeros(2 * pairs)]).long()
        logits = self.itm_head(torch.cat([right[:, 0], wrong[:, 0]]))
        return itc + F.cross_entropy(logits, labels)
