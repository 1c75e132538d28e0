"""A retrieval step of TorchMultimodal's ALBEF; SYNCMASK_TORCHMULTIMODAL names a clone of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from benchmarks.measure import DEVICE
from benchmarks.report import Case
from syncmask_kernels.integrations import torchmultimodal as adapter
from syncmask_kernels.negatives import Negatives
from tests.hosts.torchmultimodal import Size, build, drawing, make_batch, make_draws, real_host

# Half its own width and depth; its own vocabulary and queue. The image encoder is a stand-in.
HALF = Size(
    width=384, heads=6, text_layers=3, fusion_layers=3,
    vocabulary=30_522, image=64, embed=256, queue=65_536,
)  # fmt: skip
PAIRS, WORDS, ALPHA = 16, 30, 0.4


def bench_torchmultimodal_step(compare: Callable[..., None]) -> None:
    host = real_host()
    torch.manual_seed(0)
    model: Any = build(host, HALF).train().to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    batch = make_batch(HALF, PAIRS, WORDS, generator)
    draws = make_draws(PAIRS, generator)
    batch, draws = tree_map(lambda tensor: tensor.to(DEVICE), (batch, draws))
    found = torch.ones_like(draws.images, dtype=torch.bool)
    negatives = adapter.HardNegatives(Negatives(draws.texts, found), Negatives(draws.images, found))
    similarity = model.model_with_similarity

    def step(loss_of: Callable[[], Tensor]) -> Callable[[Any], Tensor]:
        """Forward and backward; the keys of this batch take the same columns of the queues."""

        def call(_: Any) -> Tensor:
            similarity.queue_ptr.zero_()
            model.zero_grad()
            with torch.enable_grad():
                loss = loss_of()
                loss.backward()
            return loss.detach()

        return call

    def encoders() -> Tensor:
        encoded = adapter.encode(similarity, *batch[:3])
        fused = similarity.albef_model.multimodal_encoder(
            encoded.text, batch.text_atts, encoded.image
        )
        return encoded.image_feat.mean() + encoded.text_feat.mean() + fused.mean()

    def unpatched() -> Tensor:
        with drawing(draws):
            loss: Tensor = model(*batch, ALPHA)
        return loss

    def patched() -> Tensor:
        replaced = adapter.patch(model)
        loss: Tensor = model._train_forward(*batch, ALPHA, negatives=negatives)
        replaced.unpatch()
        return loss

    expected = [step(unpatched)(None) for _ in range(2)][1]  # from queues that hold this batch
    compare(
        Case("training step", batch.image.shape, torch.float32, "TorchMultimodal's ALBEF, half"),
        {
            "encoders once": step(encoders),
            "TorchMultimodal": step(unpatched),
            "patched": step(patched),
        },
        [batch.image, batch.image],
        lambda loss: torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3),
    )
