"""Schemas and fakes of the masking room, and the types that its kernels take.

The gradients are made of the same operators: gather_masked and scatter_masked are each other's
adjoint; that of mask_patches is mask_patches without a token (0) and, for the token, masked_sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMAS = {
    "mask_patches": "(Tensor patches, Tensor patch_mask, Tensor? mask_token) -> Tensor",
    "masked_sum": "(Tensor x, Tensor mask) -> Tensor",
    "gather_masked": "(Tensor x, Tensor ids, float fill) -> Tensor",
    "scatter_masked": "(Tensor x, Tensor ids, SymInt positions) -> Tensor",
}

SUMMED = (torch.float16, torch.bfloat16, torch.float32)
MOVED = (*SUMMED, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def refuses_sum(x: Tensor) -> str | None:
    return None if x.dtype in SUMMED else f"{x.dtype} is served by eager only"


def refuses_move(x: Tensor) -> str | None:
    return None if x.dtype in MOVED else f"{x.dtype} is served by eager only"


def _fake_mask_patches(patches: Tensor, patch_mask: Tensor, mask_token: Tensor | None) -> Tensor:
    return patches.new_empty(patches.shape)


def _fake_masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty(x.shape[2:], dtype=torch.float32)


def _fake_gather_masked(x: Tensor, ids: Tensor, fill: float) -> Tensor:
    return x.new_empty((*ids.shape, x.shape[2]))


def _fake_scatter_masked(x: Tensor, ids: Tensor, positions: int) -> Tensor:
    return x.new_empty((x.shape[0], positions, x.shape[2]))


FAKES = {
    "mask_patches": _fake_mask_patches,
    "masked_sum": _fake_masked_sum,
    "gather_masked": _fake_gather_masked,
    "scatter_masked": _fake_scatter_masked,
}
