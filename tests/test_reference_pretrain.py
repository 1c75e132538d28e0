"""Training, checkpoints, resuming and evaluation of the SyncMask model."""

from __future__ import annotations

import itertools
import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import syncmask_kernels as smk
from reference import pretrain as pretraining
from reference import run_files
from reference.checkpoint import (
    CheckpointError,
    checkpoints,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from reference.config import PretrainConfig
from reference.data import Data, Truth, load_data
from reference.evaluate import (
    Encoded,
    encode,
    mask_figures,
    retrieval,
    word_auc,
)
from reference.examples import examples
from reference.pretrain import build, parse_config, pretrain, train_step
from reference.run_files import Examples, load_json, load_metrics

TINY: dict[str, Any] = {
    "image_size": 16, "patch_size": 8, "width": 16, "heads": 2, "image_layers": 1,
    "fusion_layers": 1, "projection": 8, "items": 20, "batch_size": 8, "steps": 12,
    "random_mask_steps": 4, "warmup_steps": 2, "log_every": 1, "eval_every": 6, "save_every": 3,
}  # fmt: skip


def tiny(output: Path, **options: Any) -> PretrainConfig:
    return PretrainConfig(**(TINY | {"output": str(output)} | options))


def losses(run: Path) -> list[dict[str, Any]]:
    """The lines of a run without their times."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in load_metrics(run)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    pretrain(tiny(run))
    return run


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "write_report", lambda run: run)


@pytest.fixture(scope="module")
def data() -> Data:
    return load_data(items=20, image_size=16)


def test_a_run_leaves_all_its_files(finished: Path) -> None:
    steps = [row["step"] for row in load_metrics(finished) if "loss" in row]
    assert steps == list(range(1, 13))
    assert [row["step"] for row in load_metrics(finished) if "eval" in row] == [6, 12]
    evaluation = load_json(finished / "evaluation.json")
    assert evaluation == load_metrics(finished)[-1]["eval"]
    assert set(evaluation) == {"retrieval", "masks"}
    assert len(Examples.load(finished).captions) == 12
    assert list((finished / "tensorboard").iterdir())
    assert [path.name for path in checkpoints(finished)] == ["step-00000012"]
    assert load_json(finished / "config.json")["width"] == 16


def test_a_checkpoint_is_a_usable_model(finished: Path, data: Data) -> None:
    model, config, tokenizer = load_model(checkpoints(finished)[-1])
    torch.manual_seed(0)
    encoded = encode(model, data.val, tokenizer, config)
    written = load_json(finished / "evaluation.json")["retrieval"]
    assert retrieval(encoded, data.val) == written
    student, *_ = load_model(checkpoints(finished)[-1], weights="model")
    assert not torch.equal(student.word_bias, model.word_bias)


def test_losses_fall_on_what_is_trained_on(tmp_path: Path) -> None:
    config = tiny(tmp_path, items=4, steps=100, learning_rate=3e-3)
    data = load_data(items=4, image_size=16)
    state = build(config, data.tokenizer)
    first, *_, last = [train_step(state, data, config) for _ in range(60)]
    assert last["itc"] < 1  # chance: ln 8
    assert last["mlm"] < 0.75 * first["mlm"]
    assert last["mim"] < 0.75 * first["mim"]


def test_a_young_teacher_follows_quickly(data: Data, tmp_path: Path) -> None:
    config = tiny(tmp_path, momentum=0.2)
    state = build(config, data.tokenizer)
    expected = state.model.word_bias.detach().clone()
    for momentum in (1 / 10, 2 / 11, 0.2, 0.2):
        train_step(state, data, config)
        expected = momentum * expected + (1 - momentum) * state.model.word_bias.detach()
        torch.testing.assert_close(state.teacher.word_bias, expected)


def test_a_step_depends_on_nothing_but_state_seed_and_step(data: Data, tmp_path: Path) -> None:
    def run(config: PretrainConfig, disturbance: int) -> list[float]:
        state = build(config, data.tokenizer)
        losses = []
        for _ in range(6):
            torch.manual_seed(disturbance)
            losses.append(train_step(state, data, config)["loss"].item())
        return losses

    config = tiny(tmp_path, augment=True, dropout=0.1)
    assert run(config, 1) == run(config, 2)
    assert run(config, 1) != run(tiny(tmp_path, augment=True, dropout=0.1, seed=1), 1)


@pytest.mark.parametrize(("cut", "saved"), [(2, []), (8, ["step-00000006"])])
def test_resuming_after_an_interruption_changes_nothing(
    cut: int,
    saved: list[str],
    finished: Path,
    tmp_path: Path,
    no_report: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "cut"

    def interrupted(state: Any, *rest: Any) -> Any:
        if state.step == cut:
            raise KeyboardInterrupt
        return train_step(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiny(run))
    assert [path.name for path in checkpoints(run)] == saved
    assert losses(run)[-1]["step"] == cut
    pretrain(tiny(run, resume=True))
    _assert_same(run, finished)


def _assert_same(run: Path, other: Path) -> None:
    assert losses(run) == losses(other)
    for name in ("model", "teacher", "optimizer"):
        ours, theirs = (load_file(checkpoints(r)[-1] / f"{name}.safetensors") for r in (run, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_resuming_after_sigkill_changes_nothing(tmp_path: Path, no_report: None) -> None:
    """In the middle of an epoch of grouped batches: an epoch has 5 of them, the first is plain."""
    grouped = {"batches": "semi_hard", "search_space": 16}
    whole, run = tmp_path / "whole", tmp_path / "killed"
    pretrain(tiny(whole, **grouped))
    command = [sys.executable, "-m", "reference.pretrain", "--output", str(run)]
    options = (TINY | grouped).items()
    command += itertools.chain.from_iterable((f"--{k}", str(v)) for k, v in options)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(load_metrics(run)) < 8:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(load_metrics(run)) < len(load_metrics(whole))
    pretraining.main(["--output", str(run), "--resume"])
    _assert_same(run, whole)


def test_resuming_a_finished_run_trains_no_further(no_report: None, finished: Path) -> None:
    before = losses(finished)
    (finished / "examples.json").unlink()
    pretrain(tiny(finished, resume=True))
    assert losses(finished) == before
    assert Examples.load(finished)


def test_an_unwritable_checkpoint_leaves_the_last_one(
    finished: Path, data: Data, tmp_path: Path
) -> None:
    config = tiny(tmp_path)
    state = build(config, data.tokenizer)
    saved = save_checkpoint(tmp_path, state, config, data.tokenizer)
    before = {path.name: path.stat().st_mtime_ns for path in saved.iterdir()}
    state.step = 7
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # as a disk that is full
    try:
        with pytest.raises(
            CheckpointError, match=r"step-00000007.*last complete one is .*00000000"
        ):
            save_checkpoint(tmp_path, state, config, data.tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.stat().st_mtime_ns for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["step-00000000"]
    save_checkpoint(tmp_path, state, config, data.tokenizer)
    assert [path.name for path in saved.parent.iterdir()] == ["step-00000007"]


def test_all_of_a_checkpoint_is_flushed_or_nothing_stays(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path, batches="hardest")
    state = build(config, data.tokenizer, data.train)
    flushed = set()
    flush = run_files._flush
    monkeypatch.setattr(run_files, "_flush", lambda path: flushed.add(path.name) or flush(path))
    saved = save_checkpoint(tmp_path, state, config, data.tokenizer)
    files = {path.name for path in saved.rglob("*")}
    assert {"samplers.pt", "tokenizer", "tokenizer.json", "model.safetensors"} <= files <= flushed

    def full(_: Path) -> None:
        raise Exception("File too large (os error 27)")  # as tokenizers has it

    monkeypatch.setattr(data.tokenizer, "save_pretrained", full)
    state.step = 3
    with pytest.raises(CheckpointError, match=r"File too large.*last complete one is"):
        save_checkpoint(tmp_path, state, config, data.tokenizer)
    assert list(saved.parent.iterdir()) == [saved]


def test_what_fails_in_a_folder_is_told_and_cleared_away(tmp_path: Path) -> None:
    def fail_halfway() -> None:
        with run_files.atomic_path(tmp_path / "a") as folder:
            (folder / "b").mkdir(parents=True)
            raise RuntimeError("the cause")

    with pytest.raises(RuntimeError, match="the cause"):
        fail_halfway()
    assert not list(tmp_path.iterdir())


class OnDevice(torch.Tensor):
    """A tensor that only ``to`` brings to the CPU."""

    def to(self, *device: Any, **_: Any) -> torch.Tensor:
        assert device == ("cpu",)
        return self.as_subclass(torch.Tensor)


def test_recorded_features_leave_their_device_and_come_back(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path, batches="hardest")
    state, resumed = (build(config, data.tokenizer, data.train) for _ in range(2))
    assert isinstance(state.sampler, smk.GroupedBatchSampler)
    assert isinstance(resumed.sampler, smk.GroupedBatchSampler)
    rows = torch.arange(8)
    state.sampler.record(rows, *torch.randn(2, 8, 4))
    part = state.sampler._queue[0]
    features = [x.as_subclass(OnDevice) for x in part[1:]]
    state.sampler._queue = [part._replace(image_feat=features[0], text_feat=features[1])]
    saved = save_checkpoint(tmp_path, state, config, data.tokenizer)
    monkeypatch.setattr("reference.ranks.device", lambda: torch.device("meta"))
    load_checkpoint(saved, resumed)
    (part,) = resumed.sampler._queue
    assert torch.equal(part.indices, rows)
    assert part.image_feat.device.type == part.text_feat.device.type == "meta"


def test_what_a_killed_writer_left_is_cleared_away(data: Data, tmp_path: Path) -> None:
    config = tiny(tmp_path, keep_checkpoints=2)
    state = build(config, data.tokenizer)
    leftover = tmp_path / "checkpoints" / ".step-00000003.77.tmp"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"torn")
    assert checkpoints(tmp_path) == []
    for step in (3, 6, 9):
        state.step = step
        save_checkpoint(tmp_path, state, config, data.tokenizer)
    assert sorted(path.name for path in leftover.parent.iterdir()) == [
        "step-00000006",
        "step-00000009",
    ]


def test_a_run_is_not_overwritten_and_nothing_is_not_resumed(
    finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=r"error: .* holds a run"):
        pretraining.main(["--output", str(finished)])
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        pretrain(tiny(tmp_path / "new", resume=True))


@pytest.mark.parametrize("batches", ["shuffled", "hardest"])
def test_fewer_pairs_than_a_step_takes(batches: str, tmp_path: Path) -> None:
    sizes = ["--items", "20", "--batch_size", "14", "--accumulate", "3"]
    need = "40 training pairs, but a step takes 42: batch_size 14 x 1 processes x accumulate 3"
    with pytest.raises(SystemExit, match=f"error: catalogue has {need}"):
        pretraining.main(["--output", str(tmp_path), "--batches", batches, *sizes])


def test_a_bad_option_is_named_without_a_traceback() -> None:
    with pytest.raises(SystemExit, match=r"^error: batch_size must be at least 2"):
        pretraining.main(["--batch_size", "1"])


def test_resume_takes_the_options_of_the_run(finished: Path) -> None:
    resumed = parse_config(["--output", str(finished), "--resume", "--steps", "99"])
    assert resumed == tiny(finished, resume=True, steps=99)
    assert parse_config(["--batch-size", "7"]) == PretrainConfig(batch_size=7)


def test_resuming_takes_a_new_learning_rate_and_weight_decay(data: Data, tmp_path: Path) -> None:
    config = tiny(tmp_path)
    saved = build(config, data.tokenizer)
    for _ in range(5):
        train_step(saved, data, config)
    new = {"learning_rate": 3e-4, "weight_decay": 0.3, "warmup_steps": 3}
    fresh, resumed = (build(tiny(tmp_path, **new), data.tokenizer) for _ in range(2))
    load_checkpoint(save_checkpoint(tmp_path, saved, config, data.tokenizer), resumed)
    for state in (fresh, resumed):
        while state.step < 6:
            train_step(state, data, config)
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.3
    for ours, theirs in zip(
        resumed.optimizer.param_groups, fresh.optimizer.param_groups, strict=True
    ):
        assert {**ours, "params": 0} == {**theirs, "params": 0}


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining, "train_step", lambda *_: {"loss": torch.tensor(float("nan"))})
    with pytest.raises(RuntimeError, match="loss is nan at step 0"):
        pretrain(tiny(tmp_path / "run", steps=1))


def _encoded(**fields: torch.Tensor) -> Encoded:
    return Encoded(**{name: fields.get(name, torch.empty(0)) for name in Encoded._fields})


def test_retrieval_against_brute_force(data: Data) -> None:
    torch.manual_seed(0)
    val = data.val
    unit = torch.nn.functional.normalize
    text = unit(torch.randn(50, 8), dim=1).repeat_interleave(2, dim=0)  # views share a caption
    image = unit(text + torch.randn(100, 8), dim=1)
    found = retrieval(_encoded(image_features=image, text_features=text), val)
    assert (found["n_images"], found["n_texts"]) == (100, 100)
    for way, similarity in {"i2t": image @ text.T, "t2i": text @ image.T}.items():
        hits = [
            [val.item_ids[i] == val.item_ids[row] for i in order]
            for row, order in enumerate(similarity.sort(dim=1, descending=True).indices.tolist())
        ]
        for k in (1, 5, 10):
            expected = sum(any(row[:k]) for row in hits) / len(hits)
            assert found[way][f"r{k}"] == pytest.approx(expected)
    # Two candidates of a hundred are right, both ways.
    assert found["chance"]["i2t"] == found["chance"]["t2i"]
    misses = 1.0
    for drawn in range(10):
        misses *= (98 - drawn) / (100 - drawn)
    assert found["chance"]["t2i"]["r10"] == pytest.approx(1 - misses)


def test_word_auc() -> None:
    visible = torch.tensor([[-1, 1, 0, 1, 0], [1, 1, -1, -1, -1]], dtype=torch.int8)
    scores = torch.tensor([[9.0, 3.0, 2.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    assert word_auc(scores, visible) == (1 + 1 + 0 + 0.5) / 4


def test_mask_figures() -> None:
    truth = Truth(
        word_visible=torch.tensor([[-1, 1, 0, 1]], dtype=torch.int8),
        patch_described=torch.tensor([[1.0, 0.3, 0.2, 0.0]]),
        patch_detail=torch.tensor([[0.5, 0.0, 0.0, 0.25]]),
    )
    figures = mask_figures(
        _encoded(
            patch_mask=torch.tensor([[True, False, True, False]]),
            token_mask=torch.tensor([[True, True, True, False]]),
            token_scores=torch.tensor([[0.0, 3.0, 2.0, 1.0]]),
            random_patch_mask=torch.tensor(
                [[[True, True, False, False], [False, False, True, True]]]
            ),
            random_token_mask=torch.tensor(
                [[[False, True, False, True], [False, False, True, True]]]
            ),
        ),
        truth,
    )
    assert figures == {
        "words_visible": 1 / 2,
        "words_visible_random": 3 / 4,
        "patches_described": 1 / 2,
        "patches_described_random": 2 / 4,
        "details_covered": pytest.approx(0.5 / 0.75),
        "details_covered_random": pytest.approx(0.75 / 1.5),
        "word_auc": 1 / 2,
    }


def test_examples_show_views_of_one_item_and_true_hits(data: Data, tmp_path: Path) -> None:
    config = tiny(tmp_path)
    torch.manual_seed(0)
    encoded = encode(build(config, data.tokenizer).teacher, data.val, data.tokenizer, config)
    shown = examples(encoded, data.val, data.tokenizer, items=3, queries=4)
    assert shown.captions[0::2] == shown.captions[1::2]
    assert not torch.equal(shown.image[0], shown.image[1])
    assert shown.gallery_images.shape == (4, 5, 3, 16, 16)
    for row, caption in enumerate(shown.gallery_queries):
        for rank in range(5):
            image = shown.gallery_images[row, rank]
            index = int((data.val.images == image).flatten(1).all(dim=1).nonzero()[0])
            assert bool(shown.gallery_hits[row, rank]) == (data.val.captions[index] == caption)
    for row, answers in enumerate(shown.query_captions):
        index = int((data.val.images == shown.query_images[row]).flatten(1).all(dim=1).nonzero()[0])
        assert shown.query_hits[row].tolist() == [a == data.val.captions[index] for a in answers]
    assert json.dumps(shown.tokens)
