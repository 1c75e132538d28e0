"""Heads of masked image modelling, and the codes that patches can be told by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.model.config import ModelConfig

CODES = 512
CODE_SIZE = 16


class MimHead(nn.Linear):
    """From the fused state of a patch to what it should be told by: its `target`.

    ``"pixels"`` as in SimMIM, ``"norm_pixels"``, normalised per patch, as in MAE, ``"features"``,
    the teacher's of the clean image, as in MAMO, or ``"codes"`` as in BEiT and SIMLA.
    """

    codes: PatchCodes | None

    def __init__(self, config: ModelConfig, target: str) -> None:
        if config.mim_target != "default":
            target = config.mim_target
        pixels = 3 * config.patch_size**2
        size = {"features": config.width, "codes": CODES}.get(target, pixels)
        super().__init__(config.width, size)
        self.target = target
        self.codes = PatchCodes(config.patch_size, CODES) if target == "codes" else None


class PatchCodes(nn.Module):
    """A fixed random quantiser of patches: no training, no weights to download.

    A code is the nearest of random unit vectors to a random projection of the normalised pixels of
    a patch, as BEST-RQ does for speech (Chiu et al. 2022, arXiv 2202.01855). The codes of BEiT and
    SIMLA come from DALL-E's tokenizer instead.
    """

    projection: Tensor
    book: Tensor

    def __init__(self, patch_size: int, codes: int) -> None:
        super().__init__()
        values = 3 * patch_size**2
        self.patch_size = patch_size
        self.register_buffer("projection", torch.randn(values, CODE_SIZE) / values**0.5)
        self.register_buffer("book", F.normalize(torch.randn(codes, CODE_SIZE), dim=1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Images ``[B, 3, S, S]`` -> codes ``[B, P]`` int64."""
        patches = F.unfold(pixels, self.patch_size, stride=self.patch_size).transpose(1, 2)
        projected: Tensor = F.layer_norm(patches, patches.shape[2:]) @ self.projection
        return (projected @ self.book.T).argmax(dim=2)
