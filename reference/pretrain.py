"""Pretrain a small model: ``python -m reference.pretrain``.

By SyncMask, a reconstruction (see `reference.model.syncmask`), by SyCoCa or by SIMLA; masks,
gathers, losses, negatives and momentum are operators of `syncmask_kernels`. One process and one
device, in plain PyTorch: contrastive losses and negatives across processes need gathers that
Accelerate does not bring, and without its sampler and generators every step is a function of the
seed and the step, which is what makes a resumed run end with the very losses of an uninterrupted
one.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import (
    HfArgumentParser,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)

import syncmask_kernels as smk
from reference.batch import Batch, crop_and_flip, derived_seed, make_batch, step_indices
from reference.checkpoint import (
    CheckpointError,
    TrainState,
    checkpoints,
    load_checkpoint,
    load_tokenizer,
    save_checkpoint,
)
from reference.config import PretrainConfig
from reference.data import Data
from reference.evaluate import evaluate
from reference.examples import examples
from reference.methods import METHODS
from reference.plain import operators
from reference.report import write_report
from reference.run_files import (
    CONFIG,
    EVALUATION,
    append_metrics,
    keep_metrics,
    load_json,
    save_json,
)
from reference.step import Step


def pretrain(config: PretrainConfig) -> Path:
    """Train, evaluate and write the report; returns its path."""
    run = Path(config.output)
    _open_run(run, config)
    saved = checkpoints(run)[-1] if checkpoints(run) else None
    data = config.load_data(load_tokenizer(saved) if saved else None)
    state = build(config, data.tokenizer)
    if saved:
        load_checkpoint(saved, state)
    keep_metrics(run, state.step)
    train(state, data, config, run)
    return write_report(run)


def _open_run(run: Path, config: PretrainConfig) -> None:
    started = (run / CONFIG).exists()
    if config.resume and not started:
        raise FileNotFoundError(f"nothing to resume in {run}")
    if started and not config.resume:
        raise FileExistsError(f"{run} holds a run: resume it, or choose another output")
    run.mkdir(parents=True, exist_ok=True)
    save_json(run / CONFIG, asdict(config))


def build(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> TrainState:
    """A freshly initialised model and teacher, with their optimiser and schedule."""
    torch.manual_seed(derived_seed(config.seed, "initialisation", 0))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    new = METHODS[config.method].model
    model = new(config, len(tokenizer), tokenizer.pad_token_id).to(device)
    teacher = copy.deepcopy(model).requires_grad_(False).eval()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, config.steps)
    return TrainState(model, teacher, optimizer, schedule)


def train(state: TrainState, data: Data, config: PretrainConfig, run: Path) -> None:
    """Train to the last step; log, evaluate and save on the way, and write the results."""
    start, began = state.step, time.perf_counter() - state.seconds
    steps = tqdm(range(start, config.steps), initial=start, total=config.steps, unit="step")
    outcome = None
    with SummaryWriter(str(run / "tensorboard"), purge_step=start + 1) as board:
        for _ in steps:
            losses = train_step(state, data, config)
            state.seconds = time.perf_counter() - began

            def due(every: int) -> bool:
                return state.step % every == 0 or state.step == config.steps

            if due(config.log_every):
                row = {name: loss.item() for name, loss in losses.items()}
                _check_finite(row["loss"], state.step, config)
                steps.set_postfix({name: f"{value:.2f}" for name, value in row.items()})
                append_metrics(run, {"step": state.step, **row, "seconds": state.seconds})
                _log(board, "loss", row, state.step)
            if due(config.eval_every):
                outcome = evaluate(state.teacher, data.val, data.tokenizer, config)
                append_metrics(run, {"step": state.step, "eval": outcome[0]})
                for way in ("i2t", "t2i"):
                    _log(board, way, outcome[0]["retrieval"][way], state.step)
                _log(board, "masks", outcome[0].get("masks", {}), state.step)
            if due(config.save_every):
                save_checkpoint(run, state, config, data.tokenizer)
    # The teacher: it makes the masks, and an average of models retrieves better than the last one.
    evaluation, encoded = outcome or evaluate(state.teacher, data.val, data.tokenizer, config)
    save_json(run / EVALUATION, evaluation)
    examples(encoded, data.val, data.tokenizer).save(run)


def train_step(state: TrainState, data: Data, config: PretrainConfig) -> dict[str, Tensor]:
    """One optimiser step and one of the teacher; returns the loss and its terms."""
    torch.manual_seed(derived_seed(config.seed, "step", state.step))
    rows = step_indices(len(data.train), config.batch_size, state.step, config.seed)
    batch = make_batch(data.train[rows], data.tokenizer, state.model.temperature.device)
    if config.augment:
        batch = batch._replace(pixels=crop_and_flip(batch.pixels))
    return update(state, batch, data.tokenizer, config)


def update(
    state: TrainState, batch: Batch, tokenizer: PreTrainedTokenizerBase, config: PretrainConfig
) -> dict[str, Tensor]:
    """`train_step` on a batch that is given."""
    step = Step(state.model, state.teacher, batch, state.step, tokenizer, config)
    # A young teacher follows quickly: the warm-up of TensorFlow's ExponentialMovingAverage.
    momentum = min(config.momentum, (1 + state.step) / (10 + state.step))
    with operators(config.operators):
        losses = METHODS[config.method].losses(step)
        loss = torch.stack(list(losses.values())).sum()
        state.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
        state.optimizer.step()
        state.schedule.step()
        with torch.no_grad():
            state.model.temperature.clamp_(0.001, 0.5)
        smk.ema_update_(state.teacher, state.model, momentum)
    state.step += 1
    return {"loss": loss, **losses}


def _check_finite(loss: float, step: int, config: PretrainConfig) -> None:
    if not math.isfinite(loss):
        raise RuntimeError(
            f"the loss is {loss} at step {step}: try a learning rate below {config.learning_rate}"
        )


def _log(board: SummaryWriter, group: str, values: Mapping[str, Any], step: int) -> None:
    for name, value in values.items():
        board.add_scalar(f"{group}/{name}", value, step)


def parse_config(arguments: list[str]) -> PretrainConfig:
    """Read the command line; with ``--resume``, options not given are those of the run."""
    parser = HfArgumentParser(PretrainConfig, description=__doc__)  # type: ignore[arg-type]
    known = parser.parse_args(arguments)
    if known.resume and (Path(known.output) / CONFIG).exists():
        parser.set_defaults(**load_json(Path(known.output) / CONFIG))
    (config,) = parser.parse_args_into_dataclasses(arguments)
    return config


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = parse_config(sys.argv[1:] if arguments is None else arguments)
    try:
        report = pretrain(config)
    except (CheckpointError, FileExistsError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"report: {report}")


if __name__ == "__main__":
    main()
