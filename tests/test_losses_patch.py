"""masked_patch_loss."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch.nn import functional as F

import syncmask_kernels as smk
from benchmarks.measure import extra_bytes
from reference.ops import losses as oracle
from syncmask_kernels.backends import BackendError, cpu
from tests.accuracy import assert_as_accurate
from tests.compiling import assert_compiles_once
from tests.serving import backend_without_autograd

KINDS = ["l1", "mse", "smooth_l1", "cosine"]
NAN = math.nan
SIDE, ROWS, COLUMNS, BATCH = 5, 3, 4, 3  # 75 values: whole vectors, several times, and a rest
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


def gradients(function, pred, target, *args, of_target=False, **options):
    """The loss and its gradients, by the target too, which plain PyTorch records everywhere."""
    leaves = [x.detach().clone().requires_grad_() for x in (pred, target)[: 1 + of_target]]
    target = leaves[1] if of_target else target
    loss = function(leaves[0], target, *args, **options)
    scale = torch.arange(1, loss.numel() + 1).reshape(loss.shape) / loss.numel()
    return [loss.detach(), *torch.autograd.grad((loss * scale).sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_image_and_mask_against_the_truth(backend, dtype, kind, norm_pix, reduction):
    pred, image, mask, _ = case(dtype)
    options = {"kind": kind, "norm_pix": norm_pix, "reduction": reduction}
    options["of_target"] = backend == "eager"
    got = gradients(smk.masked_patch_loss, pred, image, mask, patch_size=SIDE, **options)
    same_type = gradients(plain, pred, image, mask, **options)
    truth = gradients(
        oracle.masked_patch_loss, pred.double(), image.double(), mask, patch_size=SIDE, **options
    )
    assert got[0].dtype == torch.float32
    assert got[1].dtype == dtype
    for value, own, want in zip(got, same_type, truth, strict=True):
        assert_as_accurate(value, own, want, factor=2.0)


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
            fast_mode=True,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_own_backward(kind):
    """The first and the second gradient."""
    pred, image, mask, ids = case(torch.float64, batch=2)
    again = ids[:, [0, 0, 1, 3]]
    for chosen, reduction in ((mask, "mean"), (ids, "none"), (again, "none"), (again, "sum")):

        def loss(pred, chosen=chosen, reduction=reduction):
            return smk.masked_patch_loss(
                pred, image, chosen, kind=kind, patch_size=SIDE, reduction=reduction
            )

        with backend_without_autograd():
            assert torch.autograd.gradcheck(loss, pred.requires_grad_(), fast_mode=True)
            assert torch.autograd.gradgradcheck(loss, pred.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("by", ["mask", "ids", "no ids"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_masked_is_zero_with_zero_gradients(backend, kind, norm_pix, by, reduction):
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
        of_target=backend == "eager",
    )
    for result in results:
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("by_ids", [False, True])
def test_patches_that_are_not_masked_are_never_used(backend, kind, norm_pix, by_ids):
    pred, image, mask, ids = case()
    chosen = ids if by_ids else mask
    options = {"kind": kind, "patch_size": SIDE, "norm_pix": norm_pix}
    options["of_target"] = backend == "eager"
    want = gradients(smk.masked_patch_loss, pred, image, chosen, **options)
    pixels = mask.reshape(BATCH, 1, ROWS, COLUMNS)
    pixels = pixels.repeat_interleave(SIDE, dim=2).repeat_interleave(SIDE, dim=3)
    poisoned = torch.where(mask.unsqueeze(-1), pred, NAN), torch.where(pixels, image, NAN)
    got = gradients(smk.masked_patch_loss, *poisoned, chosen, **options)
    for value, finite in zip(got, want, strict=True):
        assert torch.equal(value, finite)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_pix", [False, True])
def test_flat_patches_give_finite_gradients(backend, kind, norm_pix):
    """A plain white background: variance 0; a prediction of 0: no direction."""
    _, _, mask, _ = case()
    pred = torch.zeros(BATCH, PATCHES, VALUES)
    image = torch.ones(BATCH, 3, ROWS * SIDE, COLUMNS * SIDE)
    options = {"kind": kind, "patch_size": SIDE, "norm_pix": norm_pix}
    options["of_target"] = backend == "eager"
    for result in gradients(smk.masked_patch_loss, pred, image, mask, **options):
        assert torch.isfinite(result).all()


def test_mixed_types():
    pred, image, mask, _ = case()
    options = {"kind": "mse", "patch_size": SIDE}
    for few in (torch.bfloat16, torch.float16):
        got = gradients(smk.masked_patch_loss, pred.to(few), image, mask, **options)
        want = gradients(smk.masked_patch_loss, pred.to(few).float(), image, mask, **options)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1].to(few))
        wide = smk.masked_patch_loss(pred, image.to(few).float(), mask, **options)
        assert torch.equal(smk.masked_patch_loss(pred, image.to(few), mask, **options), wide)
    assert smk.masked_patch_loss(pred, image.double(), mask, **options).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = smk.masked_patch_loss(pred, image, mask, **options)
    assert torch.equal(inside, smk.masked_patch_loss(pred, image, mask, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_views(backend, dtype, channels):
    """However pixels and values lie in memory: the same bits."""
    _, _, mask, ids = case()
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(BATCH, channels, ROWS * SIDE, COLUMNS * SIDE, generator=generator).to(dtype)
    wide = torch.randn(BATCH, channels * SIDE**2, 2 * PATCHES, generator=generator).to(dtype)
    turned = wide.transpose(1, 2)[:, ::2]
    mirrored = image.transpose(2, 3).contiguous().transpose(2, 3)
    last = image.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    features = oracle.patchify(image, SIDE).transpose(1, 2).contiguous().transpose(1, 2)
    for chosen in (mask, ids, ids.repeat_interleave(2, dim=1)[:, ::2]):
        want = gradients(smk.masked_patch_loss, turned.contiguous(), image, chosen, patch_size=SIDE)
        for target, side in ((mirrored, SIDE), (last, SIDE), (features, None)):
            got = gradients(smk.masked_patch_loss, turned, target, chosen, patch_size=side)
            for value, same in zip(got, want, strict=True):
                assert torch.equal(value, same)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("gathered", [False, True])
def test_ids_in_any_order_and_more_than_once(backend, kind, reduction, gathered):
    pred, image, _, _ = case()
    ids = torch.tensor([[7, 2, 7, -1, 0], [-1, -1, -1, -1, -1], [11, 11, 3, 11, -1]])
    pred = pred[:, :5] if gathered else pred
    options = {"kind": kind, "norm_pix": True, "reduction": reduction, "patch_size": SIDE}
    got = gradients(smk.masked_patch_loss, pred, image, ids, **options)
    with smk.use_backend("eager"):
        own, truth = (
            gradients(smk.masked_patch_loss, pred.to(t), image.to(t), ids, **options)
            for t in (torch.float32, torch.float64)
        )
    for value, same_type, want in zip(got, own, truth, strict=True):
        assert_as_accurate(value, same_type, want, factor=2.0)


def test_bright_patches_of_little_contrast_are_normalised(backend):
    """The variance is of what is left when the mean is gone, not a difference of large squares."""
    pred, image, mask, _ = case()
    image = 1000 + image / 100
    options = {"kind": "mse", "norm_pix": True, "reduction": "sum"}
    got = gradients(smk.masked_patch_loss, pred, image, mask, patch_size=SIDE, **options)
    same_type = gradients(plain, pred, image, mask, **options)
    truth = gradients(
        oracle.masked_patch_loss, pred.double(), image.double(), mask, patch_size=SIDE, **options
    )
    for value, own, want in zip(got, same_type, truth, strict=True):
        assert_as_accurate(value, own, want, factor=2.0)


def test_a_graph_that_is_kept_gives_its_gradient_again(backend):
    pred, image, mask, _ = case()
    loss = smk.masked_patch_loss(pred.requires_grad_(), image, mask, patch_size=SIDE)
    twice = [torch.autograd.grad(loss, pred, torch.tensor(w), retain_graph=True) for w in (3, 3)]
    assert torch.equal(*(grad for (grad,) in twice))
    (one,) = torch.autograd.grad(loss, pred)
    torch.testing.assert_close(twice[0][0], 3 * one)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_gradient(backend, kind):
    pred, image, _, ids = case()

    def second(dtype):
        leaf = pred.to(dtype).detach().requires_grad_()
        loss = smk.masked_patch_loss(leaf, image.to(dtype), ids, kind=kind, patch_size=SIDE)
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    got = second(torch.float32)
    with smk.use_backend("eager"):
        assert_as_accurate(got, second(torch.float32), second(torch.float64), factor=2.0)


def test_same_bits_with_one_thread_and_with_three():
    pred, image, mask, ids = case(batch=40)
    results, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for chosen in (mask, ids):
            options = {"patch_size": SIDE, "norm_pix": True}
            results += gradients(smk.masked_patch_loss, pred, image, chosen, **options)
    torch.set_num_threads(before)
    for one, three in zip(results[:4], results[4:], strict=True):
        assert torch.equal(one, three)


def test_no_batch():
    pred, image, mask, ids = case()
    for chosen in (mask, ids):
        assert smk.masked_patch_loss(pred[:0], image[:0], chosen[:0], patch_size=SIDE) == 0


@pytest.mark.parametrize("by_ids", [False, True])
def test_compile(backend, by_ids):
    def loss(pred, image, chosen):
        options = {"patch_size": SIDE, "norm_pix": True}
        mean = smk.masked_patch_loss(pred, image, chosen, kind="cosine", **options)
        return mean, smk.masked_patch_loss(pred, image, chosen, reduction="none", **options)

    calls = []
    for batch in (5, 7):  # unlike other sizes, which would be taken for the same
        pred, image, mask, ids = case(batch=batch)
        calls.append((pred.requires_grad_(), image, ids if by_ids else mask))
    through = "eager" if backend == "eager" else "aot_eager"
    assert_compiles_once(loss, calls, through, rtol=1e-6, atol=1e-6)


def test_opcheck():
    if "masked_patch_loss" not in cpu.KERNELS:
        pytest.skip("the CPU library is not built")
    pred, image, mask, ids = case()
    features = oracle.patchify(image, SIDE).bfloat16()
    calls = [(image, mask, 1, SIDE, True, False, 0), (features, ids, 3, None, False, True, 2)]
    for target, chosen, *options in calls:
        given = pred, target, chosen, *options
        torch.library.opcheck(torch.ops.syncmask.masked_patch_loss.cpu, given)
        grad, divisor = torch.ones(() if options[-1] == 0 else chosen.shape), torch.ones(())
        backward = torch.ops.syncmask.masked_patch_loss_backward.cpu
        torch.library.opcheck(backward, (grad, divisor, *given[:-1]))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of memory")
def test_the_gradient_is_the_only_memory():
    """Copies of what is not masked, or of what is, would show."""
    if "masked_patch_loss" not in cpu.KERNELS:
        pytest.skip("the CPU library is not built")
    pred, image = torch.zeros(32, 256, 768), torch.zeros(32, 3, 256, 256)
    mask = torch.arange(256).expand(32, -1) % 4 == 0

    def step(given):
        loss = smk.masked_patch_loss(given, image, mask, patch_size=16, norm_pix=True)
        return torch.autograd.grad(loss, given)

    step(pred.requires_grad_())
    beyond = extra_bytes(step, pred)
    assert beyond is not None
    assert beyond <= 0.05 * pred.nbytes


def test_what_the_kernel_leaves_to_eager():
    pred, image, mask, _ = case(torch.float64)
    if "masked_patch_loss" not in cpu.KERNELS:
        pytest.skip("the CPU library is not built")
    with smk.use_backend("cpu"), pytest.raises(BackendError, match="float64"):
        smk.masked_patch_loss(pred, image, mask, patch_size=SIDE)


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
        ({"pred": PRED[..., 1:]}, ValueError, r"pred must be .* = \(3, 12, 75\)"),
        ({"pred": PRED[:, :5], "ids_or_mask": IDS}, ValueError, "pred must be"),
        ({"target": IMAGE[0, 0]}, ValueError, "target must be"),
        ({"target": IMAGE.long()}, TypeError, "target must be of type"),
        ({"target": IMAGE[1:]}, ValueError, "target must be of the batch of pred"),
        ({"target": IMAGE.to("meta")}, ValueError, "target must be on the device of pred"),
        ({"patch_size": None}, ValueError, "patch_size must be at least 1 for an image"),
        ({"patch_size": 4}, ValueError, "target must have sides that patch_size=4 divides"),
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
