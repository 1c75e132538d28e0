"""What every operator of the rooms attention and selection keeps, under every backend.

- one full graph for all sizes under torch.compile, forward and backward;
- gradients that are those of finite differences in float64, whether autograd records the operator
  or the library has its own backward;
- overloads that torch.library.opcheck finds nothing to say against.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import isfunction
from typing import Any

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from syncmask_kernels.backends import cpu, overloads
from tests.attention_cases import some_keys
from tests.compiling import assert_compiles_once
from tests.selection_cases import positions
from tests.serving import backend_without_autograd

Size = tuple[int, int, int]  # batch, words, keys


def random(*shape: int) -> Tensor:
    """Without the ties that a gradient by finite differences cannot cross."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def attention(size: Size) -> tuple[Tensor, ...]:
    return random(size[0], 3, *size[1:]).softmax(dim=-1), positions(size[0], size[1])


def queries(size: Size) -> tuple[Tensor, ...]:
    """q, k, v and the keys and words that count."""
    batch, words, keys = size
    q, k, v = random(batch, 3, words, 4), random(batch, 3, keys, 4), random(batch, 3, keys, 6)
    return q, k, v, some_keys(batch, keys), positions(batch, words)


def patches(size: Size) -> tuple[Tensor, ...]:
    batch, words, keys = size
    return random(batch, keys, 4), random(batch, words, 4), positions(batch, words)


def scores(size: Size) -> tuple[Tensor, ...]:
    return random(*size[::2]), positions(*size[::2]), torch.arange(size[0])


def topk_mask(scores: Tensor, valid: Tensor, ks: Tensor) -> tuple[Tensor, ...]:
    share = smk.topk_mask(scores, ratio=0.3, valid=valid, largest=False)
    return *share, *smk.topk_mask(scores, k=ks, width=4)


def complement(scores: Tensor, valid: Tensor, ks: Tensor) -> tuple[Tensor, ...]:
    return smk.complement(smk.topk_mask(scores, k=3, valid=valid), valid=valid)


def attentive_mask(scores: Tensor, valid: Tensor, ks: Tensor) -> tuple[Tensor, ...]:
    chosen = smk.attentive_mask(scores, high_ratio=0.5, low_ratio=0.2, valid=valid)
    return *chosen.high, *chosen.low


