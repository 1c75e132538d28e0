"""Pretrain a small model: ``python -m reference.pretrain``.

By SyncMask, a reconstruction (see `reference.model.syncmask`), by SyCoCa or by SIMLA; masks,
gathers, losses, negatives and momentum are operators of `syncmask_kernels`. On several GPUs or
machines the same under ``torchrun``: see `reference.ranks`.

Every step is a function of the seed and the step, which is what makes a resumed run end with the
very losses of an uninterrupted one.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import (
    HfArgumentParser,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)

import syncmask_kernels as smk
from reference import ranks
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
from reference.data import Data, PairDataset, ShardStream
from reference.evaluate import evaluate
from reference.examples import examples
from reference.methods import METHODS, Method
from reference.model import DualEncoder
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
    with ranks.process_group():
        return _pretrain(config)


def _pretrain(config: PretrainConfig) -> Path:
    run = Path(config.output)
    if ranks.rank() == 0:
        _open_run(run, config)
    ranks.wait()
    saved = checkpoints(run)[-1] if checkpoints(run) else None
    data = config.load_data(load_tokenizer(saved) if saved else None)
    _check_size(data.train, config)
    state = build(config, data.tokenizer, data.train)
    if saved:
        load_checkpoint(saved, state)
    if ranks.rank() > 0:
        for _ in range(state.step, config.steps):
            train_step(state, data, config)
            if state.step % config.save_every == 0 or state.step == config.steps:
                save_checkpoint(run, state, config, data.tokenizer)
        return run
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


def _check_size(pairs: PairDataset | ShardStream, config: PretrainConfig) -> None:
    need = config.batch_size * ranks.size() * config.accumulate
    if isinstance(pairs, PairDataset) and len(pairs) < need:
        raise ValueError(
            f"{config.data} has {len(pairs)} training pairs, but a step takes {need}: batch_size "
            f"{config.batch_size} x {ranks.size()} processes x accumulate {config.accumulate}"
        )


class Objective(nn.Module):
    """A method's losses as a forward pass, which is where DistributedDataParallel looks on."""

    def __init__(self, student: DualEncoder, method: Method) -> None:
        super().__init__()
        self.student, self.method = student, method

    def forward(self, step: Step[Any]) -> dict[str, Tensor]:
        return self.method.losses(step)

    def named_buffers(self, *_: Any, **__: Any) -> Iterator[tuple[str, Tensor]]:
        """None, so that nothing sends the queue around: it is filled alike on every rank."""
        return iter(())


def build(
    config: PretrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    pairs: PairDataset | ShardStream | None = None,
) -> TrainState:
    """A freshly initialised model and teacher, with their optimiser and schedule.

    With `pairs` they are sampled as `config.batches` says, or come as their stream has them.
    """
    torch.manual_seed(derived_seed(config.seed, "initialisation", 0))
    method, device = METHODS[config.method], ranks.device()
    model = method.model(config, len(tokenizer), tokenizer.pad_token_id).to(device)
    teacher = copy.deepcopy(model).requires_grad_(False).eval()
    teacher.queue = None  # the student contrasts with one
    if config.compile:
        for encoder in (model, teacher):
            for part in encoder.children():
                part.compile(dynamic=True)
            # The image encoder is called layer by layer, never as a whole.
            compiled = torch.compile(encoder.encode_image, dynamic=True)
            encoder.encode_image = compiled  # type: ignore[method-assign]
    objective: nn.Module = Objective(model, method)
    if ranks.size() > 1:
        devices = [device] if device.type == "cuda" else None
        objective = DistributedDataParallel(objective, devices)
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
    sampler: smk.GroupedBatchSampler | ShardStream | None = None
    if isinstance(pairs, ShardStream):
        sampler = pairs
    elif pairs is not None and config.batches != "shuffled":
        sampler = smk.GroupedBatchSampler(
            len(pairs),
            config.batch_size,
            search_space=config.search_space,
            item_ids=pairs.item_ids,
            mode=config.batches,
            drop_last=True,
            seed=config.seed,
        )
    return TrainState(model, teacher, objective, optimizer, schedule, sampler)


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
                _log(board, "loss", row, state.step)
                if data.train.broken:
                    row["broken"] = data.train.broken
                append_metrics(run, {"step": state.step, **row, "seconds": state.seconds})
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
    if start == config.steps and (run / EVALUATION).exists():
        evaluation = {**load_json(run / EVALUATION), **evaluation}
    save_json(run / EVALUATION, evaluation)
    examples(encoded, data.val, data.tokenizer).save(run)


