"""TorchMultimodal's ALBEF for retrieval, its stand-in or the real one, at a small size."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tests.hosts import torchmultimodal_standin as standin

URL = "github.com/facebookresearch/multimodal"
VARIABLE = "SYNCMASK_TORCHMULTIMODAL"

# Names that the host imports and ALBEF does not use, of packages that need not be installed.
UNUSED = {
    "iopath.common.file_io": ("HTTPURLHandler", "PathManager"),
    "torchvision.models.feature_extraction": ("create_feature_extractor",),
    "torchvision.models.vision_transformer": ("VisionTransformer",),
    "torchvision.ops.stochastic_depth": ("StochasticDepth",),
}


class Size(NamedTuple):
    """Of a model; the defaults are small."""

    width: int = 32
    heads: int = 4
    text_layers: int = 1
    fusion_layers: int = 2
    vocabulary: int = 100
    image: int = 12
    embed: int = 16
    queue: int = 24


class Batch(NamedTuple):
    """The arguments of a step, but alpha."""

    image: Tensor
    text: Tensor
    text_atts: Tensor
    idx: Tensor


def make_batch(size: Size, pairs: int, words: int, generator: torch.Generator) -> Batch:
    """Random images and captions; some pairs show one item."""
    image = torch.randn(pairs, 3, size.image, size.image, generator=generator)
    text = torch.randint(4, size.vocabulary, (pairs, words), generator=generator)
    length = torch.randint(2, words + 1, (pairs, 1), generator=generator)
    attended = torch.arange(words) < length
    idx = torch.randint(2 * pairs, (pairs,), generator=generator)
    return Batch(image, text.where(attended, 0), attended.long(), idx)


def _unused_packages() -> dict[str, ModuleType]:
    made: dict[str, ModuleType] = {}
    for path, names in UNUSED.items():
        if importlib.util.find_spec(path.split(".")[0]) is None:
            parts = path.split(".")
            for end in range(1, len(parts) + 1):
                name = ".".join(parts[:end])
                made.setdefault(name, ModuleType(name))
            vars(made[path]).update({name: mock.MagicMock(name=name) for name in names})
    return made


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    with mock.patch.dict(sys.modules, _unused_packages()):
        sys.path.insert(0, str(folder))
        try:
            yield
        finally:
            sys.path.remove(str(folder))


def real_host() -> Any:
    """The names of the host that `build` uses; skips the test where there is no clone."""
    if VARIABLE not in os.environ:
        pytest.skip(f"{VARIABLE} does not name a clone of {URL}")
    folder = Path(os.environ[VARIABLE])
    example = folder / "examples" / "albef" / "model.py"
    with _importable(folder):
        spec = importlib.util.spec_from_file_location("torchmultimodal_albef_example", example)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

    def text_encoder(size: Size) -> nn.Module:
        return module.bert_text_encoder(
            hidden_size=size.width,
            num_hidden_layers=size.text_layers,
            num_attention_heads=size.heads,
            intermediate_size=4 * size.width,
            vocab_size=size.vocabulary,
            dropout=0.0,
        )

    def fusion(size: Size) -> nn.Module:
        return module.ALBEFMultimodalEncoder(
            hidden_size=size.width,
            num_hidden_layers=size.fusion_layers,
            num_attention_heads=size.heads,
            intermediate_size=4 * size.width,
        )

    return SimpleNamespace(**vars(module), text_encoder=text_encoder, fusion=fusion)


def standin_host() -> Any:
    return SimpleNamespace(
        **vars(standin),
        text_encoder=lambda size: standin.TextEncoder(size.width, size.vocabulary),
        fusion=lambda size: standin.ALBEFMultimodalEncoder(
            size.width, size.heads, size.fusion_layers
        ),
    )


def build(
    host: Any,
    size: Size,
    vision_encoder: nn.Module | None = None,
    text_encoder: nn.Module | None = None,
) -> Any:
    """ALBEF for retrieval. The image encoder is a small one: the host's needs torchvision."""
    base = host.ALBEFModel(
        standin.VisionEncoder(size.width) if vision_encoder is None else vision_encoder,
        host.text_encoder(size) if text_encoder is None else text_encoder,
        host.fusion(size),
        momentum=0.9,
    )
    similarity = host.ALBEFModelWithSimilarity(
        base,
        nn.Linear(size.width, size.embed),
        nn.Linear(size.width, size.embed),
        embed_size=size.embed,
        queue_size=size.queue,
    )
    return host.ALBEFModelForRetrieval(similarity, host.ImageTextContrastiveLoss(), size.width)


class Draws(NamedTuple):
    """A wrong image for each text and a wrong text for each image."""

    images: Tensor
    texts: Tensor


def make_draws(pairs: int, generator: torch.Generator) -> Draws:
    shifts = (torch.randint(1, pairs, (pairs,), generator=generator) for _ in range(2))
    return Draws(*((torch.arange(pairs) + shift) % pairs for shift in shifts))


@contextmanager
def drawing(draws: Draws) -> Iterator[None]:
    """An unpatched model makes these draws: it asks for images first, one by one."""
    with mock.patch.object(torch, "multinomial", side_effect=iter(torch.cat(draws))):
        yield
