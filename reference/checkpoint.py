"""Checkpoints: folders of safetensors and JSON that are either complete or not there.

``<run>/checkpoints/step-00000800/`` holds the model, its teacher, the optimiser's moments, the
step, the configuration and the tokenizer. There is no generator state: all randomness of a step is
a function of the seed and the step. There is no learning rate or weight decay: they are options.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerFast

from reference import ranks
from reference.config import PretrainConfig
from reference.data import ShardStream
from reference.methods import METHODS
from reference.model import DualEncoder
from reference.run_files import atomic_path, load_json, save_json
from syncmask_kernels import GroupedBatchSampler


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the ones before it are untouched."""


@dataclass
class TrainState:
    """What training changes, and what a checkpoint keeps."""

    model: DualEncoder
    teacher: DualEncoder
    objective: nn.Module
    optimizer: Optimizer
    schedule: LambdaLR
    sampler: GroupedBatchSampler | ShardStream | None = None
    step: int = 0
    seconds: float = 0.0
    _batches: Iterator[list[int]] | None = None

    def next_rows(self) -> list[int]:
        """The pairs of the next grouped batch of this process, in one epoch after the other."""
        assert isinstance(self.sampler, GroupedBatchSampler)
        if self._batches is None:
            self._batches = chain.from_iterable(repeat(self.sampler))
        return next(self._batches)


def checkpoints(run_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((Path(run_dir) / "checkpoints").glob("step-*"))


def save_checkpoint(
    run_dir: str | Path,
    state: TrainState,
    config: PretrainConfig,
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """Write a checkpoint and delete all but the newest `config.keep_checkpoints`.

    The folder gets its name when all its files are on the disk; older ones go after that.

    All ranks call it, and the first one writes.

    Raises:
        CheckpointError: the disk is full or refuses; the older checkpoints are still there.
    """
    samplers = None
    if state.sampler is not None:
        samplers = ranks.gathered(_features_to("cpu", state.sampler.state_dict()))
    folder = Path(run_dir) / "checkpoints" / f"step-{state.step:08d}"
    if ranks.rank() > 0:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(".*.tmp"):
        shutil.rmtree(leftover)
    try:
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            _write(temporary, state, config, tokenizer, samplers)
    except Exception as error:  # safetensors, tokenizers and torch raise each their own
        kept = checkpoints(run_dir)
        last = f"the last complete one is {kept[-1]}" if kept else "there is none before it"
        raise CheckpointError(f"cannot write checkpoint {folder}: {error}; {last}") from error
    for old in checkpoints(run_dir)[: -config.keep_checkpoints]:
        shutil.rmtree(old)
    return folder


def _write(
    folder: Path,
    state: TrainState,
    config: PretrainConfig,
    tokenizer: PreTrainedTokenizerFast,
    samplers: list[dict[str, Any]] | None,
) -> None:
    moments = {
        f"{parameter}.{name}": value
        for parameter, values in state.optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    tensors = {
        "model": state.model.state_dict(),
        "teacher": state.teacher.state_dict(),
        "optimizer": moments,
    }
    for name, values in tensors.items():
        save_file(values, folder / f"{name}.safetensors")
    tokenizer.save_pretrained(folder / "tokenizer")
    save_json(folder / "config.json", asdict(config))
    save_json(folder / "state.json", {"step": state.step, "seconds": state.seconds})
    if samplers is not None:
        torch.save(samplers, folder / "samplers.pt")


def load_checkpoint(folder: str | Path, state: TrainState) -> None:
    """Put what `save_checkpoint` wrote into `state`, in place.

    Where the run had shuffled batches until here, grouped ones begin with what comes.
    """
    folder = Path(folder)
    progress = load_json(folder / "state.json")
    state.model.load_state_dict(load_file(folder / "model.safetensors"))
    state.teacher.load_state_dict(load_file(folder / "teacher.safetensors"))
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        parameter, name = key.split(".")
        moments.setdefault(int(parameter), {})[name] = value
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    state.step, state.seconds = progress["step"], progress["seconds"]
    _set_schedule(state.schedule, state.step)
    if state.sampler is not None and (folder / "samplers.pt").exists():
        samplers = torch.load(folder / "samplers.pt", map_location="cpu")
        if len(samplers) != ranks.size():
            raise CheckpointError(
                f"{folder} is of {len(samplers)} processes with batches of their own, not of "
                f"{ranks.size()}"
            )
        state.sampler.load_state_dict(_features_to(ranks.device(), samplers[ranks.rank()]))


def _features_to(device: str | torch.device, sampler: dict[str, Any]) -> dict[str, Any]:
    """A sampler's state with what it recorded on another device; indices stay on the CPU."""
    if sampler.get("queue") is None:
        return sampler
    indices, *features = sampler["queue"]
    return sampler | {"queue": (indices, *(x.to(device) for x in features))}


def _set_schedule(schedule: LambdaLR, step: int) -> None:
    schedule.last_epoch = step
    groups = schedule.optimizer.param_groups
    for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(step)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(folder) / "tokenizer")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def load_model(
    folder: str | Path, weights: str = "teacher", device: str | torch.device = "cpu"
) -> tuple[DualEncoder, PretrainConfig, PreTrainedTokenizerFast]:
    """A trained model in evaluation mode, its configuration and tokenizer.

    Args:
        folder: a checkpoint.
        weights: ``"teacher"`` (the moving average) or ``"model"``.
        device: where to put it.
    """
    folder = Path(folder)
    values: dict[str, Any] = load_json(folder / "config.json")
    config, tokenizer = PretrainConfig(**values), load_tokenizer(folder)
    model = METHODS[config.method].model(config, len(tokenizer), tokenizer.pad_token_id)
    if weights == "teacher":
        model.queue = None
    model.load_state_dict(load_file(folder / f"{weights}.safetensors"))
    return model.to(device).eval(), config, tokenizer
