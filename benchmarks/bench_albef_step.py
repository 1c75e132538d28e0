"""A training step of ALBEF itself, as it is and patched; SYNCMASK_ALBEF names a clone of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.utils._pytree import tree_map_only

from benchmarks.measure import DEVICE
from benchmarks.report import Case
from syncmask_kernels.integrations import albef
from tests.hosts.albef import (
    Size,
    drawing,
    make_batch,
    make_draws,
    negatives_of,
    real_albef,
)

# Of its own configuration, and half as wide and deep; the vocabulary and the queue are ALBEF's.
OWN = Size(
    width=768, heads=12, image_layers=12, text_layers=12, fusion_layer=6,
    vocabulary=30_522, image=256, embed=256, queue=65_536,
)  # fmt: skip
HALF = OWN._replace(width=384, heads=6, image_layers=6, text_layers=6, fusion_layer=3)
SIZES = {"half": (HALF, 16), "own": (OWN, 8)}
WORDS, ALPHA = 30, 0.4


@pytest.fixture
def group() -> Iterator[None]:
    """One process, which the host does not work without."""
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group(store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("size", SIZES)
def bench_albef_step(compare: Callable[..., None], tmp_path: Path, size: str) -> None:
    config, pairs = SIZES[size]
    torch.manual_seed(0)
    model: Any = real_albef(tmp_path, config).train().to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    batch = make_batch(config, pairs, WORDS, generator)
    draws = make_draws(batch, config, generator, model.mlm_probability)
    batch, draws = tree_map_only(Tensor, lambda x: x.to(DEVICE), (batch, draws))
    negatives = negatives_of(draws)

    def step(losses: Callable[[], Any]) -> Callable[[Any], Tensor]:
        """Forward and backward; the keys of this batch take the same columns of the queues."""

        def call(_: Any) -> Tensor:
            model.queue_ptr.zero_()
            model.zero_grad()
            with torch.enable_grad():
                found = losses()
                sum(found).backward()
            return torch.stack([loss.detach() for loss in found])

        return call

    def encoders() -> list[Tensor]:
        encoded = albef.encode(model, *batch)
        return [encoded.image_feat.mean(), encoded.text_feat.mean()]

    def host() -> Any:
        with drawing(model, draws):
            return model(*batch, alpha=ALPHA)

    def patched(**options: Any) -> Any:
        replaced = albef.patch(model, **options)
        words = None if options else draws.words
        losses = model(*batch, alpha=ALPHA, negatives=negatives, words=words)
        replaced.unpatch()
        return losses

    expected = step(host)(None)
    expected = step(host)(None)  # from queues that hold this batch

    def check(losses: Tensor) -> None:
        """MLM (first) is that of other words where the teacher chooses them."""
        torch.testing.assert_close(losses[1:], expected[1:], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(losses[0], expected[0], rtol=2e-2, atol=0)

    compare(
        Case("training step", batch.image.shape, torch.float32, f"ALBEF, {size} size"),
        {
            "both encoders once": step(encoders),
            "ALBEF": step(host),
            "patched, words by the teacher": step(lambda: patched(syncmask=True)),
            "patched": step(patched),
        },
        [batch.image, batch.image],
        check,
    )
