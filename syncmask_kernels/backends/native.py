"""The native libraries of `syncmask_kernels/lib`: load one, or tell why it is out."""

from __future__ import annotations

import json
from pathlib import Path

import torch

LIB = Path(__file__).parent.parent / "lib"


def load(name: str) -> tuple[str | None, str]:
    """Load ``libsyncmask_<name>.so``: the reason why it cannot be (or None), and its state."""
    record = LIB / "build.json"
    if not record.exists():
        reason = (
            "it was not built in this source folder, which is imported in place of an installed "
            "package: leave the folder, or build in place with `pip install -e .`"
        )
        return reason, f"out: {reason}"
    built = json.loads(record.read_text()).get(name, {"built": False, "detail": "unknown"})
    if not built["built"]:
        return f"it was not built: {built['detail']}", f"not built: {built['detail']}"
    try:
        torch.ops.load_library(LIB / f"libsyncmask_{name}.so")
    except OSError as error:
        detail = error.__cause__ or error
        return f"it does not load: {detail}", f"built, but does not load: {detail}"
    return None, f"ready ({built['detail']})"