def train_step(state: TrainState, data: Data, config: PretrainConfig) -> dict[str, Tensor]:
    """One optimiser step and one of the teacher; returns the loss and its terms."""
    stream = f"step of rank {ranks.rank()}" if ranks.rank() else "step"
    torch.manual_seed(derived_seed(config.seed, stream, state.step))
    return update(state, step_batches(state, data, config), data.tokenizer, config)


def step_batches(state: TrainState, data: Data, config: PretrainConfig) -> Iterator[Batch]:
    """The batches of this process in this step; texts of all processes are cut alike."""
    pairs = data.train
    if isinstance(pairs, ShardStream):
        for _ in range(config.accumulate):
            yield _batch(next(pairs), data, pairs.length, config)
        return
    if state.sampler is not None:
        whole = pairs.input_ids.shape[1]
        for _ in range(config.accumulate):
            yield _batch(pairs[state.next_rows()], data, whole, config)
        return
    together = config.batch_size * ranks.size()
    rows = step_indices(len(pairs), together * config.accumulate, state.step, config.seed)
    for part in rows.split(together):
        attended = pairs.input_ids[part] != data.tokenizer.pad_token_id
        own = part[config.batch_size * ranks.rank() :][: config.batch_size]
        yield _batch(pairs[own], data, int(attended.sum(dim=1).max()), config)


def _batch(pairs: dict[str, Tensor], data: Data, length: int, config: PretrainConfig) -> Batch:
    batch = make_batch(pairs, data.tokenizer, ranks.device(), length)
    if config.augment:
        batch = batch._replace(pixels=crop_and_flip(batch.pixels))
    return batch


def update(
    state: TrainState,
    batches: Iterable[Batch],
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainConfig,
) -> dict[str, Tensor]:
    """`train_step` on batches that are given, `config.accumulate` of them."""
    rows: list[dict[str, Tensor]] = []
    state.optimizer.zero_grad()
    with operators(config.operators):
        for number, batch in enumerate(batches, 1):
            step = Step(state.model, state.teacher, batch, state.step, tokenizer, config)
            with _gradients_meet(state.objective, number == config.accumulate):
                with torch.autocast(ranks.device().type, torch.bfloat16, enabled=config.bfloat16):
                    losses = state.objective(step)
                loss = torch.stack([term.float() for term in losses.values()]).sum()
                (loss / config.accumulate).backward()
            if isinstance(state.sampler, smk.GroupedBatchSampler) and step.features is not None:
                state.sampler.record(batch.rows, *(x.float() for x in step.features))
            rows.append({"loss": loss.detach()} | {k: v.detach() for k, v in losses.items()})
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
        state.optimizer.step()
        state.schedule.step()
        with torch.no_grad():
            state.model.temperature.clamp_(0.001, 0.5)
        # A young teacher follows quickly: the warm-up of TensorFlow's ExponentialMovingAverage.
        momentum = min(config.momentum, (1 + state.step) / (10 + state.step))
        smk.ema_update_(state.teacher, state.model, momentum)
    state.step += 1
    return {
        name: ranks.mean(torch.stack([row[name].float() for row in rows]).mean())
        for name in rows[0]
    }


def _gradients_meet(objective: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Ranks average their gradients once a step, with those of the last batch."""
    if isinstance(objective, DistributedDataParallel) and not last:
        return objective.no_sync()
    return nullcontext()


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
    try:
        config = parse_config(sys.argv[1:] if arguments is None else arguments)
        report = pretrain(config)
    except (CheckpointError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"report: {report}")


if __name__ == "__main__":
    main()
