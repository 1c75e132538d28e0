"""Which backend serves which operator, and why.

Every backend is a package with a table `KERNELS` (operator -> `Kernel`) and a function
`unavailable(device_type)` that gives the reason why it cannot run there, or None. The first backend
of `AUTOMATIC[device type]` that can serve a call does. `use_backend` or the environment variable
`SYNCMASK_BACKEND` name one instead, and a named backend that cannot run is an error, never a silent
fallback.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncmask_kernels._version import __version__
from syncmask_kernels.backends import cpu, cuda, eager, triton
from syncmask_kernels.backends.kernel import Kernel

BACKENDS: dict[str, Any] = {"cuda": cuda, "triton": triton, "cpu": cpu, "eager": eager}
AUTOMATIC = {"cuda": ("cuda", "triton", "eager"), "cpu": ("cpu", "eager")}


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve the call."""


def _known(backend: str | None) -> str | None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


_forced = _known(os.environ.get("SYNCMASK_BACKEND") or None)


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Serve every operator by one backend inside the `with` block, in the whole process.

    Args:
        backend: ``"eager"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: the name is unknown.
        BackendError: from an operator that this backend cannot serve, with the reason.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> with smk.use_backend("eager"):
        ...     smk.head_average(torch.full((1, 2, 1, 3), 1 / 3)).shape
        torch.Size([1, 1, 2])
    """
    global _forced
    before, _forced = _forced, _known(backend)
    try:
        yield
    finally:
        _forced = before


def refusal(backend: str, op: str, device_type: str, call: tuple[Any, ...] = ()) -> str | None:
    """Why `backend` cannot serve `op` there (for `call`, where one is given), or None."""
    module = BACKENDS[backend]
    reason: str | None = module.unavailable(device_type)
    if reason is not None:
        return reason
    kernel: Kernel | None = module.KERNELS.get(op)
    if kernel is None:
        return f"it has no kernel for {op}"
    return kernel.refuses(*call) if call and kernel.refuses is not None else None


def _serving(op: str, device_type: str) -> tuple[Kernel, ...]:
    """The kernels that can run there, in the order of choice."""
    order = AUTOMATIC.get(device_type, ("eager",))
    return tuple(BACKENDS[b].KERNELS[op] for b in order if refusal(b, op, device_type) is None)


# Small calls notice the search. torch.compile must not see the table change.
_SERVING = {(op, device): _serving(op, device) for op in eager.KERNELS for device in AUTOMATIC}


def choose(op: str, tensor: Tensor, *call: Any) -> Callable[..., Any]:
    """The function that serves `op` for a tensor on this device.

    `call` is handed to the kernel's own test of what it can do (types, options).
    """
    device_type = "cpu" if tensor.is_cpu else tensor.device.type  # the former makes no objects
    if _forced is not None:
        reason = refusal(_forced, op, device_type, call)
        if reason is not None:
            raise BackendError(f"backend {_forced!r} cannot serve {op}: {reason}")
        return BACKENDS[_forced].KERNELS[op].run
    for run, refuses in _SERVING.get((op, device_type)) or _serving(op, device_type):
        if refuses is None or refuses(*call) is None:
            return run
    raise BackendError(f"no backend serves {op} on {tensor.device}")


class BuildInfo(NamedTuple):
    """What `build_info` tells; printed, it is the text of ``python -m syncmask_kernels``."""

    version: str
    torch: str
    forced: str | None
    backends: dict[str, str]
    operators: dict[str, dict[str, str]]

    def __str__(self) -> str:
        width = max(map(len, self.operators))
        lines = [f"syncmask_kernels {self.version}, torch {self.torch}", "", "Backends"]
        lines += [f"  {name:<{width}}  {state}" for name, state in self.backends.items()]
        devices = sorted({d for served in self.operators.values() for d in served})
        lines += ["", "Operators" + " " * (width - 5) + "".join(f"{d:<10}" for d in devices)]
        lines += [
            f"  {op:<{width}}  " + "".join(f"{served[d]:<10}" for d in devices).rstrip()
            for op, served in self.operators.items()
        ]
        choice = f"forced to {self.forced!r}" if self.forced else "automatic"
        return "\n".join([*lines, "", f"Choice of backend: {choice}"])


def build_info() -> BuildInfo:
    """What is built, what serves each operator on each kind of device, and why nothing faster.

    Returns:
        BuildInfo: ``version`` and ``torch`` (versions), ``forced`` (the backend in force or None),
        ``backends`` (name -> its state or the reason why it is out) and ``operators``
        (operator -> device type -> the backend that serves it by automatic choice).

    Example:
        >>> import syncmask_kernels as smk
        >>> smk.build_info().operators["ema_update_"]["cpu"]
        'eager'
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    operators = {
        op: {
            device: next(b for b in AUTOMATIC[device] if refusal(b, op, device) is None)
            for device in devices
        }
        for op in eager.KERNELS
    }
    return BuildInfo(
        __version__,
        torch.__version__,
        _forced,
        {name: module.state() for name, module in BACKENDS.items()},
        operators,
    )
