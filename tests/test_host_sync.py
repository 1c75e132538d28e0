"""No operator asks the device for a value, or for a shape that depends on one.

On a GPU either would make the host wait, and no CUDA graph could be captured. What an operator
would do there is run on meta tensors, which have shapes and no values: PyTorch itself raises where
a value is asked for (`item`, `tolist`, `bool`, `nonzero`, `unique`, indexing by bool). `OnDevice`
raises for what PyTorch does silently: copies from the host, and indexing by bool in place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import syncmask_kernels as smk
from benchmarks.operators import OPERATORS, arguments
from syncmask_kernels import backends
from syncmask_kernels.backends import overloads, triton

if triton.INTERPRETED:
    pytest.skip("the interpreter reads every value", allow_module_level=True)

Call = Callable[[], Any]

FROM_HOST = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
CSRC = Path(__file__).parents[1] / "csrc"
WORDS = "[Mm]eta|copies|mask holds"
BY_INDEX = ("aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class WaitsForDeviceError(RuntimeError):
    """What was run would make the host wait."""


def tensors_in(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class FromHost(TorchFunctionMode):
    """Raises where a tensor on the device is made of numbers on the host."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in FROM_HOST and result.is_meta and not (args and result is args[0]):
            raise WaitsForDeviceError(f"{function.__name__} copies from the host")
        return result


class OnDevice(TorchDispatchMode):
    """Raises where the host would wait; runs what launches Triton kernels in the fakes' place."""

    def __init__(self) -> None:
        super().__init__()
        self.served: set[str] = set()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given, kwargs = tensors_in(args, kwargs), kwargs or {}
        name = operator.name()
        if name.startswith("syncmask::") and name.endswith(".triton"):
            return self.launched(name, args)
        result = operator(*args, **kwargs)
        everything = given + tensors_in(result)
        if any(tensor.is_meta for tensor in everything):
            copies = name.partition(".")[0] in ("aten::copy_", "aten::_to_copy")
            if copies and kwargs.get("non_blocking") and given[0].is_cpu:
                return result
            if any(x.is_cpu and (copies or x.dim() > 0) for x in everything):
                raise WaitsForDeviceError(f"{name} copies between host and device")
        # A single value needs no count.
        several = name.partition(".")[0] in BY_INDEX and args[2].numel() != 1
        if several and torch.bool in [index.dtype for index in tensors_in(args[1])]:
            raise WaitsForDeviceError(f"{name} counts what a mask holds")
        return result

    def launched(self, name: str, args: Any) -> Any:
        kernel = torch.library.get_kernel(name, "CUDA")
        with self:
            result = kernel.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args)
        op = name.removeprefix("syncmask::").removesuffix(".triton")
        self.served.add(op)
        faked = overloads.FAKES[op](*args)
        kinds = [[(x.shape, x.dtype) for x in tensors_in(r)] for r in (result, faked)]
        assert kinds[0] == kinds[1], f"{name} and its fake differ"
        return result


@contextmanager
def as_on_a_gpu(backend: str) -> Iterator[OnDevice]:
    """Meta tensors are served by `backend` as tensors on a GPU are."""
    launch = pytest.importorskip("triton").runtime.jit.JITFunction
    order = ("triton", "eager") if backend == "triton" else (backend,)
    with (
        mock.patch.dict(backends.AUTOMATIC, {"meta": order}),
        mock.patch.object(triton, "unavailable", return_value=None),
        mock.patch.object(launch, "run"),
        FromHost(),
        OnDevice() as device,
    ):
        yield device


def backward_of(answer: Any) -> None:
    """Gradients of all floating results."""
    recorded = [part for part in tensors_in(answer) if part.requires_grad]
    if recorded:
        torch.autograd.backward(recorded, [torch.ones_like(part) for part in recorded])


