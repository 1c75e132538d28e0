"""What the chain of a native library (`csrc/<backend>/grouping.*`) cannot serve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def refuses(image_feat: Tensor, text_feat: Tensor, *rest: Any) -> str | None:
    wide = torch.float64 in (image_feat.dtype, text_feat.dtype)
    return "float64 is served by eager only" if wide else None
