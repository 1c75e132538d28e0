"""Training in two processes, and what one process does to train with more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from reference import pretrain as pretraining
from reference.batch import Batch
from reference.checkpoint import checkpoints, load_model
from reference.config import PretrainConfig
from reference.pretrain import build, pretrain, step_batches, update
from reference.run_files import load_metrics
from reference.step import Step

# Nothing is random but what all processes draw alike.
OPTIONS: dict[str, Any] = {
    "image_size": 16, "patch_size": 8, "width": 16, "heads": 2, "image_layers": 1,
    "fusion_layers": 1, "projection": 8, "items": 20, "steps": 4, "random_mask_steps": 0,
    "mask_noise": 0.0, "mlm_mask": 1.0, "warmup_steps": 1, "log_every": 1, "eval_every": 4,
    "save_every": 2,
}  # fmt: skip


def run_alone(output: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    monkeypatch.setattr(pretraining, "write_report", lambda run: run)
    pretrain(PretrainConfig(**OPTIONS | options, output=str(output)))


def run_in_two(output: Path, **options: Any) -> None:
    arguments = [
        part
        for name, value in (OPTIONS | options | {"output": output}).items()
        for part in (f"--{name}", str(value))
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "reference.pretrain", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def losses(run: Path) -> list[list[float]]:
    return [
        [value for name, value in row.items() if name not in ("step", "seconds")]
        for row in load_metrics(run)
        if "loss" in row
    ]


def parameters(run: Path) -> list[torch.Tensor]:
    model, _, _ = load_model(checkpoints(run)[-1])
    return list(model.parameters())


@pytest.mark.parametrize("method", ["syncmask", "sycoca"])
def test_two_processes_train_as_one_with_twice_the_batch(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_alone(tmp_path / "one", monkeypatch, method=method, batch_size=12)
    run_in_two(tmp_path / "two", method=method, batch_size=6)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 4
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        parameters(tmp_path / "two"), parameters(tmp_path / "one"), rtol=1e-2, atol=1e-3
    )


def test_two_processes_resume_with_their_queues_and_grouped_batches(tmp_path: Path) -> None:
    options = {
        "batch_size": 4, "queue_size": 12, "distillation": 0.4, "method": "simla",
        "batches": "hardest", "keep_checkpoints": 2,
    }  # fmt: skip
    run = tmp_path / "run"
    run_in_two(run, **options)
    whole = losses(run)
    middle, last = checkpoints(run)
    last.rename(tmp_path / "away")
    run_in_two(run, **options | {"resume": True})
    assert losses(run) == whole
    model, _, _ = load_model(middle, "model")
    assert (model.queue.item_ids >= 0).all()  # 2 steps of 4 pairs of each of 2 ranks


def test_accumulated_batches_make_one_step_of_their_mean_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)  # it hides factors
    config = PretrainConfig(**OPTIONS, batch_size=6, accumulate=2)
    data = config.load_data()
    state = build(config, data.tokenizer)
    batches = list(step_batches(state, data, config))
    assert len(torch.cat([batch.rows for batch in batches]).unique()) == 12
    weights = list(state.model.parameters())

    def gradients(batch: Batch) -> tuple[torch.Tensor, ...]:
        step = Step(state.model, state.teacher, batch, 0, data.tokenizer, config)
        return torch.autograd.grad(sum(state.objective(step).values()), weights)

    one, other = map(gradients, batches)
    update(state, batches, data.tokenizer, config)
    mean = [(x + y) / 2 for x, y in zip(one, other, strict=True)]
    torch.testing.assert_close([weight.grad for weight in weights], mean)
    assert (state.step, state.schedule.last_epoch) == (1, 1)
