"""grouped_order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import syncmask_kernels as smk
from reference.ops.grouping import grouped_order as oracle
from syncmask_kernels.backends import cpu
from tests.compiling import assert_compiles_once
from tests.grouping_cases import INF, MODES, NAN, broken, items, whole_numbers

SIZES = [(0, 3), (1, 1), (2, 40), (3, 0), (33, 1), (40, 7), (50, 40), (37, 257)]


def check(image: Tensor, text: Tensor, ids: Tensor | None = None, **options: object) -> list[int]:
    got = smk.grouped_order(image, text, ids, **options)
    assert got.dtype == torch.int64
    assert got.tolist() == oracle(image.double(), text.double(), ids, **options)
    return got.tolist()


def unit(size: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    drawn = torch.randn(2, size, dim, generator=torch.Generator().manual_seed(seed))
    image, text = F.normalize(drawn, dim=2)
    return image, text


def test_oracle_on_a_line() -> None:
    """Texts lie where images do; from 3 the chain goes to the near ones, then to what is left."""
    place = torch.tensor([0.0, 1.0, 3.0, 3.5])
    points = torch.stack([place, -(place**2) / 2, torch.ones(4)], dim=1)
    keys = torch.stack([place, torch.ones(4), -(place**2) / 2], dim=1)  # -|x - y|^2 / 2
    assert oracle(points, keys, start=3) == [3, 2, 1, 0]
    assert oracle(points, keys, torch.tensor([0, 1, 7, 7]), start=3, window=2) == [3, 1, 0, 2]
    # A pair is the most similar of all, so semi-hard takes the same.
    assert oracle(points, keys, start=3, mode="semi_hard") == [3, 2, 1, 0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("size", "dim"), SIZES)
def test_equals_oracle(backend: str, size: int, dim: int, mode: str) -> None:
    image, text = whole_numbers(size, dim)
    check(image, text, mode=mode, start=size // 2)
    for window in (2, 7, size + 5):
        check(image, text, items(size, max(size // 3, 1)), mode=mode, window=window)


@pytest.mark.parametrize("mode", MODES)
def test_broken_features(backend: str, mode: str) -> None:
    image, text = broken(90)
    for start in (0, 1, 2, 4, 5):
        check(image, text, mode=mode, start=start)
        check(image, text, items(90, 20), mode=mode, start=start, window=9)
    check(torch.full((5, 2), NAN), text[:5, :2], mode=mode, start=3)
    check(image[:, :1], text[:, :1], mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_similarities_that_differ_by_little(backend: str, mode: str) -> None:
    """By less than the bytes tell that the C++ kernel looks at first."""
    image, text = whole_numbers(80, 30, most=300)
    check(image, text, mode=mode)
    check(image + 400, text + 400, mode=mode)
    check(torch.where(image > 200, image, 3), torch.where(text < -200, text, 5), mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", [40, 257])
def test_unit_features(backend: str, mode: str, dim: int) -> None:
    for seed in range(3):
        check(*unit(150, dim, seed), mode=mode)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    image, text = unit(60, 20)
    check(image.to(dtype), text.to(dtype))
    mixed = smk.grouped_order(image.to(dtype), text.bfloat16())
    assert mixed.tolist() == oracle(image.to(dtype).double(), text.bfloat16().double())


def test_halves_are_multiplied_in_float32(backend: str) -> None:
    """In bfloat16 all these similarities would be 256."""
    image = torch.tensor([[256.0, 1.0]] * 4, dtype=torch.bfloat16)
    text = torch.tensor([[1.0, 0.0], [1.0, 0.25], [1.0, 0.5], [1.0, 0.75]], dtype=torch.bfloat16)
    assert smk.grouped_order(image, text)[1] == 3


def test_views(backend: str) -> None:
    image, text = whole_numbers(40, 9)
    ids = items(40, 9)
    wanted = check(image, text, ids, window=4)
    turned = smk.grouped_order(
        image.t().contiguous().t(), text.repeat(1, 2)[:, :9], ids.repeat(2)[:40], window=4
    )
    assert turned.tolist() == wanted
    assert smk.grouped_order(image[:1].expand(5, 9), text[:5]).sort().values.tolist() == [*range(5)]


@pytest.mark.parametrize("window", [2, 8, 100])
def test_one_item_only(backend: str, window: int) -> None:
    """Nothing can be kept apart: the lowest unused index comes next."""
    image, text = whole_numbers(9, 4)
    order = check(image, text, torch.full((9,), -1), window=window, start=4)
    assert order == [4, 0, 1, 2, 3, 5, 6, 7, 8]


@pytest.mark.parametrize("mode", MODES)
def test_items_are_apart_in_every_window(backend: str, mode: str) -> None:
    image, text = unit(120, 16)
    ids = torch.arange(120) // 3
    plain = ids[smk.grouped_order(image, text, mode=mode)].tolist()
    apart = ids[smk.grouped_order(image, text, ids, mode=mode, window=6)].tolist()
    assert any(len(set(plain[i : i + 6])) < 6 for i in range(100))
    assert all(len(set(apart[i : i + 6])) == 6 for i in range(100))


def test_semi_hard_stays_below_the_pair(backend: str) -> None:
    image = torch.tensor([[1.0, 0.0], [0.9, 0.0], [0.5, 0.0], [0.2, 0.0]])
    text = torch.tensor([[0.6, 0.0], [0.9, 0.0], [0.5, 0.0], [0.6, 0.0]])
    # The image of 0: 0.6 to its text, 0.9 and 0.6 are not below, 0.5 is. The text of 2: 0.25 to its
    # image, so 0.1. The image of 3: 0.12 to its text, nothing is below.
    assert smk.grouped_order(image, text, mode="semi_hard").tolist() == [0, 2, 3, 1]
    assert smk.grouped_order(image, text).tolist() == [0, 1, 2, 3]


def test_infinite_similarities(backend: str) -> None:
    image = torch.tensor([[1.0], [-INF], [INF], [2.0], [NAN]])
    text = torch.tensor([[1.0], [INF], [-INF], [NAN], [INF]])
    for start in range(5):
        for mode in MODES:
            check(image, text, start=start, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_overflowing_similarities(backend: str, mode: str) -> None:
    """Infinite in float32."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-2, 3, (2, 50, 1), generator=generator).float()
    image, text = drawn * torch.where(torch.rand(2, 50, 1, generator=generator) < 0.7, 2.0**80, 1.0)
    for start in range(5):
        got = smk.grouped_order(image, text, mode=mode, start=start)
        assert got.tolist() == oracle(image, text, mode=mode, start=start)


