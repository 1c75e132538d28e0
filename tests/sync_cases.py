"""Calls of sync_topk_mask, and how their answers are judged; for the backends of GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import syncmask_kernels as smk
from reference.ops import selection as oracle
from tests.accuracy import assert_as_accurate


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def case(
    batch: int = 2,
    heads: int = 3,
    words: int = 7,
    patches: int = 49,
    layers: int = 1,
    dtype: torch.dtype = torch.float32,
    skip_keys: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of sync_topk_mask."""
    shape = (layers, batch, heads, words, patches + skip_keys)
    attn = torch.randn(shape, generator=seeded()).mul(2).softmax(dim=-1).to(dtype)
    valid = torch.rand(batch, words, generator=seeded()) < 0.7
    return {"attn": attn, "token_valid": valid, "skip_keys": skip_keys, **options}


def everything(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same with every optional tensor."""
    layers, batch, heads, words, keys = arguments["attn"].shape
    patches = keys - arguments["skip_keys"]
    return arguments | {
        "lse": torch.randn(layers, batch, heads, words, generator=seeded(1)) * 4,
        "patch_valid": torch.rand(batch, patches, generator=seeded(2)) < 0.7,
        "word_ids": torch.randint(-1, max(words // 2, 1), (batch, words), generator=seeded(3)),
        "patch_noise": torch.randn(batch, patches, generator=seeded(4)) * 0.02,
        "token_noise": torch.randn(batch, words, generator=seeded(5)).double() * 0.2,
    }


def true_scores(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The scores of both sides in float64."""
    layers, lse = list(arguments["attn"].double()), arguments.get("lse")
    valid = arguments["token_valid"]
    known = {"patch_valid": arguments.get("patch_valid"), "skip_keys": arguments["skip_keys"]}
    rules = arguments.get("patch_score", "mean"), arguments.get("token_score", "max")
    log_sums = None if lse is None else list(lse.double())
    return (
        oracle.patch_scores(
            layers, valid, rules[0], cls_index=arguments.get("cls_index", 0), **known
        ),
        oracle.token_scores(layers, valid, rules[1], lse=log_sums, **known),
    )


def assert_selects(got: smk.SyncMask, arguments: dict[str, Any]) -> None:
    """The selection is exactly that of the scores returned, plus the noise."""
    for side, default in (("patch", 0.5), ("token", 0.15)):
        scores, mask = getattr(got, f"{side}_scores"), getattr(got, f"{side}_mask")
        scores = scores + arguments.get(f"{side}_noise", torch.zeros(())).float()
        k = arguments.get(f"{side}_k")
        count = {"k": k.tolist() if isinstance(k, Tensor) else k}
        count["ratio"] = arguments.get(f"{side}_ratio", default) if k is None else None
        valid = arguments.get(f"{side}_valid")
        if side == "token" and "word_ids" in arguments:
            wanted = oracle.word_mask(scores, arguments["word_ids"], valid=valid, **count)
        else:
            wanted = oracle.topk_mask(scores, valid=valid, **count)
        assert torch.equal(mask, wanted)
        ids = getattr(got, f"{side}_ids")
        assert torch.equal(ids, oracle.ids_of(wanted, ids.shape[1]))


def assert_right(got: smk.SyncMask, arguments: dict[str, Any]) -> None:
    """Scores as accurate as those of eager, and the selection exact."""
    with smk.use_backend("eager"):
        plain = smk.sync_topk_mask(**arguments)
    for ours, theirs, truth in zip(got[4:], plain[4:], true_scores(arguments), strict=True):
        assert_as_accurate(ours, theirs, truth)
    assert_selects(got, arguments)
