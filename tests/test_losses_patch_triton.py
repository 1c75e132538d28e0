"""The Triton kernels of masked_patch_loss, on a GPU or in Triton's interpreter.

As for tests/test_selection_triton.py: ``TRITON_INTERPRET=1 pytest <this file>``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from reference.ops.losses import patchify
from syncmask_kernels.backends import BackendError, triton
from tests.accuracy import assert_as_accurate
from tests.compiling import assert_compiles_once
from tests.on_triton import DEVICE, inside_nan, serve

SIDE, ROWS, COLUMNS, BATCH = 5, 2, 3, 2
PATCHES, VALUES = ROWS * COLUMNS, 3 * SIDE**2
KINDS = ["l1", "mse", "smooth_l1", "cosine"]
IDS = torch.tensor([[4, 0, 2, -1], [-1, 5, 1, 3]])
AGAIN = torch.tensor([[4, 4, -1, 0], [2, 1, 2, 2]])


class Found(NamedTuple):
    loss: Tensor
    grad: Tensor


def both(pred: Tensor, target: Tensor, chosen: Tensor, **options: Any) -> Found:
    """The loss, and the gradient of the prediction."""
    leaf = pred.detach().requires_grad_()
    loss = smk.masked_patch_loss(leaf, target, chosen, **options)
    slope = torch.arange(1, loss.numel() + 1).reshape(loss.shape).to(loss)
    return Found(loss.detach(), torch.autograd.grad(loss, leaf, slope)[0])


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(rows: int = PATCHES) -> tuple[Tensor, Tensor, Tensor]:
    """pred [B, rows, C], image, and a mask with an empty row."""
    mask = torch.tensor([[True, False, True, True, False, False], [False] * PATCHES])
    image = drawn(BATCH, 3, ROWS * SIDE, COLUMNS * SIDE, seed=2)
    return drawn(BATCH, rows, VALUES, seed=1), image, mask


def check(pred: Tensor, target: Tensor, chosen: Tensor, **options: Any) -> Found:
    given = {"pred": pred, "target": target, "chosen": chosen, **options}
    wide = {**given, "pred": pred.double(), "target": target.double()}
    got = serve(both, "triton", given)
    answers = got, serve(both, "eager", given), serve(both, "eager", wide)
    for value, plain, truth in zip(*answers, strict=True):
        assert value.dtype == plain.dtype
        assert_as_accurate(value, plain, truth, factor=2.0)
    return got


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_pix", [False, True])
def test_image_and_mask(kind: str, norm_pix: bool) -> None:
    pred, image, mask = inputs()
    check(pred, image, mask, kind=kind, norm_pix=norm_pix, patch_size=SIDE)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chosen", [IDS, AGAIN], ids=["ids", "ids more than once"])
@pytest.mark.parametrize("gathered", [False, True])
def test_ids(chosen: Tensor, gathered: bool, reduction: str) -> None:
    pred, image, _ = inputs(chosen.shape[1] if gathered else PATCHES)
    check(pred, image, chosen, kind="mse", reduction=reduction, patch_size=SIDE)


@pytest.mark.parametrize(
    ("pred_type", "target_type"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)],
)
def test_types(pred_type: torch.dtype, target_type: torch.dtype) -> None:
    pred, image, mask = inputs()
    check(pred.to(pred_type), image.to(target_type), mask, kind="smooth_l1", patch_size=SIDE)


def test_features_and_views_with_nan_around() -> None:
    pred, image, mask = inputs()
    features = inside_nan(patchify(image, SIDE)).transpose(1, 2).clone().transpose(1, 2)
    options = {"kind": "cosine", "reduction": "none"}
    got = check(inside_nan(pred), features, mask, **options)
    same = check(pred, inside_nan(image), mask, patch_size=SIDE, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, same, strict=True))


def test_patches_that_are_not_masked_are_never_used() -> None:
    pred, image, _ = inputs()
    ids = torch.tensor([[4, 0], [-1, 4]])
    unused = torch.ones(BATCH, PATCHES, dtype=torch.bool)
    unused[0, [0, 4]] = unused[1, 4] = False
    features = patchify(image, SIDE)
    want = check(pred, features, ids, norm_pix=True)
    poisoned = (x.masked_fill(unused.unsqueeze(-1), float("nan")) for x in (pred, features))
    given = dict(zip(("pred", "target", "chosen"), (*poisoned, ids), strict=True))
    got = serve(both, "triton", given | {"norm_pix": True})
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_nothing_masked() -> None:
    pred, image, mask = inputs()
    for chosen in (mask & False, IDS[:, :0], IDS * 0 - 1):
        for part in check(pred, image, chosen, patch_size=SIDE):
            assert torch.equal(part, torch.zeros_like(part))
    assert check(pred[:0], image[:0], mask[:0], patch_size=SIDE).loss == 0


def test_more_ids_than_are_read_at_once() -> None:
    pred = drawn(1, 3, 5, seed=1)
    ids = torch.arange(1100).view(1, -1) % 2
    given = {"pred": pred, "target": drawn(1, 3, 5, seed=2), "chosen": ids[:, -1030:]}
    reduced = {"kind": "mse", "reduction": "none"}
    slope = torch.arange(1.0, 1031.0).view(1, -1)
    (grad,) = serve(_gradient_alone, "triton", {**given, "slope": slope})
    assert grad[0, 2].eq(0).all()
    with smk.use_backend("eager"):
        want = both(**{**given, **reduced}).grad
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=0)


class Gradient(NamedTuple):
    grad: Tensor


def _gradient_alone(pred: Tensor, target: Tensor, chosen: Tensor, slope: Tensor) -> Gradient:
    """By a single launch."""
    options = (1, None, False, True)
    backward = torch.ops.syncmask.masked_patch_loss_backward.triton
    return Gradient(backward(slope, torch.ones((), device=DEVICE), pred, target, chosen, *options))


def test_compile() -> None:
    def loss(pred: Tensor, image: Tensor, chosen: Tensor) -> Tensor:
        return smk.masked_patch_loss(pred, image, chosen, patch_size=SIDE)

    calls = []
    for batch in (2, 3):
        pred, image = drawn(batch, PATCHES, VALUES, seed=1), drawn(batch, 3, 10, 15, seed=2)
        mask = torch.arange(PATCHES).expand(batch, -1) % 3 == 0
        moved = [x.to(DEVICE) for x in (pred, image, mask)]
        calls.append((moved[0].requires_grad_(), *moved[1:]))
    with smk.use_backend("triton"):
        assert_compiles_once(loss, calls)


@pytest.mark.parametrize(
    ("pred", "reason"),
    [
        (torch.zeros(1, 2, triton.MAX_PATCH_VALUES + 1), "patches of 4097 values"),
        (torch.zeros(1, 2, 3, dtype=torch.float64), "float64"),
    ],
)
def test_what_is_refused(pred: Tensor, reason: str) -> None:
    pred = pred.to(DEVICE)
    with smk.use_backend("triton"), pytest.raises(BackendError, match=reason):
        smk.masked_patch_loss(pred, pred, torch.zeros(1, 2, dtype=torch.bool, device=DEVICE))
