"""PEP 517/660 hooks: setuptools', plus torch as a build requirement only where none is found.

Listing torch in `build-system.requires` would make every isolated build download another one.
The libraries keep to LibTorch's stable ABI, so any torch with the headers will do, above all the
one that is installed already.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import setuptools
from native import MINIMUM_TORCH, Unbuildable, find_compiler, find_torch
from setuptools import build_meta

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"building syncmask_kernels needs setuptools >= 77, found {setuptools.__version__}: "
        "pip install --upgrade setuptools, or build without --no-build-isolation"
    )


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """No compiler: torch would serve for nothing. A torch named in the environment: it must do."""
    try:
        find_compiler()
    except Unbuildable:
        return []
    try:
        find_torch()
    except Unbuildable:
        return [] if os.environ.get("SYNCMASK_TORCH_DIR") else [f"torch>={MINIMUM_TORCH}"]
    return []


get_requires_for_build_editable = get_requires_for_build_wheel
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist


def _outside_source_tree(hook: Callable[..., str]) -> Callable[..., str]:
    """Keep setuptools' intermediate files out of the source tree.

    The tree may be read-only, and an old `build/` would leak removed files into a new wheel.
    """

    @functools.wraps(hook)
    def run(*args: Any, **kwargs: Any) -> str:
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder, "setup.cfg")
            config.write_text(
                f"[build]\nbuild_base = {folder}/build\n[egg_info]\negg_base = {folder}\n"
            )
            os.environ["DIST_EXTRA_CONFIG"] = str(config)
            return hook(*args, **kwargs)

    return run


build_sdist = _outside_source_tree(build_meta.build_sdist)
build_wheel = _outside_source_tree(build_meta.build_wheel)
build_editable = _outside_source_tree(build_meta.build_editable)
prepare_metadata_for_build_wheel = _outside_source_tree(build_meta.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _outside_source_tree(
    build_meta.prepare_metadata_for_build_editable
)
