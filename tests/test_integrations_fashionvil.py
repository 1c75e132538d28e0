"""FashionViL: its joint block, masks, pairs and losses, on a stand-in always.

Its own pretraining code runs where SYNCMASK_FASHIONVIL names a clone; see tests/hosts/mmf.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import syncmask_kernels as smk
from syncmask_kernels.integrations import fashionvil
from syncmask_kernels.integrations.bert_attention import capture_attention
from tests.accuracy import assert_as_accurate
from tests.hosts import fashionvil as host
from tests.hosts.attributes import all_of, same
from tests.hosts.mmf import real_fashionvil

Make = Callable[..., nn.Module]
TASKS = ("itc", "itm", "mlm", "mpfr")
OPTIONS: dict[str, Any] = {"special_ids": host.SPECIAL, "patch_ratio": 0.25, "token_ratio": 0.5}


@pytest.fixture(params=["stand-in", "FashionViL"])
def make(request, tmp_path) -> Make:
    """`make(**options)` -> a model with the same weights each time, in training mode."""

    def made(**options: Any) -> nn.Module:
        torch.manual_seed(0)
        real = request.param == "FashionViL"
        model = real_fashionvil(tmp_path, **options) if real else host.FashionViL(**options)
        return model.train()

    return made


def batch_of(seed: int, task: str, dtype: torch.dtype = torch.float32, views: int = 1) -> Any:
    sample_list = next(host.sample_lists(seed, views=views))
    return {**sample_list, "image": sample_list["image"].to(dtype), "task": task}


def prepared(model: nn.Module, seed: int, task: str, dtype: torch.dtype = torch.float32) -> Any:
    return model.add_post_flatten_params(batch_of(seed, task, dtype))


def loss_of(model: nn.Module, sample_list: dict[str, Any]) -> Tensor:
    (loss,) = model(sample_list)["losses"].values()
    return loss


def joint(model: nn.Module, sample_list: dict[str, Any]) -> None:
    model.get_joint_embedding(
        sample_list["input_ids"],
        sample_list["segment_ids"],
        sample_list["image"],
        sample_list["visual_embeddings_type"],
        sample_list["attention_mask"],
    )


def joint_block(model: nn.Module, sample_list: dict[str, Any]) -> list[Tensor]:
    """What each layer of the host returns, of words' queries and patches' keys."""
    words, blocks = sample_list["input_ids"].shape[1], []

    def keep(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        blocks.append(output[1][:, :, :words, words:].detach())

    hooks = [x.attention.self.register_forward_hook(keep) for x in model.bert.encoder.layer]
    joint(model, sample_list)
    for hook in hooks:
        hook.remove()
    return blocks


@pytest.mark.parametrize("double_view", [False, True])
def test_fifty_steps_are_those_of_the_host(make: Make, double_view: bool) -> None:
    both = [make(double_view=double_view).double() for _ in range(2)]
    patched = fashionvil.patch(both[1])
    for model in both:  # of similarities below -1 the host takes positives for negatives, see below
        model.contrastive_norm.norm_s.data.fill_(0.9)
    learners = [torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9) for model in both]
    for step in range(50):
        task, losses = TASKS[step % len(TASKS)], []
        for model, learner in zip(both, learners, strict=True):
            sample_list = batch_of(step, task, torch.float64, 1 + double_view)
            torch.manual_seed(step)
            losses.append(loss_of(model, sample_list))
            learner.zero_grad()
            losses[-1].backward()
            learner.step()
        torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-12)
    plain, changed = (model.state_dict() for model in both)
    torch.testing.assert_close(plain, changed, rtol=1e-9, atol=1e-12)
    both[0].load_state_dict(changed)
    patched.unpatch()
    assert "_forward_mlm" not in vars(both[1])


def test_the_loss_of_words_in_single_precision_is_as_accurate_as_the_hosts(make: Make) -> None:
    results = []
    for ours, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.float64)):
        model = make().to(dtype)
        if ours:
            fashionvil.patch(model)
        loss = loss_of(model, batch_of(2, "mlm", dtype))
        loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), torch.cat(grads)))
    for got, own, truth in zip(*results, strict=True):
        assert_as_accurate(got, own, truth, factor=2)


@pytest.mark.parametrize("layers", [[-1], [0, 2]])
def test_the_map_is_the_joint_block_of_the_layers_asked_for(make: Make, layers: list[int]) -> None:
    found, masks = [], []
    for dtype in (torch.float32, torch.float64):
        model = make(layers=3).to(dtype)
        sample_list = prepared(model, 3, "mlm", dtype)
        valid = smk.token_valid(sample_list["input_ids"], host.SPECIAL)
        found.append(fashionvil.sync_masks(model.bert, sample_list, layers=layers, **OPTIONS))
        blocks = joint_block(model, sample_list)
        masks.append(
            smk.sync_topk_mask(
                [blocks[i] for i in layers],
                valid,
                patch_ratio=0.25,
                token_ratio=0.5,
                skip_keys=0,
            )
        )
    for name in ("patch_scores", "token_scores"):
        got, own, truth = (getattr(x, name) for x in (found[0], *masks))
        assert_as_accurate(got, own, truth)
    assert torch.equal(found[0].patch_mask, masks[1].patch_mask)
    assert torch.equal(found[0].token_mask, masks[1].token_mask)


def test_dropout_of_the_probabilities_does_not_reach_the_map(make: Make) -> None:
    plain, dropping = make(layers=1), make(layers=1, dropout=0.5)
    sample_list = prepared(plain, 4, "mlm")
    want = fashionvil.sync_masks(plain.bert, sample_list, **OPTIONS)
    got = fashionvil.sync_masks(dropping.bert, sample_list, **OPTIONS)
    assert torch.equal(got.patch_scores, want.patch_scores)
    assert (joint_block(dropping, sample_list)[0] == 0).any()


def test_values_and_rules_are_passed_on(make: Make) -> None:
    model = make()
    sample_list = prepared(model, 5, "mlm")
    attention = model.bert.encoder.layer[-1].attention.self
    with torch.no_grad(), capture_attention([attention]) as captured:
        joint(model, sample_list)
    (q,), (k,), (v,) = captured.q, captured.k, captured.v
    words = sample_list["input_ids"].shape[1]
    rules = {"token_score": "dual", "token_k": 2}
    got = fashionvil.sync_masks(
        model.bert, sample_list, special_ids=host.SPECIAL, weigh_by_value=True, **rules
    )
    want = smk.sync_topk_mask_qk(
        q[:, :, :words],
        k,
        smk.token_valid(sample_list["input_ids"], host.SPECIAL),
        v=v,
        key_valid=sample_list["attention_mask"].bool(),
        skip_keys=words,
        **rules,
    )
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_padding_is_neither_read_nor_chosen(make: Make) -> None:
    model = make()
    sample_list = prepared(model, 6, "mlm")
    options = {"special_ids": host.SPECIAL[1:], "token_ratio": 1.0}  # padding is not named
    got = fashionvil.sync_masks(model.bert, sample_list, **options)
    assert torch.equal(got.token_mask, smk.token_valid(sample_list["input_ids"], host.SPECIAL))
    other = sample_list["input_ids"].masked_fill(sample_list["input_mask"] == 0, 30)
    again = fashionvil.sync_masks(model.bert, {**sample_list, "input_ids": other}, **options)
    assert torch.equal(got.patch_scores, again.patch_scores)


def masking(teacher: nn.Module, **options: Any) -> fashionvil.Masking:
    return fashionvil.Masking(teacher, host.MASK, host.SPECIAL, options)


@pytest.mark.parametrize("double_view", [False, True])
def test_masks_of_the_teacher_go_where_the_host_has_random_ones(
    make: Make, double_view: bool
) -> None:
    model = make(double_view=double_view)
    teacher = copy.deepcopy(model.bert).eval()
    keys, before = set(model.state_dict()), all_of(model)
    patched = fashionvil.patch(model, masking=masking(teacher, patch_k=3, token_ratio=0.5))
    assert "teacher" in str(patched)
    assert set(model.state_dict()) == keys
    for task in ("mlm", "mpfr"):
        sample_list = model.add_post_flatten_params(batch_of(7, task, views=1 + double_view))
        ids, labels = sample_list["input_ids"], sample_list["lm_label_ids"]
        chosen = fashionvil.sync_masks(
            teacher, sample_list, special_ids=host.SPECIAL, patch_k=3, token_ratio=0.5
        )
        assert torch.equal(labels, ids.where(chosen.token_mask, -1))
        masked = sample_list["input_ids_masked"]
        assert torch.equal(masked.where(~chosen.token_mask, ids), ids)
        assert (masked == host.MASK).any()
        assert torch.equal(sample_list["image_masks"] == 1, chosen.patch_mask)
        kept = sample_list["image"] * ~chosen.patch_mask.unsqueeze(-1)
        assert torch.equal(sample_list["masked_image"], kept)
        assert torch.equal(sample_list["token_ids"], chosen.token_ids)
        loss_of(model, batch_of(7, task, views=1 + double_view)).backward()
    for task in ("itm", "itc"):
        untouched = batch_of(7, task, views=1 + double_view)
        assert "token_ids" not in model.add_post_flatten_params(untouched)
    assert "token_ids" not in model.eval().add_post_flatten_params(batch_of(7, "mlm"))
    patched.unpatch()
    assert same(before, all_of(model.train()))


@pytest.mark.parametrize("double_view", [False, True])
def test_words_of_each_batch_are_masked_whole(make: Make, double_view: bool) -> None:
    model = make(double_view=double_view)
    teacher, starts = copy.deepcopy(model.bert).eval(), torch.arange(host.VOCABULARY) % 2 == 0

    def options(sample_list: Mapping[str, Any]) -> dict[str, Any]:
        return {"token_ratio": 0.5, "word_ids": starts[sample_list["input_ids"]].cumsum(dim=1)}

    given = fashionvil.Masking(teacher, host.MASK, host.SPECIAL, options)
    assert "each batch" in str(fashionvil.patch(model, masking=given))
    masked = []
    for seed in (7, 8):
        batch = batch_of(seed, "mlm", views=1 + double_view)
        sample_list = model.add_post_flatten_params(batch)
        chosen = sample_list["lm_label_ids"] != -1
        piece = smk.token_valid(sample_list["input_ids"], host.SPECIAL)
        words = options(sample_list)["word_ids"]
        together = (words[:, 1:] == words[:, :-1]) & piece[:, 1:] & piece[:, :-1]
        assert together.any()
        assert torch.equal(chosen[:, 1:][together], chosen[:, :-1][together])
        masked.append(chosen)
    assert not torch.equal(*masked)
    with pytest.raises(TypeError, match="got a tensor word_ids: hand over a function"):
        masking(teacher, word_ids=words)


def test_losses_at_known_places_are_those_of_the_masks() -> None:
    torch.manual_seed(0)
    model = host.FashionViL()
    sample_list = prepared(model, 8, "mpfr")
    chosen = fashionvil.sync_masks(model.bert, sample_list, **OPTIONS)
    fashionvil.mask_sample_list(
        sample_list, chosen, mask_id=1, vocab_size=host.VOCABULARY, special_ids=host.SPECIAL
    )
    image, mask, labels = sample_list["image"], chosen.patch_mask, sample_list["lm_label_ids"]
    patches = torch.randn(*mask.shape, host.WIDTH)
    words = torch.randn(*labels.shape, host.WIDTH)
    codes, head = torch.randint(7, mask.shape), model.heads["mlm"]
    mpfc = nn.Sequential(nn.Tanh(), nn.Linear(host.WIDTH, 7))
    got = [
        fashionvil.mlm_loss(head, words, labels),
        fashionvil.mlm_loss(head, words, labels, ids=chosen.token_ids),
        fashionvil.mpfr_loss(model.heads["mpfr"], patches, image, chosen.patch_ids),
        fashionvil.mpfc_loss(mpfc, patches, codes, chosen.patch_ids),
    ]
    mlm = F.cross_entropy(head(words).flatten(0, 1), labels.flatten(), ignore_index=-1)
    mpfr = F.mse_loss(model.heads["mpfr"](patches[mask]), image[mask])
    want = [mlm, mlm, mpfr, F.cross_entropy(mpfc(patches[mask]), codes[mask])]
    torch.testing.assert_close(got, want)

    none = torch.full_like(chosen.patch_ids, -1)
    assert fashionvil.mpfr_loss(model.heads["mpfr"], patches, image, none) == 0
    assert fashionvil.mpfc_loss(mpfc, patches, codes, none) == 0


def test_nothing_to_predict_is_zero_where_the_host_has_nan(make: Make) -> None:
    model, batch = make(), batch_of(8, "mlm")
    batch["lm_label_ids"].fill_(-1)
    assert loss_of(model, dict(batch)).isnan()
    fashionvil.patch(model)
    loss = loss_of(model, dict(batch))
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def pairs_of(model: nn.Module, views: int = 1) -> tuple[Tensor, Tensor]:
    """The texts shown beside the images, told from their first words, and which are said to fit."""
    batch = batch_of(9, "itm", views=views)
    batch["input_ids"][:, 1] = 10 + torch.arange(len(batch["input_ids"]))
    torch.manual_seed(1)
    sample_list = model.get_hard_pairs(model.add_post_flatten_params(batch))
    return sample_list["input_ids"][:, 1] - 10, sample_list["targets"]


@pytest.mark.parametrize("double_view", [False, True])
def test_a_positive_is_never_taken_for_a_negative(make: Make, double_view: bool) -> None:
    hosts, ours = make(double_view=double_view), make(double_view=double_view)
    patched = fashionvil.patch(ours)
    for model in (hosts, ours):  # all texts are alike, and opposite to all images
        model.bert.get_text_embedding = lambda *given: (text, None, None)
        model.bert.get_image_embedding = lambda *given: (image, None, None)
    batch = 6 * (1 + double_view)
    text, image = torch.ones(batch, 9, host.WIDTH), -torch.ones(batch, 8, host.WIDTH)
    items = torch.arange(batch) % 6
    shown, fits = pairs_of(hosts, 1 + double_view)
    assert (shown[fits == 0] == items[fits == 0]).any()
    shown, fits = pairs_of(ours, 1 + double_view)
    assert torch.equal(shown == items, fits == 1)
    assert 0 < fits.sum() < batch
    assert ours.training
    assert "hardest" in str(patched)


def test_what_is_not_fashionvil_is_refused() -> None:
    with pytest.raises(TypeError, match="Module, got str"):
        fashionvil.patch("x")
    with pytest.raises(TypeError, match="Linear lacks bert"):
        fashionvil.patch(nn.Linear(1, 1))
    model = host.FashionViL()
    with pytest.raises(ValueError, match="negatives must be one of"):
        fashionvil.patch(model, negatives="soft")
    assert "get_hard_pairs" not in vars(model)
    fashionvil.patch(model)
    with pytest.raises(ValueError, match="patched already"):
        fashionvil.patch(model)
    fashionvil.unpatch(model)


def test_pairs_by_item_and_semi_hard() -> None:
    sim = torch.tensor([[5.0, 9.0, 3.0], [9.0, 5.0, 4.0], [1.0, 2.0, 3.0]])
    every = torch.ones(3, dtype=torch.bool)
    # More similar than the own text is no semi-hard negative.
    found = fashionvil.hard_pairs(sim, mode="semi_hard", replace=every)
    assert found.text_index.tolist() == [2, 2, 1]
    items = torch.tensor([4, 4, 5])
    found = fashionvil.hard_pairs(sim, mode="hardest", item_ids=items, replace=every)
    assert found.text_index.tolist() == [2, 2, 1]
    found = fashionvil.hard_pairs(sim, mode="hardest", item_ids=torch.zeros(3).long())
    assert found.text_index.tolist() == [0, 1, 2]
    assert not found.replaced.any()
    drawn = fashionvil.hard_pairs(torch.randn(2000, 2000), mode="hardest").replaced.float().mean()
    assert abs(float(drawn) - 0.5) < 0.06


@pytest.mark.parametrize("mode", ["hardest", "multinomial"])
def test_pairs_of_one_generator_are_the_same(mode: str) -> None:
    sim = torch.randn(64, 64)
    (first, again, other) = (
        fashionvil.hard_pairs(sim, mode=mode, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.text_index, again.text_index)
    assert torch.equal(first.replaced, again.replaced)
    assert not torch.equal(first.replaced, other.replaced)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"correlations": torch.zeros(2, 3)}, ValueError, "correlations must be"),
        (
            {"correlations": torch.zeros(3, 3), "double_view": True},
            ValueError,
            "correlations must have an even B",
        ),
        (
            {"correlations": torch.zeros(2, 2), "replace": torch.ones(2)},
            TypeError,
            "replace must be of type bool",
        ),
        (
            {"correlations": torch.zeros(2, 2), "replace": torch.ones(3).bool()},
            ValueError,
            "replace must be",
        ),
    ],
)
def test_bad_pairs_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fashionvil.hard_pairs(**arguments)
