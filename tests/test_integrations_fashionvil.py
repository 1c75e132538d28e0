"""FashionViL: its joint block, its masks, its pairs and its losses, with the lines changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from syncmask_kernels.integrations import fashionvil
from syncmask_kernels.integrations.bert_attention import capture_attention
from tests.accuracy import assert_as_accurate
from tests.hosts import fashionvil as host


class Changed(host.FashionViL):
    """The host with the lines of docs/integrations/fashionvil.md."""

    mode = "hardest"

    def pairs(self, correlations: Tensor, coins: Tensor) -> tuple[Tensor, Tensor]:
        return fashionvil.hard_pairs(
            correlations, double_view=self.double_view, mode=self.mode, replace=coins > 0.5
        )

    def mlm_loss(self, hidden: Tensor, sample_list: dict[str, Any]) -> Tensor:
        return fashionvil.mlm_loss(self.heads["mlm"], hidden, sample_list["lm_label_ids"])

    def patch_loss(self, hidden: Tensor, sample_list: dict[str, Any]) -> Tensor:
        ids = masked_ids(sample_list["image_masks"])
        if sample_list["task"] == "mpfr":
            return fashionvil.mpfr_loss(self.heads["mpfr"], hidden, sample_list["image"], ids)
        return fashionvil.mpfc_loss(self.heads["mpfc"], hidden, sample_list["codes"], ids)


def masked_ids(mask: Tensor) -> Tensor:
    return smk.topk_mask(mask.float(), k=mask.shape[1], valid=mask == 1).ids


def models(seed: int = 0, **options: Any) -> tuple[host.FashionViL, Changed]:
    torch.manual_seed(seed)
    plain = host.FashionViL(**options)
    changed = Changed(**options)
    changed.load_state_dict(plain.state_dict())
    return plain, changed


def prepared(model: host.FashionViL, seed: int, task: str, **sizes: int) -> dict[str, Any]:
    sample_list = next(host.sample_lists(seed, **sizes))
    return model.add_post_flatten_params({**sample_list, "task": task})


def joint_block(model: host.FashionViL, sample_list: dict[str, Any]) -> list[Tensor]:
    """What each layer of the host returns, of words' queries and patches' keys."""
    words = sample_list["input_ids"].shape[1]
    _, _, attentions = model.bert.get_joint_embedding(
        sample_list["input_ids"],
        sample_list["segment_ids"],
        sample_list["image"],
        sample_list["visual_embeddings_type"],
        sample_list["attention_mask"],
    )
    return [probs[:, :, :words, words:] for probs in attentions]


@pytest.mark.parametrize("double_view", [False, True])
def test_fifty_steps_with_and_without_the_changes_end_alike(double_view: bool) -> None:
    both = [model.double() for model in models(double_view=double_view)]
    for model in both:  # of similarities below -1 the host takes positives for negatives, see below
        model.norm_s.data.fill_(0.9)
    learners = [torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9) for model in both]
    tasks = ("itc", "itm", "mlm", "mpfr", "mpfc")
    batches = host.sample_lists(1, views=1 + double_view)
    for step in range(50):
        sample_list = {**next(batches), "task": tasks[step % len(tasks)]}
        sample_list["image"] = sample_list["image"].double()
        losses = []
        for model, learner in zip(both, learners, strict=True):
            losses.append(model(model.add_post_flatten_params(sample_list)))
            learner.zero_grad()
            losses[-1].backward()
            learner.step()
        torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-12)
    plain, changed = (model.state_dict() for model in both)
    torch.testing.assert_close(plain, changed, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("task", ["mlm", "mpfr", "mpfc"])
def test_the_losses_and_their_gradients_are_the_hosts(task: str) -> None:
    plain, changed = models()
    results = []
    for model, dtype in ((changed, None), (plain, None), (copy.deepcopy(plain), torch.float64)):
        sample_list = prepared(plain, 2, task)
        if dtype is not None:
            model = model.to(dtype)
            sample_list |= {n: sample_list[n].to(dtype) for n in ("image", "masked_image")}
        loss = model(sample_list)
        loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), torch.cat(grads)))
    for got, own, truth in zip(*results, strict=True):
        assert_as_accurate(got, own, truth, factor=2)


def test_the_map_is_the_joint_block_of_the_layers_asked_for() -> None:
    plain, _ = models(layers=3)
    sample_list = prepared(plain, 3, "mlm")
    valid = smk.token_valid(sample_list["input_ids"], host.SPECIAL)
    for layers in ([-1], [0, 2]):
        got = fashionvil.sync_masks(
            plain.bert, sample_list, special_ids=host.SPECIAL, layers=layers, patch_ratio=0.5
        )
        block = joint_block(plain, sample_list)
        exact = joint_block(
            copy.deepcopy(plain).double(), {**sample_list, "image": sample_list["image"].double()}
        )
        own, truth = (
            smk.sync_topk_mask([blocks[i] for i in layers], valid, patch_ratio=0.5, skip_keys=0)
            for blocks in (block, exact)
        )
        assert_as_accurate(got.patch_scores, own.patch_scores.detach(), truth.patch_scores.detach())
        assert_as_accurate(got.token_scores, own.token_scores.detach(), truth.token_scores.detach())
        assert torch.equal(got.patch_mask, truth.patch_mask)
        assert torch.equal(got.token_mask, truth.token_mask)


def test_dropout_of_the_probabilities_does_not_reach_the_map() -> None:
    plain, dropping = models(layers=1)[0], models(layers=1, dropout=0.5)[0]
    sample_list = prepared(plain, 4, "mlm")
    options = {"special_ids": host.SPECIAL, "patch_ratio": 0.25}
    want = fashionvil.sync_masks(plain.bert, sample_list, **options)
    got = fashionvil.sync_masks(dropping.bert.train(), sample_list, **options)
    assert torch.equal(got.patch_scores, want.patch_scores)
    assert (joint_block(dropping, sample_list)[0] == 0).any()


def test_values_and_rules_are_passed_on() -> None:
    plain, _ = models()
    sample_list = prepared(plain, 5, "mlm")
    with capture_attention([plain.bert.encoder.layer[-1].attention.self]) as captured:
        joint_block(plain, sample_list)
    words = sample_list["input_ids"].shape[1]
    (q,), (k,), (v,) = captured.q, captured.k, captured.v
    got = fashionvil.sync_masks(
        plain.bert,
        sample_list,
        special_ids=host.SPECIAL,
        weigh_by_value=True,
        token_score="dual",
        token_k=2,
    )
    want = smk.sync_topk_mask_qk(
        q[:, :, :words],
        k,
        smk.token_valid(sample_list["input_ids"], host.SPECIAL),
        v=v,
        key_valid=sample_list["attention_mask"].bool(),
        skip_keys=words,
        token_score="dual",
        token_k=2,
    )
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_padding_is_neither_read_nor_chosen() -> None:
    plain, _ = models()
    sample_list = prepared(plain, 6, "mlm")
    options = {"special_ids": host.SPECIAL[1:], "token_ratio": 1.0}  # padding is not named
    got = fashionvil.sync_masks(plain.bert, sample_list, **options)
    assert torch.equal(got.token_mask, smk.token_valid(sample_list["input_ids"], host.SPECIAL))
    other = sample_list["input_ids"].clone()
    other[sample_list["input_mask"] == 0] = 30
    again = fashionvil.sync_masks(plain.bert, {**sample_list, "input_ids": other}, **options)
    assert torch.equal(got.patch_scores, again.patch_scores)


def test_masks_go_where_the_host_has_its_own() -> None:
    plain, _ = models()
    sample_list = prepared(plain, 7, "mpfr")
    keys = set(sample_list)
    chosen = fashionvil.sync_masks(
        plain.bert, sample_list, special_ids=host.SPECIAL, patch_k=3, token_ratio=0.5
    )
    fashionvil.mask_sample_list(
        sample_list,
        chosen,
        mask_id=host.MASK,
        vocab_size=host.VOCABULARY,
        special_ids=host.SPECIAL,
        generator=torch.Generator().manual_seed(0),
    )
    assert set(sample_list) == keys
    labels, ids = sample_list["lm_label_ids"], sample_list["input_ids"]
    assert torch.equal(labels != -1, chosen.token_mask)
    assert torch.equal(labels[chosen.token_mask], ids[chosen.token_mask])
    assert torch.equal(sample_list["input_ids_masked"][~chosen.token_mask], ids[~chosen.token_mask])
    assert (sample_list["input_ids_masked"] == host.MASK).any()
    kept = (sample_list["image_masks"] == 0).float().unsqueeze(-1)
    assert torch.equal(sample_list["masked_image"], sample_list["image"] * kept)
    assert (sample_list["image_masks"].sum(dim=1) == 3).all()

    host_losses, ids_losses = [], []
    hidden = torch.randn(6, 8, host.WIDTH)
    for task in ("mpfr", "mpfc"):
        host_losses.append(plain.patch_loss(hidden, {**sample_list, "task": task}))
    ids_losses.append(
        fashionvil.mpfr_loss(plain.heads["mpfr"], hidden, sample_list["image"], chosen.patch_ids)
    )
    ids_losses.append(
        fashionvil.mpfc_loss(plain.heads["mpfc"], hidden, sample_list["codes"], chosen.patch_ids)
    )
    words = torch.randn(6, ids.shape[1], host.WIDTH)
    host_losses.append(plain.mlm_loss(words, sample_list))
    ids_losses.append(fashionvil.mlm_loss(plain.heads["mlm"], words, labels, ids=chosen.token_ids))
    torch.testing.assert_close(ids_losses, host_losses)


def test_nothing_to_predict_is_zero_where_the_host_has_nan() -> None:
    plain, changed = models()
    sample_list = prepared(plain, 8, "mlm")
    sample_list |= {
        "lm_label_ids": torch.full_like(sample_list["lm_label_ids"], -1),
        "image_masks": torch.zeros_like(sample_list["image_masks"]),
    }
    for task in fashionvil.MASKED_TASKS:
        assert plain({**sample_list, "task": task}).isnan()
        loss = changed({**sample_list, "task": task})
        loss.backward()
        assert loss == 0
    assert all(not p.grad.any() for p in changed.parameters() if p.grad is not None)


def test_hardest_pairs_are_the_hosts_argmax() -> None:
    for double_view in (False, True):
        plain, changed = models(double_view=double_view)
        sim, coins = torch.rand(8, 8), torch.rand(8)
        want, got = plain.pairs(sim.clone(), coins), changed.pairs(sim, coins)
        assert torch.equal(want[0], got[0])
        assert torch.equal(want[1], got[1])


def test_a_positive_is_never_taken_for_a_negative() -> None:
    plain, changed = models()
    sim = torch.full((4, 4), -3.0).fill_diagonal_(9.0)  # scaled features: below the host's -1
    own = torch.arange(4)
    assert torch.equal(plain.pairs(sim.clone(), torch.ones(4))[0], own)
    assert (changed.pairs(sim, torch.ones(4))[0] != own).all()


def test_pairs_by_item_and_semi_hard() -> None:
    sim = torch.tensor([[5.0, 9.0, 3.0], [9.0, 5.0, 4.0], [1.0, 2.0, 3.0]])
    every = torch.ones(3, dtype=torch.bool)
    found = fashionvil.hard_pairs(sim, replace=every)  # more similar than the own text: no
    assert found.text_index.tolist() == [2, 2, 1]
    items = torch.tensor([4, 4, 5])
    found = fashionvil.hard_pairs(sim, mode="hardest", item_ids=items, replace=every)
    assert found.text_index.tolist() == [2, 2, 1]
    found = fashionvil.hard_pairs(sim, mode="hardest", item_ids=torch.zeros(3).long())
    assert found.text_index.tolist() == [0, 1, 2]
    assert not found.replaced.any()
    drawn = fashionvil.hard_pairs(torch.randn(2000, 2000), mode="hardest").replaced.float().mean()
    assert abs(float(drawn) - 0.5) < 0.06


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
