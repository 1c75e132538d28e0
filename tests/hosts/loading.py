"""Importing a host's code as it is, from a clone that an environment variable names."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from torch import nn


class PatchEmbed(nn.Module):
    """Stands in for timm's, which needs torchvision."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x: Any) -> Any:
        return self.proj(x).flatten(2).transpose(1, 2)


def _module(name: str, **attributes: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(attributes)
    return made


def _timm() -> dict[str, ModuleType]:
    models = "timm.models"
    named: dict[str, dict[str, Any]] = {
        "timm": {},
        models: {},
        f"{models}.vision_transformer": {"PatchEmbed": PatchEmbed, "_cfg": SimpleNamespace},
        f"{models}.registry": {"register_model": lambda function: function},
        f"{models}.layers": {"trunc_normal_": nn.init.trunc_normal_, "DropPath": nn.Dropout},
    }
    return {name: _module(name, **attributes) for name, attributes in named.items()}


@contextmanager
def _old_transformers() -> Iterator[None]:
    """The names that hosts of 2021 import, which a later transformers 4 has in other places."""
    names = ("file_utils", "modeling_utils", "pytorch_utils")
    file_utils, modeling_utils, pytorch_utils = (
        importlib.import_module(f"transformers.{name}") for name in names
    )

    decorate = file_utils.add_code_sample_docstrings

    def add_code_sample_docstrings(*args: Any, tokenizer_class: Any = None, **kwargs: Any) -> Any:
        return decorate(*args, **kwargs)

    moved = (
        "apply_chunking_to_forward",
        "find_pruneable_heads_and_indices",
        "prune_linear_layer",
    )
    with ExitStack() as stack:
        for name in moved:
            value = getattr(pytorch_utils, name)
            stack.enter_context(mock.patch.object(modeling_utils, name, value, create=True))
        name = "add_code_sample_docstrings"
        stack.enter_context(mock.patch.object(file_utils, name, add_code_sample_docstrings))
        yield


def folder_of(variable: str, url: str) -> Path:
    """The clone that the environment variable names; skips the test where there is none."""
    if variable not in os.environ:
        pytest.skip(f"{variable} does not name a clone of {url}")
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) >= 5:
        pytest.skip(f"{url} needs transformers<5, found {transformers.__version__}")
    return Path(os.environ[variable])


def load(folder: Path, name: str, package: str = "models") -> ModuleType:
    """A module of a host, whose `package` does not stay in the way of another host's."""
    assert package not in sys.modules, f"{package} is imported already"
    timm = _timm() if importlib.util.find_spec("timm") is None else {}
    sys.path.insert(0, str(folder))
    sys.modules.update(timm)
    try:
        with _old_transformers():
            return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        for known in list(sys.modules):
            if known in timm or known.split(".")[0] == package:
                del sys.modules[known]
