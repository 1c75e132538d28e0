"""GRIT-VLP and FashionSAP: on stand-ins always, on the hosts where variables name their clones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed, nn

import syncmask_kernels as smk
from syncmask_kernels.integrations import albef, fashionsap, grit_vlp
from syncmask_kernels.negatives import Negatives
from tests.accuracy import assert_as_accurate
from tests.hosts import children, children_standins
from tests.hosts.albef import MASK, Batch, Size, make_batch
from tests.hosts.attributes import all_of, same

ALPHA, PAIRS, WORDS = 0.4, 8, 12
SIZE = Size(width=32, image=32, queue=32, vocabulary=150)
Step = Callable[[nn.Module, int, torch.dtype], tuple[Tensor, ...]]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(seed: int, dtype: torch.dtype) -> Batch:
    batch = make_batch(SIZE, PAIRS, WORDS, generator(seed))
    return batch._replace(image=batch.image.to(dtype))


class Grit:
    """How to make a model, for how many steps to train it, and a step of the host and of ours."""

    patch, unpatch = staticmethod(grit_vlp.patch), staticmethod(grit_vlp.unpatch)

    def __init__(self, make: Callable[[Size], nn.Module], steps: int) -> None:
        self.make, self.steps = make, steps

    def host_step(self, model: nn.Module, seed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        image, text = batch_of(seed, dtype)
        torch.manual_seed(seed)
        return model(image, text)

    def our_step(self, model: nn.Module, seed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """With the words that the host masks under the same seed, which is all it draws."""
        image, text = batch_of(seed, dtype)
        torch.manual_seed(seed)
        words = model.mask(
            text.input_ids.clone(),
            SIZE.vocabulary,
            image.device,
            targets=text.input_ids.clone(),
            probability_matrix=torch.full(text.input_ids.shape, model.mlm_probability),
        )
        return model(image, text, words=albef.MaskedWords(*words))


class FashionSAP:
    """Negatives are injected: the host draws other views of the product too."""

    patch, unpatch = staticmethod(fashionsap.patch), staticmethod(fashionsap.unpatch)

    def __init__(self, make: Callable[[Size], nn.Module], steps: int) -> None:
        self.make, self.steps = make, steps

    def arguments(self, seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
        image, text = batch_of(seed, dtype)
        draw, shape = generator(seed), text.input_ids.shape
        masked = (torch.rand(shape, generator=draw) < 0.3) & (text.input_ids > MASK)
        masked[0, 1] = True
        kinds = torch.randint(2, shape, generator=draw)
        return (
            image,
            text.input_ids.masked_fill(masked, MASK),
            text.attention_mask,
            ALPHA,
            torch.randint(6, (PAIRS, 1), generator=draw),
            text.input_ids.masked_fill(~masked, -100),
            kinds.masked_fill(text.attention_mask == 0, -100),
        )

    def wrong(self, seed: int) -> tuple[Tensor, Tensor]:
        shifts = torch.randint(1, PAIRS, (2, PAIRS), generator=generator(seed))
        images, texts = (torch.arange(PAIRS) + shifts) % PAIRS
        return images, texts

    def host_step(self, model: nn.Module, seed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        drawn = iter(torch.cat(self.wrong(seed)))
        # The shares of positives are rounded to float32 whatever the model's type.
        wide = mock.patch.object(Tensor, "float", lambda tensor: tensor.to(dtype))
        with mock.patch.object(torch, "multinomial", side_effect=drawn), wide:
            return model(*self.arguments(seed, dtype))

    def our_step(self, model: nn.Module, seed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        found = torch.ones(PAIRS, dtype=torch.bool)
        images, texts = (Negatives(ids, found) for ids in self.wrong(seed))
        negatives = albef.HardNegatives(texts, images)
        return model(*self.arguments(seed, dtype), negatives=negatives)


@pytest.fixture
def group() -> Iterator[None]:
    """One process, which FashionSAP does not work without."""
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def child_named(name: str, folder: Path) -> Grit | FashionSAP:
    if name == "stand-in of GRIT-VLP":
        return Grit(children_standins.GritVLP, 10)
    if name == "stand-in of FashionSAP":
        return FashionSAP(children_standins.FashionSAP, 10)
    if name == "GRIT-VLP":
        return Grit(partial(children.real_grit, folder), 50)
    return FashionSAP(partial(children.real_fashionsap, folder), 50)


GRITS = ["stand-in of GRIT-VLP", "GRIT-VLP"]


@pytest.fixture(params=[*GRITS, "stand-in of FashionSAP", "FashionSAP"])
def child(request, tmp_path, group) -> Grit | FashionSAP:
    return child_named(request.param, tmp_path)


@pytest.fixture(params=GRITS)
def grit(request, tmp_path) -> Any:
    return child_named(request.param, tmp_path)


def made(child: Any) -> nn.Module:
    torch.manual_seed(0)
    return child.make(SIZE).train()


def train(
    model: nn.Module, step: Step, dtype: torch.dtype, steps: int
) -> Iterator[dict[str, Tensor]]:
    """What each of the training steps leaves."""
    model.to(dtype)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.02, momentum=0.9)
    for seed in range(steps):
        losses = step(model, seed, dtype)
        optimizer.zero_grad()
        sum(loss for loss in losses if loss.requires_grad).backward()
        optimizer.step()
        left = {f"loss {i}": loss.detach().clone() for i, loss in enumerate(losses)}
        left |= {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        yield left | dict(model.state_dict())


def test_training_steps_are_those_of_the_host(child: Any) -> None:
    host, ours = made(child), made(child)
    child.patch(ours)
    steps = zip(
        train(host, child.host_step, torch.float64, child.steps),
        train(ours, child.our_step, torch.float64, child.steps),
        strict=True,
    )
    for step, (wanted, got) in enumerate(steps, start=1):
        assert wanted.keys() == got.keys()
        for name in wanted if step % 10 == 0 else [n for n in wanted if n.startswith("loss")]:
            torch.testing.assert_close(
                got[name], wanted[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
    host.load_state_dict(ours.state_dict())


def test_a_step_in_single_precision_is_as_accurate_as_the_host(child: Any) -> None:
    runs = []
    for step, dtype in (
        (child.our_step, torch.float32),
        (child.host_step, torch.float32),
        (child.host_step, torch.float64),
    ):
        model = made(child)
        if step == child.our_step:
            child.patch(model)
        runs.append(next(train(model, step, dtype, 1)))
    for kind in ("loss", "grad"):
        flat = (
            torch.cat([t.flatten() for n, t in left.items() if n.startswith(kind)]) for left in runs
        )
        assert_as_accurate(*flat)


def test_unpatching_leaves_the_model_as_it_was(child: Any) -> None:
    model = made(child)
    state, before = copy.deepcopy(model.state_dict()), all_of(model)
    patched = child.patch(model)
    assert "loop" in str(patched)
    with pytest.raises(ValueError, match="patched already"):
        child.patch(model)
    other = copy.deepcopy(model)
    child.our_step(other, 0, torch.float32)
    child.unpatch(other)
    assert "forward" not in vars(other)
    patched.unpatch()
    assert same(before, all_of(model))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    child.host_step(model, 0, torch.float32)


def extra_module(model: Any) -> None:
    model.extra = nn.Linear(1, 1)


def extra_parameter(model: Any) -> None:
    model.extra = nn.Parameter(torch.zeros(1))


def extra_buffer(model: Any) -> None:
    model.register_buffer("extra", torch.zeros(1))


def extra_argument(model: Any) -> None:
    class Other(type(model)):
        def forward(self, image: Tensor, text: Any, extra: Tensor) -> None: ...

    model.__class__ = Other


@pytest.mark.parametrize("add", [extra_module, extra_parameter, extra_buffer, extra_argument])
def test_a_model_of_another_kind_is_refused(child: Any, add: Callable[[Any], None]) -> None:
    model = made(child)
    add(model)
    with pytest.raises(TypeError, match=r"model must be .* extra"):
        child.patch(model)
    assert "forward" not in vars(model)


def test_what_is_no_model_is_refused(child: Any) -> None:
    with pytest.raises(TypeError, match="Module, got str"):
        child.patch("x")
    model = made(child)
    del model.temp
    with pytest.raises(TypeError, match="lacks the parameters temp"):
        child.patch(model)
    with pytest.raises(ValueError, match="negatives must be one of"):
        child.patch(made(child), negatives="soft")


def test_nothing_to_predict_is_zero_where_the_hosts_have_nan(grit: Grit) -> None:
    model = made(grit)
    model.mlm_probability = 0.0
    assert grit.host_step(model, 0, torch.float32)[0].isnan()
    grit.patch(model)
    image, text = batch_of(0, torch.float32)
    assert model(image, text)[0] == 0


def test_patched_grit_masks_words_and_finds_the_hardest(grit: Grit) -> None:
    model = made(grit)
    patched = made(grit)
    grit_vlp.patch(patched)
    losses = patched(*batch_of(3, torch.float32))
    wanted = grit.host_step(model, 3, torch.float32)
    torch.testing.assert_close(losses[1:], wanted[1:])  # of MLM the words differ
    assert losses[0] > 0


def test_grit_takes_a_pair_itself_for_a_negative_where_all_others_underflow(grit: Grit) -> None:
    host, ours = made(grit), made(grit)
    grit_vlp.patch(ours)
    found = []
    for model in (host, ours):
        with torch.no_grad():
            model.temp.fill_(0.001)
        for projection in (model.vision_proj, model.text_proj):
            projection.register_forward_hook(far_from_each_other)
        found.append(wrong_texts(model))
    assert any(text == image for image, text in enumerate(found[0]))
    assert all(text != image for image, text in enumerate(found[1]))


def far_from_each_other(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return torch.eye(*output.shape) + 0 * output


def wrong_texts(model: nn.Module) -> list[int]:
    """The texts that a step shows beside the images, told from their lengths."""
    image, text = batch_of(0, torch.float32)
    lengths = torch.arange(1, PAIRS + 1).unsqueeze(1)
    text = text._replace(attention_mask=(torch.arange(WORDS) < lengths).long())
    seen = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        if kwargs.get("mode") == "fusion":
            seen.append(kwargs["attention_mask"][-PAIRS:].sum(dim=1) - 1)

    model.text_encoder.bert.register_forward_pre_hook(keep, with_kwargs=True)
    model(image, text)
    return seen[-1].tolist()


@pytest.fixture(params=GRITS)
def groups(request) -> Any:
    """The host's object, which only its `grouping` is asked of."""
    if request.param == "GRIT-VLP":
        grit = children.real_groups().GRIT
        return grit.__new__(grit)
    return children_standins.Grit()


