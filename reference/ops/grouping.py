"""The order of grouped batches, one step after the other."""

from __future__ import annotations

import math

from torch import Tensor


def grouped_order(
    image_feat: Tensor,
    text_feat: Tensor,
    item_ids: Tensor | None = None,
    *,
    start: int = 0,
    mode: str = "hardest",
    window: int = 1,
) -> list[int]:
    """image_feat, text_feat [M, D], item_ids [M] -> a permutation of M."""
    similarity = image_feat @ text_feat.T
    size = similarity.shape[0]
    order = [start][:size]
    while len(order) < size:
        last, from_image = order[-1], len(order) % 2 == 1
        row = [float(s) for s in (similarity[last] if from_image else similarity[:, last])]
        left = [i for i in range(size) if i not in order]
        apart = left
        if item_ids is not None and window > 1:
            near = {int(item_ids[i]) for i in order[-window + 1 :]}
            apart = [i for i in left if int(item_ids[i]) not in near]
        numbers = [i for i in apart if not math.isnan(row[i])]
        easier = [i for i in numbers if row[i] < row[last]]
        if mode == "semi_hard" and easier:
            order.append(max(easier, key=lambda i: (row[i], -i)))
        elif mode == "semi_hard" and numbers:
            order.append(min(numbers, key=lambda i: (row[i], i)))
        elif numbers:
            order.append(max(numbers, key=lambda i: (row[i], -i)))
        else:
            order.append(min(apart or left))
    return order
