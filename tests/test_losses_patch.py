"""masked_patch_loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import syncmask_kernels as smk
from reference.ops import losses as oracle
from tests.accuracy import assert_as_accurate
from tests.compiling import assert_compiles_once

KINDS = ["l1", "mse", "smooth_l1", "cosine"]
NAN = math.nan
SIDE, ROWS, COLUMNS, BATCH = 2, 3, 4, 3
PATCHES, VALUES = ROWS * COLUMNS, 3 * SIDE**2


def case(dtype=torch.float32, seed=0, batch=BATCH):
    """pred [B, P, C], image, mask [B, P] (a row of it empty), ids [B, K]."""
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randn(batch, PATCHES, VALUES, generator=generator).to(dtype)
    image = torch.randn(batch, 3, ROWS * SIDE, COLUMNS * SIDE, generator=generator).to(dtype)
    mask = torch.rand(batch, PATCHES, generator=generator) < 0.5
    mask[1] = False
    return pred, image, mask, smk.topk_mask(mask.float(), k=PATCHES - 2, valid=mask).ids


def plain(pred, image, mask, *, kind, norm_pix, reduction):
    """What a user of PyTorch writes: MAE's loss, in float32 from the type of the input on."""
    target = image.unfold(2, SIDE, SIDE).unfold(3, SIDE, SIDE).permute(0, 2, 3, 4, 5, 1)
    target = target.reshape(len(image), PATCHES, VALUES).float()
    if norm_pix:
        mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (var + 1e-6) ** 0.5
    pred = pred.float()
    if kind == "cosine":
        losses = 1 - F.cosine_similarity(pred, target, dim=-1)
    else:
        function = {"l1": F.l1_loss, "mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}[kind]
        losses = function(pred, target, reduction="none").mean(dim=-1)
    losses = losses * mask
    if reduction == "none":
        return losses
    return losses.sum() / (mask.sum() if reduction == "mean" else 1)


def gradients(function, pred, target, *args, **options):
    pred, target = (x.detach().clone().requires_grad_() for x in (pred, target))
    loss = function(pred, target, *args, **options)
    scale = torch.arange(1, loss.numel() + 1).reshape(loss.shape) / loss.numel()
    (loss * scale).sum().backward()
    return [loss.detach(), pred.grad, target.grad]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_image_and_mask_against_the_truth(dtype, kind, norm_pix, reduction):
    pred, image, mask, _ = case(dtype)
    options = {"kind": kind, "norm_pix": norm_pix, "reduction": reduction}
    got = gradients(smk.masked_patch_loss, pred, image, mask, patch_size=SIDE, **options)
    same_type = gradients(plain, pred, image, mask, **options)
    truth = gradients(
        oracle.masked_patch_loss, pred.double(), image.double(), mask, patch_size=SIDE, **options
    )
    assert got[0].dtype == torch.float32
    for value, own, want in zip(got, same_type, truth, strict=True):
        assert_as_accurate(value, own, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("as_image", [False, True])
def test_all_ways_to_say_it_agree(kind, norm_pix, reduction, gathered, as_image):
    pred, image, mask, ids = case(torch.float64)
    options = {"kind": kind, "norm_pix": norm_pix, "reduction": reduction}
    target = image if as_image else oracle.patchify(image, SIDE)
    size = {"patch_size": SIDE} if as_image else {}
    want = oracle.masked_patch_loss(pred, target, mask, **size, **options)
    by_mask = smk.masked_patch_loss(pred, target, mask, **size, **options)
    given = smk.gather_masked(pred, ids) if gathered else pred
    by_ids = smk.masked_patch_loss(given, target, ids, **size, **options)
    torch.testing.assert_close(by_mask, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(by_ids, want, rtol=1e-12, atol=0)


def test_reduction_none_has_the_shape_of_the_ids():
    pred, image, mask, ids = case(torch.float64)
    options = {"patch_size": SIDE, "reduction": "none"}
    by_mask = smk.masked_patch_loss(pred, image, mask, **options)
    by_ids = smk.masked_patch_loss(pred, image, ids, **options)
    torch.testing.assert_close(by_ids, smk.gather_masked(by_mask, ids), rtol=1e-12, atol=0)
    want = oracle.masked_patch_loss(pred, image, mask, **options)
    torch.testing.assert_close(by_mask, want, rtol=1e-12, atol=0)


def test_as_many_ids_as_patches_mean_gathered_predictions():
    pred, image, _, _ = case(torch.float64)
    ids = torch.arange(PATCHES).flip(0).expand(BATCH, -1)
    everywhere = torch.ones(BATCH, PATCHES, dtype=torch.bool)
    got = smk.masked_patch_loss(pred.flip(1), image, ids, patch_size=SIDE)
    want = smk.masked_patch_loss(pred, image, everywhere, patch_size=SIDE)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_a_patch_is_flattened_as_in_mae():
    """Patches row by row; within a patch row, column, channel."""
    image = torch.zeros(1, 3, 4, 6)
    image[0, 2, 3, 4] = 1.0  # channel 2, second row of patches, third column of patches
    pred = torch.zeros(1, 6, 12)
    losses = smk.masked_patch_loss(
        pred, image, torch.ones(1, 6, dtype=torch.bool), patch_size=2, reduction="none"
    )
    assert losses.nonzero().tolist() == [[0, 5]]
    pred[0, 5, 2 * 3 + 0 * 3 + 2] = 1.0  # row 1, column 0, channel 2
    assert smk.masked_patch_loss(pred, image, torch.tensor([[5]]), patch_size=2) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    pred, image, mask, ids = case(torch.float64, batch=2)
    for norm_pix, chosen in ((False, mask), (True, ids)):
        assert torch.autograd.gradcheck(
            lambda p, t, n=norm_pix, c=chosen: smk.masked_patch_loss(
                p, t, c, kind=kind, patch_size=SIDE, norm_pix=n
            ),
            (pred.requires_grad_(), image.requires_grad_()),
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("by", ["mask", "ids", "no ids"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_masked_is_zero_with_zero_gradients(kind, norm_pix, by, reduction):
    pred, image, mask, ids = case()
    chosen = {"mask": mask & False, "ids": ids * 0 - 1, "no ids": ids[:, :0]}[by]
    results = gradients(
        smk.masked_patch_loss,
        pred,
        image,
        chosen,
        kind=kind,
        patch_size=SIDE,
        norm_pix=norm_pix,
        reduction=reduction,
    )
    for result in results:
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("by_ids", [False, True])
def test_patches_that_are_not_masked_are_never_used(kind, norm_pix, by_ids):
    pred, image, mask, ids = case()
    chosen = ids if by_ids else mask
    options = {"kind": kind, "patch_size": SIDE, "norm_pix": norm_pix}
    want = gradients(smk.masked_patch_loss, pred, image, chosen, **options)
    pixels = mask.reshape(BATCH, 1, ROWS, COLUMNS)
    pixels = pixels.repeat_interleave(SIDE, dim=2).repeat_interleave(SIDE, dim=3)
    poisoned = torch.where(mask.unsqueeze(-1), pred, NAN), torch.where(pixels, image, NAN)
    got = gradients(smk.masked_patch_loss, *poisoned, chosen, **options)
    for value, finite in zip(got, want, strict=True):
        assert torch.equal(value, finite)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_pix", [False, True])
def test_flat_patches_give_finite_gradients(kind, norm_pix):
    """A plain white background: variance 0; a prediction of 0: no direction."""
    _, _, mask, _ = case()
    pred = torch.zeros(BATCH, PATCHES, VALUES)
    image = torch.ones(BATCH, 3, ROWS * SIDE, COLUMNS * SIDE)
    options = {"kind": kind, "patch_size": SIDE, "norm_pix": norm_pix}
    for result in gradients(smk.masked_patch_loss, pred, image, mask, **options):
        assert torch.isfinite(result).all()


def test_mixed_types():
    pred, image, mask, _ = case()
    options = {"kind": "mse", "patch_size": SIDE}
    mixed = smk.masked_patch_loss(pred.bfloat16(), image, mask, **options)
    assert mixed.dtype == torch.float32
    assert torch.equal(
        mixed, smk.masked_patch_loss(pred.bfloat16().float(), image, mask, **options)
    )
    assert smk.masked_patch_loss(pred, image.double(), mask, **options).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = smk.masked_patch_loss(pred, image, mask, **options)
    assert torch.equal(inside, smk.masked_patch_loss(pred, image, mask, **options))


def test_views():
    _, image, mask, ids = case(torch.float64)
    wide = torch.randn(BATCH, VALUES, 2 * PATCHES, dtype=torch.float64)
    turned = wide.transpose(1, 2)[:, ::2]
    last = image.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for chosen in (mask, ids):
        got = smk.masked_patch_loss(turned, last, chosen, patch_size=SIDE)
        want = smk.masked_patch_loss(turned.contiguous(), image, chosen, patch_size=SIDE)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_no_batch():
    pred, image, mask, ids = case()
    for chosen in (mask, ids):
        assert smk.masked_patch_loss(pred[:0], image[:0], chosen[:0], patch_size=SIDE) == 0


@pytest.mark.parametrize("kind", ["l1", "cosine"])
@pytest.mark.parametrize("by_ids", [False, True])
def test_compile(kind, by_ids):
    def loss(pred, image, chosen):
        return smk.masked_patch_loss(pred, image, chosen, kind=kind, patch_size=SIDE, norm_pix=True)

    calls = []
    for batch in (5, 7):  # unlike other sizes, which would be taken for the same
        pred, image, mask, ids = case(batch=batch)
        calls.append((pred.requires_grad_(), image, ids if by_ids else mask))
    assert_compiles_once(loss, calls, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("by_ids", [False, True])
def test_never_asks_the_host(by_ids):
    pred, image, mask, ids = (x.to("meta") for x in case())
    loss = smk.masked_patch_loss(
        pred.requires_grad_(), image, ids if by_ids else mask, patch_size=SIDE, norm_pix=True
    )
    loss.backward()
    assert pred.grad.shape == pred.shape


PRED, IMAGE, MASK, IDS = case()
FEATURES = torch.zeros(BATCH, PATCHES, VALUES)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"pred": PRED[0]}, ValueError, r"pred must be \[B, P, C\] or \[B, K, C\], got"),
        ({"pred": PRED.long()}, TypeError, "pred must be of type"),
        ({"pred": PRED[..., 1:]}, ValueError, r"pred must be .* = \(3, 12, 12\)"),
        ({"pred": PRED[:, :5], "ids_or_mask": IDS}, ValueError, "pred must be"),
        ({"target": IMAGE[0, 0]}, ValueError, "target must be"),
        ({"target": IMAGE.long()}, TypeError, "target must be of type"),
        ({"target": IMAGE[1:]}, ValueError, "target must be of the batch of pred"),
        ({"target": IMAGE.to("meta")}, ValueError, "target must be on the device of pred"),
        ({"patch_size": None}, ValueError, "patch_size must be at least 1 for an image"),
        ({"patch_size": 5}, ValueError, "target must have sides that patch_size=5 divides"),
        ({"target": FEATURES}, ValueError, "patch_size is for an image"),
        ({"ids_or_mask": MASK.float()}, TypeError, "ids_or_mask must be of type int64 or bool"),
        ({"ids_or_mask": MASK[:, 1:]}, ValueError, r"ids_or_mask must be \[B, P\] = \(3, 12\)"),
        ({"ids_or_mask": IDS[0]}, ValueError, r"ids_or_mask must be \[B, K\]"),
        ({"ids_or_mask": IDS + 9}, ValueError, r"ids_or_mask must be in \[-1, P\) = \[-1, 12\)"),
        ({"ids_or_mask": IDS[1:]}, ValueError, "pred must be"),
        ({"kind": "l2"}, ValueError, "kind must be one of"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        (
            {
                "target": FEATURES[..., :1],
                "pred": PRED[..., :1],
                "patch_size": None,
                "norm_pix": True,
            },
            ValueError,
            "target must have patches of",
        ),
    ],
)
def test_bad_input(options, error, text):
    given = {"pred": PRED, "target": IMAGE, "ids_or_mask": MASK, "patch_size": SIDE, **options}
    with pytest.raises(error, match=text):
        smk.masked_patch_loss(**given)
