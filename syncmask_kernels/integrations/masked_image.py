"""Masking patches in image encoders that take no mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from syncmask_kernels import _checks
from syncmask_kernels.masking import mask_patches


@contextmanager
def masked_image(
    visual_encoder: nn.Module, patch_mask: Tensor, mask_token: Tensor
) -> Iterator[None]:
    """Within the block the encoder sees `mask_token` in the place of masked patches.

    Args:
        visual_encoder: a ViT whose module `patch_embed` returns ``[B, P, D]``, before the CLS and
            positions are added: that of ALBEF, its children and BLIP, and timm's.
        patch_mask: ``[B, P]`` bool, such as `SyncMask.patch_mask`.
        mask_token: ``[D]``, a parameter of the caller's, or zeros.

    Raises:
        TypeError: the encoder has no `patch_embed`, or types do not fit.
        ValueError: shapes do not fit, as the encoder runs.

    The hook that does it ends with the block.

    Source: SIMLA `models/vit.py` (`masked_visual_token_pos`), which does so itself.

    Example:
        >>> import torch
        >>> from syncmask_kernels.integrations.masked_image import masked_image
        >>> encoder = torch.nn.Sequential()
        >>> _ = encoder.add_module("patch_embed", torch.nn.Identity())
        >>> with masked_image(encoder, torch.tensor([[True, False]]), torch.zeros(3)):
        ...     encoder(torch.ones(1, 2, 3))
        tensor([[[0., 0., 0.],
                 [1., 1., 1.]]])
    """
    patch_embed = getattr(visual_encoder, "patch_embed", None)
    if not isinstance(patch_embed, nn.Module):
        raise TypeError(
            f"visual_encoder must have a module patch_embed, got {type(visual_encoder).__name__}"
        )
    _checks.tensor("patch_mask", patch_mask)
    _checks.tensor("mask_token", mask_token)

    def replace(module: nn.Module, inputs: Any, patches: Tensor) -> Tensor:
        return mask_patches(patches, patch_mask, mask_token)

    with patch_embed.register_forward_hook(replace):
        yield
