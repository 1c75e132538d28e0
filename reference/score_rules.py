"""Every rule we know that scores words and patches by a teacher's view of a pair.

`reference.masks` trains with a few of them; `reference.ablate` compares them all. A rule that reads
an attention exists once for each of its layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import syncmask_kernels as smk
from reference.batch import Batch
from reference.masks import image_effect, leave_one_out
from reference.model import SyncMaskModel
from reference.model.fusion import QKV, Captured

Scores = dict[str, Tensor]


@torch.no_grad()
def all_scores(model: SyncMaskModel, batch: Batch) -> tuple[Scores, Scores]:
    """Scores of words ``[B, T]`` and of patches ``[B, P]`` by the name of their rule."""
    image = model.encode_image(batch.pixels)
    text = model.encode_text(batch.input_ids, batch.attended)
    captured, rebuilt = Captured.nothing(), Captured.nothing()
    fused = model.fuse(text, batch.attended, image, captured)
    model.image_fusion(image, None, text, batch.attended, captured=rebuilt)
    alone = model.fuse(text, batch.attended, None)
    mean_image = image.mean(dim=0, keepdim=True)
    words: Scores = {
        "random": torch.rand(text.shape[:2]),
        "moved from its encoding": 1 - F.cosine_similarity(fused, text, dim=2),
        "moved by its image, against none": 1 - F.cosine_similarity(fused, alone, dim=2),
        "image_effect": image_effect(model, mean_image, text, batch.attended, fused),
        "leave_one_out": leave_one_out(model, batch, image, text),
    }
    patches: Scores = {"random": torch.rand(image.shape[0], image.shape[1] - 1)}
    for number, layer in enumerate(captured.cross_attention, 1):
        for rules, found in zip((words, patches), _of_layer(layer, batch.token_valid), strict=True):
            rules |= {f"{name}, layer {number}": scores for name, scores in found.items()}
    for number, layer in enumerate(rebuilt.cross_attention, 1):
        seen = _image_to_text(layer, batch.attended)
        words |= {f"{name}, layer {number}": scores for name, scores in seen.items()}
    return words, patches


def _of_layer(layer: QKV, token_valid: Tensor) -> tuple[Scores, Scores]:
    """Rules on one cross-attention whose words query patches."""
    query, key, value = layer
    logits = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
    attn = logits.softmax(dim=3)
    mean = attn[..., 1:].mean(dim=1)
    word = token_valid.to(mean.dtype).unsqueeze(2)
    over_words = (mean * word).sum(dim=1) / word.sum(dim=1).clamp(min=1)
    invalid = ~token_valid[:, None, :, None]
    shares = logits[..., 1:].masked_fill(invalid, -torch.inf).softmax(dim=2).nan_to_num(0)
    both = (shares * attn[..., 1:]).mean(dim=1)
    probabilities = mean * word / (mean * word).sum(dim=1, keepdim=True).clamp(min=1e-9)
    distance = (value[:, :, 1:] - value[:, :, 1:].mean(dim=2, keepdim=True)).norm(dim=3)
    weighted = (attn[..., 1:] * distance.unsqueeze(2)).mean(dim=1)
    words = {
        "max": mean.amax(dim=2),
        "mutual": (mean * over_words.unsqueeze(1)).sum(dim=2),
        "share of a patch's probabilities": probabilities.mean(dim=2),
        "mass on patches": 1 - attn[..., 0].mean(dim=1),
        "log-sum-exp": logits[..., 1:].logsumexp(dim=3).mean(dim=1),
        "text_softmax": shares.mean(dim=1).amax(dim=2),
        "text_softmax, by patch scores": (shares.mean(dim=1) * over_words.unsqueeze(1)).sum(dim=2),
        "dual": both.sum(dim=2),
        "norm of the output": (attn @ value).square().sum(dim=(1, 3)).sqrt(),
    }
    patches = {
        "mean": over_words,
        "cls": mean[:, 0],
        "value": (weighted * word).sum(dim=1) / word.sum(dim=1).clamp(min=1),
        "cls_value": weighted[:, 0],
        "dual": (both * word).sum(dim=1),
    }
    return words, patches


def _image_to_text(layer: QKV, attended: Tensor) -> Scores:
    """Rules on one cross-attention whose patches query words."""
    attn = smk.attention_map(layer[0], layer[1], key_valid=attended, skip_keys=0)
    return {"image to text, cls": attn[:, 0], "image to text, max": attn[:, 1:].amax(dim=1)}
