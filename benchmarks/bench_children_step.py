"""Training steps of GRIT-VLP and FashionViL themselves, as they are and patched.

SYNCMASK_GRIT_VLP and SYNCMASK_FASHIONVIL name clones of them; without, these are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from benchmarks.measure import DEVICE
from benchmarks.report import Case
from syncmask_kernels.integrations import albef, fashionvil, grit_vlp
from tests.hosts.albef import Size, make_batch
from tests.hosts.children import real_grit
from tests.hosts.mmf import real_fashionvil

# Half as wide and deep as the hosts; vocabulary, words and patches are theirs.
HALF = Size(
    width=384, heads=6, image_layers=6, text_layers=6, fusion_layer=3,
    vocabulary=30_522, image=256, embed=256,
)  # fmt: skip
GRIT_PAIRS, GRIT_WORDS = 8, 25
PAIRS, WORDS, PATCHES, FEATURES, MASKED = 8, 75, 49, 2048, 0.15


def step(model: Any, losses: Callable[[], list[Tensor]]) -> Callable[[Any], Tensor]:
    """Forward and backward."""

    def call(_: Any) -> Tensor:
        model.zero_grad()
        with torch.enable_grad():
            found = losses()
            torch.stack(found).sum().backward()
        return torch.stack([loss.detach() for loss in found])

    return call


def alike(expected: Tensor) -> Callable[[Tensor], None]:
    return lambda losses: torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-3)


def bench_grit_step(compare: Callable[..., None], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = real_grit(tmp_path, HALF).train().to(DEVICE)
    batch = make_batch(HALF, GRIT_PAIRS, GRIT_WORDS, torch.Generator().manual_seed(0))
    image, text = tree_map_only(Tensor, lambda x: x.to(DEVICE), batch)
    drawn = torch.full(text.input_ids.shape, model.mlm_probability)
    ids = text.input_ids
    words = model.mask(ids.clone(), HALF.vocabulary, DEVICE, ids.clone(), None, drawn)

    def host() -> list[Tensor]:
        model.mask = lambda *args, **kwargs: words
        losses = model(image, text)[:3]
        del model.mask
        return list(losses)

    def patched() -> list[Tensor]:
        replaced = grit_vlp.patch(model)
        losses = model(image, text, words=albef.MaskedWords(*words))[:3]
        replaced.unpatch()
        return list(losses)

    def encoders() -> list[Tensor]:
        encoded = albef.encode(model, image, text)
        return [encoded.image_feat.mean(), encoded.text_feat.mean()]

    compare(
        Case("training step", image.shape, torch.float32, "GRIT-VLP, half size"),
        {
            "both encoders once": step(model, encoders),
            "GRIT-VLP": step(model, host),
            "patched": step(model, patched),
        },
        [image, image],
        alike(step(model, host)(None)),
    )


def bench_fashionvil_mlm_step(compare: Callable[..., None], tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": HALF.width,
        "intermediate_size": 4 * HALF.width,
        "num_attention_heads": HALF.heads,
        "vocab_size": HALF.vocabulary,
        "visual_embedding_dim": FEATURES,
    }
    model: Any = real_fashionvil(tmp_path, layers=6, **sizes).train().to(DEVICE)
    ids = torch.randint(104, HALF.vocabulary, (PAIRS, WORDS), device=DEVICE)
    chosen = torch.rand(ids.shape, device=DEVICE) < MASKED
    image = torch.randn(PAIRS, PATCHES, FEATURES, device=DEVICE)

    def host() -> list[Tensor]:
        torch.manual_seed(0)
        sample_list = {
            "task": "mlm",
            "input_ids": ids,
            "input_ids_masked": ids.masked_fill(chosen, 103),
            "lm_label_ids": ids.masked_fill(~chosen, -1),
            "segment_ids": torch.zeros_like(ids),
            "input_mask": torch.ones_like(ids),
            "image": image,
            "targets": ids.new_ones(PAIRS),
        }
        return list(model(sample_list)["losses"].values())

    def patched() -> list[Tensor]:
        replaced = fashionvil.patch(model)
        losses = host()
        replaced.unpatch()
        return losses

    def encoder() -> list[Tensor]:
        zeros, ones = torch.zeros_like(ids), ids.new_ones(PAIRS, WORDS + PATCHES)
        kinds = ids.new_zeros(PAIRS, PATCHES)
        return [model.get_joint_embedding(ids, zeros, image, kinds, ones)[0].mean()]

    compare(
        Case("training step", ids.shape, torch.float32, "FashionViL MLM, half size"),
        {
            "encoder once": step(model, encoder),
            "FashionViL": step(model, host),
            "patched": step(model, patched),
        },
        [ids, ids],
        alike(step(model, host)(None)),
    )
