"""ALBEF, its stand-in or the real one at a small size, and draws to hand to a step of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from syncmask_kernels.integrations.albef import HardNegatives, MaskedWords
from syncmask_kernels.negatives import Negatives
from tests.hosts.loading import folder_of, load

URL = "github.com/salesforce/ALBEF"
VARIABLE = "SYNCMASK_ALBEF"
PAD, CLS, SEP, MASK = 0, 101, 102, 103
TOKENIZER = SimpleNamespace(
    pad_token_id=PAD, cls_token_id=CLS, sep_token_id=SEP, mask_token_id=MASK
)


class Size(NamedTuple):
    """Of a model; the defaults are small."""

    width: int = 64
    heads: int = 4
    image_layers: int = 2
    text_layers: int = 4
    fusion_layer: int = 2
    vocabulary: int = 200
    image: int = 64
    embed: int = 32
    queue: int = 64
    dropout: float = 0.0


class Text(NamedTuple):
    """What the host reads of what a tokenizer returns."""

    input_ids: Tensor
    attention_mask: Tensor


class Batch(NamedTuple):
    image: Tensor
    text: Text


def make_batch(size: Size, pairs: int, words: int, generator: torch.Generator) -> Batch:
    """Random images, and captions of 3 to `words` tokens between CLS and SEP."""
    image = torch.randn(pairs, 3, size.image, size.image, generator=generator)
    ids = torch.randint(MASK + 1, size.vocabulary, (pairs, words), generator=generator)
    length = torch.randint(4, words + 1, (pairs, 1), generator=generator)
    place = torch.arange(words)
    ids[:, 0] = CLS
    ids = torch.where(place == length - 1, SEP, ids)
    attended = place < length
    return Batch(image, Text(ids.where(attended, PAD), attended.long()))


def bert_config(tmp_path: Path, size: Size) -> Path:
    """The file that `BertConfig.from_json_file` reads."""
    path = tmp_path / "config_bert.json"
    path.write_text(
        json.dumps(
            {
                "architectures": ["BertForMaskedLM"],
                "attention_probs_dropout_prob": size.dropout,
                "hidden_dropout_prob": size.dropout,
                "hidden_size": size.width,
                "intermediate_size": 4 * size.width,
                "num_attention_heads": size.heads,
                "num_hidden_layers": size.text_layers,
                "fusion_layer": size.fusion_layer,
                "encoder_width": size.width,
                "vocab_size": size.vocabulary,
                "max_position_embeddings": 64,
                "pad_token_id": PAD,
                "model_type": "bert",
            }
        )
    )
    return path


def small_images(host: ModuleType, size: Size) -> Any:
    """The host's image encoder, with our sizes in place of those that its code names."""
    encoder = host.VisionTransformer

    def small(**given: Any) -> nn.Module:
        sizes = {"embed_dim": size.width, "depth": size.image_layers, "num_heads": size.heads}
        return encoder(**{**given, **sizes})

    return mock.patch.object(host, "VisionTransformer", small)


def bert_checkpoint(host: ModuleType, config_file: Path) -> str:
    """A folder that the host's `BertForMaskedLM.from_pretrained` reads."""
    folder = config_file.with_name("bert")
    encoder = host.BertForMaskedLM(host.BertConfig.from_json_file(config_file))
    encoder.save_pretrained(folder, safe_serialization=False)
    return str(folder)


def real_albef(tmp_path: Path, size: Size) -> nn.Module:
    """The host's own model at a small size; skips where there is no clone."""
    host = load(folder_of(VARIABLE, URL), "models.model_pretrain")
    config_file = bert_config(tmp_path, size)
    with small_images(host, size):
        return host.ALBEF(
            text_encoder=bert_checkpoint(host, config_file),
            tokenizer=TOKENIZER,
            config={
                "mlm_probability": 0.15,
                "embed_dim": size.embed,
                "image_res": size.image,
                "vision_width": size.width,
                "bert_config": str(config_file),
                "queue_size": size.queue,
                "momentum": 0.9,
                "temp": 0.07,
            },
            init_deit=False,
        )


class Draws(NamedTuple):
    """What a step chooses: a wrong image for each text, a wrong text for each image, words."""

    wrong_images: Tensor
    wrong_texts: Tensor
    words: MaskedWords


def make_draws(batch: Batch, size: Size, generator: torch.Generator, share: float = 0.3) -> Draws:
    """Any other pair, and a share of the words (at least one)."""
    ids = batch.text.input_ids
    pairs = len(ids)
    shifts = (torch.randint(1, pairs, (pairs,), generator=generator) for _ in range(2))
    wrong_images, wrong_texts = ((torch.arange(pairs) + shift) % pairs for shift in shifts)
    chosen = (torch.rand(ids.shape, generator=generator) < share) & (ids > MASK)
    chosen[:, 1] |= ~chosen.any()
    words = torch.randint(MASK, size.vocabulary, ids.shape, generator=generator)
    labels = ids.where(chosen, -100)
    return Draws(wrong_images, wrong_texts, MaskedWords(words.where(chosen, ids), labels))


def negatives_of(draws: Draws) -> HardNegatives:
    found = torch.ones_like(draws.wrong_images, dtype=torch.bool)
    return HardNegatives(Negatives(draws.wrong_texts, found), Negatives(draws.wrong_images, found))


@contextmanager
def drawing(model: Any, draws: Draws) -> Iterator[None]:
    """An unpatched model makes these draws: it asks for images first, one by one."""
    drawn = [*draws.wrong_images, *draws.wrong_texts]
    model.mask = lambda *args, **kwargs: draws.words[:2]
    with mock.patch.object(torch, "multinomial", side_effect=drawn):
        yield
    del model.mask
