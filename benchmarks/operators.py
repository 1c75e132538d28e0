"""A call of every operator of the library, and whether a backend answers it as eager does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import syncmask_kernels as smk
from benchmarks.inputs import words_of
from benchmarks.measure import tensors_of
from tests.accuracy import assert_as_accurate

Arguments = tuple[Any, ...]
BATCH, HEADS, WORDS, PATCHES, DIM, VOCABULARY, COLUMNS = 5, 6, 23, 197, 40, 61, 67


class Operator(NamedTuple):
    """`call` of the arguments that `make` draws on the CPU.

    What is selected by scores that the operator computes itself is judged by `selected(answer,
    *arguments)`, the selection for the scores of the answer.
    """

    call: Callable[..., Any]
    make: Callable[[torch.Generator], Arguments]
    selected: Callable[..., Any] | None = None


def _drawn(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(shape, generator=generator)


def _words(generator: torch.Generator) -> Tensor:
    return words_of(generator, BATCH, WORDS, 4)


def _attention(generator: torch.Generator) -> Tensor:
    return torch.randn(BATCH, HEADS, WORDS, 1 + PATCHES, generator=generator).softmax(dim=-1)


def _token_ids(generator: torch.Generator) -> Tensor:
    return torch.randint(4, VOCABULARY, (BATCH, WORDS), generator=generator)


def _ids(count: int, positions: int) -> Callable[[torch.Generator], Tensor]:
    """[B, count] different positions."""
    return lambda generator: torch.rand(BATCH, positions, generator=generator).argsort()[:, :count]


def _items(generator: torch.Generator) -> Tensor:
    return torch.randint(20, (64,), generator=generator)


def _seed(generator: torch.Generator) -> Tensor:
    return torch.randint(2**32, (2,), generator=generator)


def _all(*makers: Callable[[torch.Generator], Tensor]) -> Callable[[torch.Generator], Arguments]:
    return lambda generator: tuple(make(generator) for make in makers)


def _mask(share: float, *shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.rand(shape, generator=generator) < share


def _for_scores_of(answer: smk.SyncMask, valid: Tensor) -> smk.SyncMask:
    """What eager selects for the scores of the answer; no attention is looked at."""
    unread = answer.patch_scores.new_zeros(BATCH, 1, WORDS, 1 + PATCHES)
    return smk.sync_topk_mask(
        unread, valid, patch_scores=answer.patch_scores, token_scores=answer.token_scores
    )


def _moved(teacher: Tensor, student: Tensor) -> Tensor:
    teacher = teacher.clone()
    smk.ema_update_([teacher], [student], momentum=0.9)
    return teacher


def _pointer(generator: torch.Generator) -> Tensor:
    return torch.randint(COLUMNS, (1,), generator=generator)


def _enqueued(queue: Tensor, pointer: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    queue, pointer = queue.clone(), pointer.clone()
    smk.enqueue_(queue, pointer, keys)
    return queue, pointer


_qk = (_drawn(BATCH, HEADS, WORDS, DIM), _drawn(BATCH, HEADS, 1 + PATCHES, DIM))
_qkv = (*_qk, _drawn(BATCH, HEADS, 1 + PATCHES, DIM))
_scores = _drawn(BATCH, PATCHES)

OPERATORS = {
    "head_average": Operator(smk.head_average, _all(_attention)),
    "attention_map": Operator(smk.attention_map, _all(*_qk)),
    "attention_with_map": Operator(smk.attention_with_map, _all(*_qkv)),
    "topk_mask": Operator(lambda scores: smk.topk_mask(scores, ratio=0.5), _all(_scores)),
    "complement": Operator(
        lambda scores: smk.complement(smk.topk_mask(scores, k=50)), _all(_scores)
    ),
    "attentive_mask": Operator(
        lambda scores: smk.attentive_mask(scores, high_ratio=0.5, low_ratio=0.2), _all(_scores)
    ),
    "vote_keywords": Operator(
        lambda attn_row, valid: smk.vote_keywords(attn_row, votes=4, keep=5, valid=valid),
        _all(_drawn(BATCH, HEADS, WORDS), _words),
    ),
    "sync_topk_mask": Operator(
        smk.sync_topk_mask,
        _all(_attention, _words),
        lambda answer, attn, valid: _for_scores_of(answer, valid),
    ),
    "sync_topk_mask_qk": Operator(
        lambda q, k, v, valid: smk.sync_topk_mask_qk(q, k, valid, v=v, token_score="dual"),
        _all(*_qkv, _words),
        lambda answer, q, k, v, valid: _for_scores_of(answer, valid),
    ),
    "max_similarity": Operator(
        smk.max_similarity, _all(_drawn(BATCH, PATCHES, DIM), _drawn(BATCH, WORDS, DIM), _words)
    ),
    "token_valid": Operator(lambda ids: smk.token_valid(ids, special_ids=[4]), _all(_token_ids)),
    "mask_tokens": Operator(
        lambda ids, mask, seed: smk.mask_tokens(
            ids, mask, mask_id=3, vocab_size=VOCABULARY, special_ids=[0, 1, 2], seed=seed
        ),
        _all(_token_ids, _mask(0.3, BATCH, WORDS), _seed),
    ),
    "mask_patches": Operator(
        smk.mask_patches,
        _all(_drawn(BATCH, PATCHES, DIM), _mask(0.5, BATCH, PATCHES), _drawn(DIM)),
    ),
    "gather_masked": Operator(
        smk.gather_masked, _all(_drawn(BATCH, PATCHES, DIM), _ids(50, PATCHES))
    ),
    "scatter_masked": Operator(
        lambda x, ids: smk.scatter_masked(x, ids, PATCHES),
        _all(_drawn(BATCH, 50, DIM), _ids(50, PATCHES)),
    ),
    "masked_linear_cross_entropy": Operator(
        lambda hidden, weight, labels, ids: smk.masked_linear_cross_entropy(
            hidden, weight, labels, ids=ids
        ),
        _all(_drawn(BATCH, WORDS, DIM), _drawn(VOCABULARY, DIM), _token_ids, _ids(7, WORDS)),
    ),
    "masked_patch_loss": Operator(
        lambda pred, target, mask: smk.masked_patch_loss(pred, target, mask, norm_pix=True),
        _all(_drawn(BATCH, PATCHES, DIM), _drawn(BATCH, PATCHES, DIM), _mask(0.5, BATCH, PATCHES)),
    ),
    "queue_contrastive_loss": Operator(
        partial(smk.queue_contrastive_loss, temperature=0.07, alpha=0.4),
        _all(*[_drawn(BATCH, DIM)] * 4, *[_drawn(DIM, COLUMNS)] * 2),
    ),
    "enqueue_": Operator(
        _enqueued,
        _all(_drawn(DIM, COLUMNS), _pointer, _drawn(BATCH, DIM)),
    ),
    "sample_negatives": Operator(
        lambda sim, seed: smk.sample_negatives(sim, seed=seed), _all(_drawn(64, 64), _seed)
    ),
    "grouped_order": Operator(
        lambda image, text, ids: smk.grouped_order(image, text, ids, window=5),
        _all(_drawn(64, DIM), _drawn(64, DIM), _items),
    ),
    "gather_negatives": Operator(
        smk.gather_negatives,
        _all(
            _drawn(BATCH, WORDS, DIM),
            lambda generator: torch.randint(BATCH, (BATCH,), generator=generator),
        ),
    ),
    "ema_update_": Operator(_moved, _all(_drawn(WORDS, DIM), _drawn(WORDS, DIM))),
}


def arguments(
    operator: Operator, device: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Arguments:
    drawn = operator.make(torch.Generator().manual_seed(seed))
    return tuple(
        part.to(device, dtype if part.is_floating_point() else part.dtype) for part in drawn
    )


def assert_agrees(operator: Operator, backend: str, device: str, dtype: torch.dtype) -> None:
    """Numbers are as accurate as eager's of the same type, everything else is equal bit by bit.

    Raises:
        BackendError: the backend does not serve this operator.
    """
    given = arguments(operator, device, dtype)
    with smk.use_backend(backend):
        answer = operator.call(*given)
    with smk.use_backend("eager"):
        plain = operator.call(*given)
        selected = plain if operator.selected is None else operator.selected(answer, *given)
        truth = operator.call(*(x.double() if x.is_floating_point() else x for x in given))
    parts = [list(tensors_of(of)) for of in (answer, plain, selected, truth)]
    for got, own, chosen, true in zip(*parts, strict=True):
        if got.is_floating_point():
            assert_as_accurate(got, own, true)
        else:
            assert torch.equal(got, chosen), "integers or masks differ"
