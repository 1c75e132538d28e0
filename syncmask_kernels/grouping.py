"""Grouped batches: an order of examples in which neighbours are each other's hard negatives."""

from __future__ import annotations

from torch import Tensor

from syncmask_kernels import _checks, backends

MODES = ("hardest", "semi_hard")


def grouped_order(
    image_feat: Tensor,
    text_feat: Tensor,
    item_ids: Tensor | None = None,
    *,
    start: int = 0,
    mode: str = "hardest",
    window: int = 1,
) -> Tensor:
    """Chain examples so that each is similar to the one before it; cut into batches, they are hard.

    From `start` the chain goes to the unused example whose text is most similar to the image of
    `start`, from there to the unused one whose image is most similar to that text, and so on, by
    turns. Similarities are plain products, in float32 (float64 for float64 features).

    Args:
        image_feat: ``[M, D]`` floating, one row for each example; normalise them for cosines.
        text_feat: ``[M, D]`` floating, the texts of the same examples.
        item_ids: ``[M]`` int64: examples with equal ids (views of one product, captions of one
            image) are no negatives of each other. Of any `window` neighbours in the order no two
            have the same id, as long as another example is left.
        start: index of the first example.
        mode: ``"hardest"`` (default) takes the most similar example; ``"semi_hard"`` the most
            similar one of those that are less similar than the example's own pair, and where there
            is none of those, the least similar one.
        window: the batch size for which `item_ids` are kept apart, so that batches may be cut
            anywhere. The default of 1 keeps nothing apart.

    Returns:
        Tensor: ``order [M]`` int64, a permutation. No gradient flows.

    Raises:
        TypeError: types do not fit.
        ValueError: shapes, devices, `start`, `mode` or `window` do not fit.

    Deterministic: ties go to the lower index, a similarity of NaN comes after all numbers, and
    where only examples remain whose item is too near, the lowest index comes next. Backends and
    machines add up products in different orders: where two similarities are closer than float32
    rounds, each may take another of the two, and all that follows differs. No host sync. Memory of
    the size of the features; the matrix of similarities is never stored.

    Source: grouping in GRIT-VLP (``"hardest"``; it compares softmaxes, whose order is that of the
    similarities until they underflow); SyncMask's semi-hard negatives by the rule of FaceNet.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
        >>> smk.grouped_order(image, text_feat=image)
        tensor([0, 2, 1])
    """
    _checks.floating("image_feat", image_feat, "[M, D]")
    _checks.floating("text_feat", text_feat)
    _checks.shape("text_feat", text_feat, "the shape of image_feat", image_feat.shape)
    _checks.same_device("text_feat", text_feat, "image_feat", image_feat)
    size = image_feat.shape[0]
    if item_ids is not None:
        _checks.ids("item_ids", item_ids, "[M]", (size,), "image_feat", image_feat)
    _checks.index("start", start, size, "M")
    _checks.choice("mode", mode, MODES)
    _checks.integer("window", window)
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    call = (
        image_feat.detach(),
        text_feat.detach(),
        item_ids if window > 1 else None,
        start,
        mode == "semi_hard",
        min(window, size),
    )
    return backends.choose("grouped_order", image_feat, *call)(*call)
