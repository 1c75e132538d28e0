"""Capture of attention from queries, keys and values of the BertSelfAttention family."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import syncmask_kernels as smk
from syncmask_kernels.integrations.bert_attention import capture_attention
from tests.accuracy import assert_as_accurate
from tests.hosts.albef_standin import SelfAttention

BATCH, WORDS, KEYS, WIDTH, HEADS = 3, 5, 10, 24, 4


def attention(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> SelfAttention:
    torch.manual_seed(0)
    config = SimpleNamespace(width=WIDTH, heads=HEADS, dropout=dropout)
    return SelfAttention(config).to(dtype)


def words(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(BATCH, WORDS, WIDTH, dtype=dtype)


def image(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(BATCH, KEYS, WIDTH, dtype=dtype)


def run(module, hidden, seen, mask=None):
    """As `BertAttention` calls it: by position."""
    mask = hidden.new_zeros(BATCH, 1, 1, KEYS) if mask is None else mask
    return module(hidden, None, None, seen, mask, None)


def probs_of(module, hidden, seen, mask=None):
    module.save_attention = True
    run(module, hidden, seen, mask)
    return module.get_attention_map().detach()


def test_map_is_the_head_mean_of_what_the_host_saves():
    module, hidden, seen = attention(), words(), image()
    with torch.no_grad(), capture_attention([module]) as captured:
        run(module, hidden, seen)
    truth = probs_of(attention(dtype=torch.float64), hidden.double(), seen.double())
    plain = probs_of(module, hidden, seen)
    got, plain, truth = captured.map(), plain.mean(1)[..., 1:], truth.mean(1)[..., 1:]
    assert_as_accurate(got, plain, truth)
    assert captured.map(skip_keys=0).shape == (BATCH, WORDS, KEYS)
    assert not got.requires_grad


def test_map_is_that_before_dropout():
    modules, hidden, seen = [attention(0.0), attention(0.5)], words(), image()
    maps = []
    for module in modules:
        with capture_attention([module.train()]) as captured:
            run(module, hidden, seen)
        maps.append(captured.map())
    assert torch.equal(*maps)
    assert not maps[0].requires_grad


def test_layers_are_averaged():
    modules, hidden, seen = [attention(), attention()], words(), image()
    nn.init.normal_(modules[1].query.weight)
    with capture_attention(modules) as captured:
        for module in modules:
            run(module, hidden, seen)
    each = [smk.head_average(probs_of(module, hidden, seen)) for module in modules]
    torch.testing.assert_close(captured.map(), (each[0] + each[1]) / 2)


def test_masked_keys_take_no_part():
    module, hidden, seen = attention(), words(), image()
    valid = torch.rand(BATCH, KEYS) < 0.6
    valid[:, 0] = True
    for excluded in (-10000.0, torch.finfo(torch.float32).min):
        mask = torch.where(valid, 0.0, excluded)[:, None, None]
        with capture_attention([module]) as captured:
            run(module, hidden, seen, mask)
        wanted = smk.head_average(probs_of(module, hidden, seen, mask))
        torch.testing.assert_close(captured.map(), wanted)
        assert torch.equal(captured.key_valid, valid)


def test_attention_among_words_has_their_mask():
    module, hidden = attention(), words()
    mask = hidden.new_zeros(BATCH, 1, 1, WORDS)
    mask[..., 3:] = -10000.0
    with capture_attention([module]) as captured:
        module(hidden, attention_mask=mask)
    got = captured.map(skip_keys=0)
    assert not got[..., 3:].any()
    torch.testing.assert_close(got.sum(dim=-1), torch.ones(BATCH, WORDS))


@pytest.mark.parametrize("token_score", ["max", "text_softmax", "dual"])
@pytest.mark.parametrize("weigh_by_value", [False, True])
def test_masks_are_those_of_queries_keys_and_values(token_score, weigh_by_value):
    module, hidden, seen = attention(), words(), image()
    valid = torch.arange(WORDS).expand(BATCH, -1) > 0
    with capture_attention([module]) as captured:
        run(module, hidden, seen)
    q, k, v = (
        layer(x).view(BATCH, -1, HEADS, WIDTH // HEADS).transpose(1, 2)
        for layer, x in ((module.query, hidden), (module.key, seen), (module.value, seen))
    )
    options = {"token_score": token_score, "token_ratio": 0.5, "patch_ratio": 0.25}
    given = v if weigh_by_value else None
    wanted = smk.sync_topk_mask_qk(q, k, valid, v=given, **options)
    got = captured.sync_masks(valid, weigh_by_value=weigh_by_value, **options)
    for name, tensor in got._asdict().items():
        torch.testing.assert_close(tensor, getattr(wanted, name))


def test_the_last_forward_counts():
    module, hidden, seen = attention(), words(), image()
    with capture_attention([module]) as captured:
        run(module, hidden, seen)
        first = captured.map()
        run(module, hidden, image())
    assert not torch.equal(captured.map(), first)


def test_stop_leaves_the_rest_out():
    modules, after = [attention(), attention()], []
    hidden, seen = words(), image()
    with capture_attention(modules, stop=True) as captured:
        for module in modules:
            run(module, hidden, seen)
            after.append(module)
    assert after == modules[:1]
    assert captured.v[1].shape == (BATCH, HEADS, KEYS, WIDTH // HEADS)


def test_hooks_end_with_the_block():
    module = attention()
    parts = (module, module.query, module.key, module.value)
    with pytest.raises(ZeroDivisionError), capture_attention([module], stop=True):
        1 / 0  # noqa: B018
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in parts)


def test_refuses_what_it_cannot_capture():
    module, hidden, seen = attention(), words(), image()
    with pytest.raises(ValueError, match="at least one"), capture_attention([]):
        pass
    with (
        pytest.raises(TypeError, match="Linear has no query"),
        capture_attention([nn.Linear(2, 2)]),
    ):
        pass
    causal = torch.zeros(BATCH, 1, WORDS, WORDS)
    with capture_attention([module]), pytest.raises(ValueError, match="mask keys alone"):
        module(hidden, attention_mask=causal)
    with capture_attention([module]), pytest.raises(ValueError, match="past_key_value"):
        module(hidden, past_key_value=(seen, seen))
    with capture_attention([module]) as captured:
        pass
    with pytest.raises(RuntimeError, match=r"modules\[0\] has not been called"):
        captured.map()
    module.position_embedding_type = "relative_key_query"
    with pytest.raises(ValueError, match="relative positions"), capture_attention([module]):
        pass
    del module.num_attention_heads
    with pytest.raises(TypeError, match="num_attention_heads"), capture_attention([module]):
        pass
