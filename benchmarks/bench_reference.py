"""A whole training step of `reference`, with the library's operators and with plain PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import DEVICE
from benchmarks.report import Case
from reference.batch import Batch
from reference.checkpoint import TrainState
from reference.config import PretrainConfig
from reference.methods import METHODS
from reference.pretrain import build, update

# The size of the demonstration, and a ViT-S with half a BERT-base of its width.
SIZES: dict[str, dict[str, Any]] = {
    "demo": {"batch_size": 48},
    "ViT-S": {
        "image_size": 224, "patch_size": 16, "width": 384, "heads": 6, "image_layers": 12,
        "text_layers": 6, "fusion_layers": 6, "image_fusion_layers": 2, "projection": 256,
        "batch_size": 8,
    },
}  # fmt: skip
WORDS = 30
WORDS_KNOWN = {"demo": 300, "ViT-S": 30_522}


class Vocabulary:
    """Sizes and special tokens of a vocabulary that nothing is read with."""

    pad_token_id, mask_token_id, all_special_ids = 0, 4, [0, 1, 2, 3, 4]

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def drawn(config: PretrainConfig, tokenizer: Any) -> Batch:
    """Texts of 8 to 28 words with CLS and SEP, and noise for images."""
    generator = torch.Generator().manual_seed(0)
    rows, side = config.batch_size, config.image_size
    words = torch.randint(8, WORDS - 1, (rows, 1), generator=generator)
    place = torch.arange(WORDS)
    valid = (place > 0) & (place <= words)
    ids = torch.randint(5, len(tokenizer), (rows, WORDS), generator=generator)
    ids = ids.masked_fill(~valid, 0).masked_fill(place == 0, 2).masked_fill(place == words + 1, 3)
    pixels = torch.rand(rows, 3, side, side, generator=generator) * 2 - 1
    word_ids = (place - 1).expand(rows, -1).masked_fill(~valid, -1)
    numbers = torch.arange(rows)
    batch = Batch(pixels, ids, ids != 0, valid, word_ids, numbers, numbers)
    return Batch(*(x.to(DEVICE) for x in batch))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", SIZES)
def bench_training_step(compare: Callable[..., None], size: str, method: str) -> None:
    queue = {"queue_size": 4096, "distillation": 0.4, "distillation_steps": 1}
    options = SIZES[size] | queue | {"random_mask_steps": 0, "method": method}
    tokenizer: Any = Vocabulary(WORDS_KNOWN[size])

    def config(operators: Any) -> PretrainConfig:
        return PretrainConfig(**options, operators=operators, max_tokens=WORDS)

    batch = drawn(config("library"), tokenizer)

    def start(operators: str) -> TrainState:
        state = build(config(operators), tokenizer)
        state.step = 1
        return state

    def encoders(state: TrainState) -> Callable[[Any], Tensor]:
        """Forward and backward of both encoders, once, on what nothing hides."""

        def call(_: Any) -> Tensor:
            with torch.enable_grad():
                image = state.model.encode_image(batch.pixels)
                text = state.model.encode_text(batch.input_ids, batch.attended)
                loss = image.square().mean() + text.square().mean()
            loss.backward()
            return loss.detach()

        return call

    def step(operators: str) -> Callable[[Any], Tensor]:
        state, chosen = start(operators), config(operators)

        def call(_: Any) -> Tensor:
            torch.manual_seed(0)
            with torch.enable_grad():
                losses = update(state, [batch], tokenizer, chosen)
            return torch.stack([loss.detach() for loss in losses.values()])

        return call

    expected = step("plain")(None)

    def check(losses: Tensor) -> None:
        torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)

    rows, side = batch.input_ids.shape[0], SIZES[size].get("image_size", 64)
    compare(
        Case("training step", (rows, 3, side, side), torch.float32, f"{method}, {size}"),
        {
            "both encoders once": encoders(start("library")),
            "plain PyTorch": step("plain"),
            "this library": step("library"),
        },
        [batch.pixels, batch.pixels],
        check,
    )
