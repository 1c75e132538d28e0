"""Schema and fake of grouped_order."""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMAS = {
    "grouped_order": (
        "(Tensor image_feat, Tensor text_feat, Tensor? item_ids, SymInt start, bool semi_hard,"
        " SymInt window) -> Tensor"
    ),
}


def _fake_grouped_order(
    image_feat: Tensor,
    text_feat: Tensor,
    item_ids: Tensor | None,
    start: int,
    semi_hard: bool,
    window: int,
) -> Tensor:
    return image_feat.new_empty(image_feat.shape[0], dtype=torch.int64)


FAKES = {"grouped_order": _fake_grouped_order}