def sync_topk_mask(attn: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
    return smk.sync_topk_mask(attn, valid, lse=attn.sum(dim=-1), token_score="dual")


def sync_topk_mask_qk(
    q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor, valid: Tensor
) -> tuple[Tensor, ...]:
    return smk.sync_topk_mask_qk(
        q, k, valid, v=v, key_valid=key_valid, token_score="dual", token_k=2
    )


class Operator:
    """A call of an operator, and its arguments for a size."""

    def __init__(self, call: Callable[..., Any], make: Callable[[Size], tuple[Tensor, ...]]):
        self.call, self.make = call, make

    def arguments(self, size: Size, dtype: torch.dtype, grad: bool) -> tuple[Tensor, ...]:
        made = (x.to(dtype) if x.is_floating_point() else x for x in self.make(size))
        return tuple(x.requires_grad_(grad and x.is_floating_point()) for x in made)


DIFFERENTIABLE = {
    "head_average": Operator(lambda attn, _: smk.head_average([attn, attn.square()]), attention),
    "attention_map": Operator(
        lambda q, k, v, valid, _: smk.attention_map([q, q.sin()], [k, k.cos()], key_valid=valid),
        queries,
    ),
    "attention_with_map": Operator(
        lambda q, k, v, valid, _: smk.attention_with_map(q, k, v, key_valid=valid), queries
    ),
    "max_similarity": Operator(smk.max_similarity, patches),
    "topk_mask": Operator(topk_mask, scores),
    "attentive_mask": Operator(attentive_mask, scores),
    "sync_topk_mask": Operator(sync_topk_mask, attention),
    "sync_topk_mask_qk": Operator(sync_topk_mask_qk, queries),
}
SELECTING = {
    "complement": Operator(complement, scores),
    "vote_keywords": Operator(
        lambda attn, valid: smk.vote_keywords(
            attn[..., 0], votes=2, keep=valid.shape[1] // 2, valid=valid
        ),
        attention,
    ),
}
OPERATORS = DIFFERENTIABLE | SELECTING


def test_the_tables_name_every_operator() -> None:
    rooms = ("syncmask_kernels.attention", "syncmask_kernels.selection")
    functions = {name: getattr(smk, name) for name in smk.__all__}
    assert set(OPERATORS) == {
        name
        for name, function in functions.items()
        if isfunction(function) and function.__module__.startswith(rooms)
    }
    assert set(OVERLOADS) == {*overloads.attention.SCHEMAS, *overloads.selection.SCHEMAS}


@pytest.mark.parametrize("name", OPERATORS)
def test_compiles(backend: str, name: str) -> None:
    """In one graph; of a kernel also what AOTAutograd makes of its fake and its backward."""
    operator = OPERATORS[name]
    has_kernel = backend != "eager" and name in (*OVERLOADS, "sync_topk_mask_qk")
    # Gradients of the scores from queries and keys are recorded by eager, not by the kernel.
    grad = name in DIFFERENTIABLE and not (has_kernel and name == "sync_topk_mask_qk")
    sizes = [(2, 7, 9), (3, 9, 12), (4, 12, 20)]  # no special cases among them
    calls = [operator.arguments(size, torch.float32, grad) for size in sizes]
    through = "aot_eager" if has_kernel else "eager"
    assert_compiles_once(operator.call, calls, through, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recorded", [True, False], ids=["autograd", "own backward"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name: str, recorded: bool) -> None:
    operator = DIFFERENTIABLE[name]
    arguments = operator.arguments((2, 3, 5), torch.float64, grad=True)

    def floats(*arguments: Tensor) -> tuple[Tensor, ...]:
        """Without what no score is: the -inf beside ids of -1."""
        result = operator.call(*arguments)
        parts = (result,) if isinstance(result, Tensor) else result
        return tuple(p.masked_fill(p.isinf(), 0.0) for p in parts if p.is_floating_point())

    with smk.use_backend("eager") if recorded else backend_without_autograd():
        assert torch.autograd.gradcheck(floats, arguments, fast_mode=True)


def maps() -> list[tuple[Any, ...]]:
    q, k, v, valid, _ = queries((3, 5, 9))
    return [(q, k, v, valid, 0.5, 1), (q.mT.contiguous().mT, k, v.bfloat16().float(), None, 1.0, 0)]


def topk_arguments() -> list[tuple[Any, ...]]:
    one = torch.ones(3, dtype=torch.int64)
    return [
        call
        for x in (torch.randn(3, 9), torch.randn(9, 3).t().bfloat16(), torch.randn(3, 0))
        for call in [(x, x > 0, None, 1, 3, 4, True), (x, None, one, 0, 0, 2, False)]
    ]


def sync_arguments() -> list[tuple[Any, ...]]:
    attn, valid = attention((3, 5, 9))
    views = attn[None].transpose(1, 3).contiguous().transpose(1, 3)
    ks, words = torch.tensor([1, 2, 3]), torch.randint(-1, 3, (3, 5))
    patch = positions(3, 8)
    counts = (None, 1, 2, 4, ks, 0, 0, 5)
    own = (torch.randn(3, 8), torch.randn(3, 5), torch.randn(3, 8), torch.randn(3, 5), words)
    return [
        (views, attn[None].sum(dim=-1), valid, patch, -1, 2, 1, *counts, *(None,) * 5),
        (attn[None].half(), None, None, None, 0, 1, 1, *counts, *own),
    ]


def scores_qk_arguments() -> list[tuple[Any, ...]]:
    q, k, _, key_valid, valid = queries((3, 5, 9))
    distance, patch = torch.rand(1, 3, 3, 9), positions(3, 8)
    return [
        (q[None], k[None], distance, key_valid, valid, patch, 0.5, -1, 2, 1),
        (q[None].half(), k[None].half(), None, None, None, None, 0.5, 1, 1, 1),
    ]


def max_similarity_arguments() -> list[tuple[Any, ...]]:
    left, right, valid = patches((3, 5, 9))
    return [
        (left, right, valid),
        (left.bfloat16(), right.bfloat16(), None),
        (left, right[:, :0], None),
    ]


OVERLOADS: dict[str, Callable[[], list[tuple[Any, ...]]]] = {
    "head_average": lambda: [
        (random(2, 3, 4, 5, 9), 1),
        (random(2, 3, 4, 5, 9).half().transpose(3, 4), 0),
    ],
    "attention_map": lambda: [(*(x[None] for x in (q, k)), *rest) for q, k, _, *rest in maps()],
    "attention_with_map": maps,
    "topk_mask": topk_arguments,
    "sync_topk_mask": sync_arguments,
    "sync_scores_qk": scores_qk_arguments,
    "max_similarity": max_similarity_arguments,
}


@pytest.mark.parametrize("name", OVERLOADS)
def test_opcheck(name: str) -> None:
    if name not in cpu.KERNELS:
        pytest.skip("the CPU library is not built")
    for arguments in OVERLOADS[name]():
        torch.library.opcheck(getattr(torch.ops.syncmask, name).cpu, arguments)