def test_long_rows_of_one_sign(backend: str) -> None:
    """The sums of their bytes would not fit into 32 bits."""
    image, text = (x.abs() + 1 for x in whole_numbers(20, 1300))
    check(image, text)


def test_no_gradient_and_nothing_changes(backend: str) -> None:
    image, text = (x.requires_grad_() for x in unit(20, 4))
    before = image.clone(), text.clone()
    assert not smk.grouped_order(image, text).requires_grad
    assert torch.equal(image, before[0])
    assert torch.equal(text, before[1])


def test_same_order_with_any_number_of_threads() -> None:
    """Threads share steps over many bytes only."""
    if "grouped_order" not in cpu.KERNELS:
        pytest.skip("the CPU library is not built")
    image, text = unit(160, 1 << 15)
    threads, orders = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        orders.append(smk.grouped_order(image, text).tolist())
    torch.set_num_threads(threads)
    assert orders[0] == orders[1] == oracle(image.double(), text.double())


def test_compiles(backend: str) -> None:
    def order(image: Tensor, text: Tensor, ids: Tensor) -> Tensor:
        return smk.grouped_order(image, text, ids, window=3, start=1, mode="semi_hard")

    calls = [(*whole_numbers(n, d), items(n, 4)) for n, d in [(7, 3), (9, 5), (12, 4)]]
    assert_compiles_once(order, calls)


@pytest.mark.parametrize("name", ["eager", "cpu"])
def test_opcheck(name: str) -> None:
    if name == "cpu" and "grouped_order" not in cpu.KERNELS:
        pytest.skip("the CPU library is not built")
    overload = getattr(torch.ops.syncmask.grouped_order, name)
    image, text = whole_numbers(9, 4)
    for arguments in (
        (image, text, items(9, 3), 2, True, 4),
        (image.bfloat16(), text.t().contiguous().t(), None, 0, False, 1),
        (image[:0], text[:0], None, 0, False, 0),
    ):
        torch.library.opcheck(overload, arguments)


def test_never_asks_the_host() -> None:
    features = torch.zeros(7, 3, device="meta")
    assert smk.grouped_order(features, features, features[:, 0].long(), window=2).shape == (7,)


FEAT = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"image_feat": FEAT[0]}, ValueError, r"image_feat must be \[M, D\], got shape \(3,\)"),
        ({"image_feat": FEAT.long()}, TypeError, "image_feat must be of type float16"),
        ({"text_feat": FEAT[:2]}, ValueError, "text_feat must be the shape of image_feat"),
        ({"text_feat": FEAT.int()}, TypeError, "text_feat must be of type float16"),
        ({"text_feat": FEAT.to("meta")}, ValueError, "text_feat must be on the device of image"),
        ({"item_ids": torch.zeros(4)}, TypeError, "item_ids must be of type int64"),
        ({"item_ids": torch.zeros(3).long()}, ValueError, r"item_ids must be \[M\] = \(4,\)"),
        ({"item_ids": torch.zeros(4, device="meta").long()}, ValueError, "item_ids must be on the"),
        ({"start": 4}, ValueError, r"start must be in \[0, M\) = \[0, 4\), got 4"),
        ({"start": -1}, ValueError, r"start must be in \[0, M\) = \[0, 4\), got -1"),
        ({"start": 1.0}, TypeError, "start must be an int, got float"),
        ({"mode": "multinomial"}, ValueError, "mode must be one of 'hardest', 'semi_hard'"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"window": None}, TypeError, "window must be an int, got NoneType"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        smk.grouped_order(**{"image_feat": FEAT, "text_feat": FEAT, **change})