def floats(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", requires_grad=True)


def integers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def flags(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bool, device="meta")


def called(name: str) -> Call:
    given = arguments(OPERATORS[name], "meta")
    leaves = given[:1] if name == "masked_patch_loss" else given  # a target leaves it to autograd
    for leaf in leaves:
        leaf.requires_grad_(leaf.is_floating_point())
    return lambda: OPERATORS[name].call(*given)


def cross_entropy(**options: Any) -> Any:
    return smk.masked_linear_cross_entropy(
        floats(3, 8, 16), floats(50, 16), integers(3, 8), bias=floats(50), **options
    )


def contrast(**options: Any) -> Any:
    sides = [floats(3, 16) for _ in range(4)] + [floats(16, 40) for _ in range(2)]
    return smk.queue_contrastive_loss(*sides, floats(), **options)


def no_gradient(call: Call) -> Call:
    return torch.no_grad()(call)


def recorded_and_chained() -> None:
    sampler = smk.GroupedBatchSampler(9, 2, queue_size=6, item_ids=torch.arange(9) // 2)
    for indices in torch.arange(9).split(3):
        sampler.record(indices, floats(3, 16), floats(3, 16))
    assert len(sampler._grouped) == 1


# What the table of all operators leaves out: calls that go another way.
OPTIONS: dict[str, Call] = {
    "topk_mask, counts": lambda: smk.topk_mask(
        floats(3, 20), k=integers(3), width=5, valid=flags(3, 20), largest=False
    ),
    "sync_topk_mask, everything": lambda: smk.sync_topk_mask(
        [floats(3, 4, 8, 21), floats(3, 4, 8, 21)],
        flags(3, 8),
        lse=floats(2, 3, 4, 8),
        patch_score="cls",
        token_score="dual",
        patch_k=integers(3),
        patch_valid=flags(3, 20),
        word_ids=integers(3, 8),
        patch_noise=floats(3, 20),
    ),
    "mask_tokens, drawn": lambda: smk.mask_tokens(
        integers(3, 8),
        flags(3, 8),
        mask_id=4,
        vocab_size=50,
        special_ids=(1, 2),
        probs=(0.5, 0.5, 0.0),
    ),
    "masked_linear_cross_entropy, no ids": cross_entropy,
    "masked_linear_cross_entropy, capacity": lambda: cross_entropy(
        capacity=9, label_smoothing=0.1, ignore_index=0, reduction="none"
    ),
    "masked_linear_cross_entropy, soft labels": lambda: cross_entropy(
        soft_labels=floats(3, 8, 50), alpha=0.4, reduction="sum"
    ),
    "masked_linear_cross_entropy, teacher": lambda: cross_entropy(
        ids=integers(3, 4), teacher=(floats(3, 8, 16), floats(50, 16), None), alpha=floats()
    ),
    "masked_patch_loss, image": lambda: smk.masked_patch_loss(
        floats(3, 5, 48), floats(3, 3, 16, 16).detach(), integers(3, 5), patch_size=4, norm_pix=True
    ),
    "masked_patch_loss, cosine": lambda: smk.masked_patch_loss(
        floats(3, 16, 48), floats(3, 16, 48).detach(), flags(3, 16), kind="cosine", reduction="none"
    ),
    "queue_contrastive_loss, items": lambda: contrast(
        alpha=floats(), item_ids=integers(3), queue_ids=integers(40)
    ),
    "queue_contrastive_loss, no gradient": no_gradient(contrast),
    "enqueue_, ids": lambda: smk.enqueue_(
        floats(16, 40).detach(), integers(1), floats(50, 16), integers(50), integers(40)
    ),
    "sample_negatives, ids": lambda: smk.sample_negatives(
        floats(3, 9), positive=integers(3), row_ids=integers(3), col_ids=integers(9)
    ),
    "sample_negatives, semi-hard": lambda: smk.sample_negatives(
        floats(3, 3), exclude=flags(3, 3), mode="semi_hard", quantile=0.5
    ),
    "GroupedBatchSampler.record": recorded_and_chained,
}
NOT_BY_TRITON = (
    *("token_valid", "mask_tokens", "enqueue_", "grouped_order", "gather_negatives", "ema_update_"),
    "GroupedBatchSampler.record",
)
CALLS: dict[str, Call] = {name: called(name) for name in OPERATORS}


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("name", CALLS | OPTIONS)
def test_nothing_waits_for_the_device(name: str, backend: str) -> None:
    call = (CALLS | OPTIONS)[name]
    with as_on_a_gpu(backend) as device:
        # What moves parameters takes no part in autograd.
        with torch.set_grad_enabled(not name.startswith(("ema_update_", "enqueue_"))):
            answer = call()
        backward_of(answer)
    if backend == "triton" and name.partition(",")[0] not in NOT_BY_TRITON:
        assert device.served


def test_cuda_sources_never_wait() -> None:
    sources = [path for path in CSRC.rglob("*") if path.suffix in (".cu", ".cuh")]
    assert sources
    for path in sources:
        assert not re.search(r"Synchronize|cudaMemcpy|cudaMalloc|cudaFree", path.read_text()), path


class ReadsGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * float(grad.amax())


WAITING: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "int": lambda x: int(x[0, 0]),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "equal": lambda x: torch.equal(x, x),
    "cpu": lambda x: x.detach().cpu(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "unique": lambda x: x.unique(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "read by bool": lambda x: x[x > 0],
    "write by bool": lambda x: x.index_put((x > 0,), x.flatten()[:3]),
    "repeat": lambda x: x.repeat_interleave((x[:, 0] > 0).long(), dim=0),
    "tensor of numbers": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "as_tensor of numbers": lambda x: torch.as_tensor([1.0, 2.0], device=x.device),
    "new_tensor of numbers": lambda x: x.new_tensor([1.0, 2.0]),
    "to the device": lambda x: torch.arange(3).to(x.device),
    "copied from the host": lambda x: x.detach().copy_(torch.ones(4, 5)),
    "index from the host": lambda x: x[torch.arange(3)],
    "in backward": ReadsGradient.apply,
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_found(name: str) -> None:
    with as_on_a_gpu("eager"), pytest.raises(RuntimeError, match=WORDS):
        backward_of(WAITING[name](floats(4, 5)))


def test_what_a_launcher_reads_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from syncmask_kernels.backends.triton import attention

    launches = attention.average_launches
    monkeypatch.setattr(
        attention, "average_launches", lambda attn, skip: launches(attn, int(attn.amax()))
    )
    with as_on_a_gpu("triton"), pytest.raises(RuntimeError, match=WORDS):
        smk.head_average(floats(1, 1, 4, 5))