def features(examples: int, width: int = 16) -> tuple[Tensor, Tensor]:
    """[D, M] in columns, normalised, as the queue holds them."""
    draw = generator(examples)
    image, text = (
        torch.nn.functional.normalize(torch.randn(width, examples, generator=draw), dim=0)
        for _ in range(2)
    )
    return image, text


@pytest.mark.parametrize("examples", [2, 3, 64, 241])
def test_the_order_of_a_group_is_the_hosts(groups: Any, examples: int) -> None:
    image, text = features(examples)
    ids = torch.randperm(1000)[:examples].float()
    torch.manual_seed(1)
    wanted = [int(i) for i in groups.grouping(image, text, ids, torch.tensor(0.07))]
    grit_vlp.patch_groups(groups)
    torch.manual_seed(1)
    assert groups.grouping(image, text, ids, torch.tensor(0.07)) == wanted
    assert sorted(wanted) == sorted(ids.int().tolist())
    grit_vlp.unpatch(groups)
    assert "grouping" not in vars(groups)


def test_the_hosts_groups_repeat_examples_where_the_softmax_underflows(groups: Any) -> None:
    image, text = features(64)
    ids = torch.arange(64.0)
    assert len({int(i) for i in groups.grouping(image, text, ids, 0.001)}) < 64
    grit_vlp.patch_groups(groups)
    assert sorted(groups.grouping(image, text, ids, 0.001)) == list(range(64))


def test_groups_by_item_and_semi_hard() -> None:
    image, text = features(40)
    ids, items = torch.arange(100, 140), torch.arange(40) // 2
    for mode in ("hardest", "semi_hard"):
        got = grit_vlp.group(image, text, ids, start=3, item_ids=items, window=8, mode=mode)
        order = smk.grouped_order(image.T, text.T, items, start=3, window=8, mode=mode)
        assert got == (order + 100).tolist()
    with pytest.raises(ValueError, match="ids must be"):
        grit_vlp.group(image, text, ids[:-1])


def test_views_of_one_product_are_no_negatives(child: Any) -> None:
    if isinstance(child, Grit):
        given = {"item_ids": torch.zeros(PAIRS, dtype=torch.long)}
        call = batch_of(0, torch.float32)
    else:
        given = {}
        call = child.arguments(0, torch.float32)
        call[4].zero_()
    model = made(child)
    child.patch(model)
    assert model(*call, **given)[2 if isinstance(child, Grit) else 1] > 0
    model.itm_head.weight.data.zero_()
    model.itm_head.bias.data.copy_(torch.tensor([0.0, 50.0]))  # sure that all pairs match
    assert model(*call, **given)[2 if isinstance(child, Grit) else 1] < 1e-6
