"""SyCoCa and SIMLA, and what the methods share: queue, distillation, targets of patches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import syncmask_kernels as smk
from reference import pretrain as pretraining
from reference import ranks
from reference.batch import Batch, make_batch
from reference.checkpoint import TrainState, checkpoints, load_model
from reference.config import PretrainConfig
from reference.data import Data, load_data
from reference.data.tokenizer import train_tokenizer
from reference.evaluate import evaluate
from reference.methods import METHODS, parts, simla, sycoca
from reference.model import SimlaModel, SyCoCaModel
from reference.plain import enqueue_
from reference.pretrain import build, pretrain, train_step
from reference.run_files import load_metrics
from reference.step import Step

SIZES: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "width": 24, "heads": 3, "image_layers": 1,
    "fusion_layers": 2, "projection": 8, "items": 12, "batch_size": 8, "warmup_steps": 2,
    "random_mask_steps": 2, "distillation_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def data() -> Data:
    """With words of several pieces."""
    captions = load_data(items=12, image_size=16, patch_size=4).train.captions
    tokenizer = train_tokenizer(captions, vocab_size=100)
    return load_data(items=12, image_size=16, patch_size=4, tokenizer=tokenizer)


@pytest.fixture
def batch(data: Data) -> Batch:
    return make_batch(data.train[torch.arange(10)], data.tokenizer, torch.device("cpu"))


def started(data: Data, **options: Any) -> tuple[TrainState, PretrainConfig]:
    config = PretrainConfig(**SIZES | options)
    state = build(config, data.tokenizer)
    for parameter in state.model.parameters():  # no zero biases or mask tokens: they hide mistakes
        parameter.data += 0.05 * torch.randn_like(parameter)
    return state, config


def step_of(data: Data, batch: Batch, index: int = 0, **options: Any) -> Step[Any]:
    state, config = started(data, **options)
    return Step(state.model, state.teacher, batch, index, data.tokenizer, config)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("distillation", [0.0, 0.4])
def test_losses_reach_every_parameter(
    data: Data, batch: Batch, method: str, distillation: float
) -> None:
    step = step_of(data, batch, 5, method=method, distillation=distillation)
    torch.stack(list(METHODS[method].losses(step).values())).sum().backward()
    assert [name for name, p in step.student.named_parameters() if p.grad is None] == []
    assert [name for name, p in step.teacher.named_parameters() if p.grad is not None] == []


@pytest.mark.parametrize("method", ["sycoca", "simla"])
def test_losses_fall_on_what_is_trained_on(data: Data, method: str) -> None:
    state, config = started(data, method=method, learning_rate=3e-3, steps=100)
    first, *_, last = [train_step(state, data, config) for _ in range(40)]
    for name in set(first) - {"itm", "loss"}:
        assert last[name] < 0.9 * first[name], name


@pytest.mark.parametrize("method", ["sycoca", "simla"])
def test_a_run_resumes_with_the_same_losses(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining, "write_report", lambda run: run)
    options: dict[str, Any] = {
        "method": method, "queue_size": 20, "distillation": 0.4, "steps": 5, "log_every": 1,
        "save_every": 3, "eval_every": 5, "keep_checkpoints": 2,
    }  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pretrain(PretrainConfig(**SIZES | options, output=str(whole)))
    pretrain(PretrainConfig(**SIZES | options, output=str(cut)))
    for path in checkpoints(cut)[1:]:
        path.rename(tmp_path / "away")
    pretrain(PretrainConfig(**SIZES | options, output=str(cut), resume=True))

    def logged(run: Path) -> list[dict[str, float]]:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in load_metrics(run)]

    assert logged(whole) == logged(cut)
    model, config, _ = load_model(checkpoints(cut)[-1])
    assert type(model) is METHODS[method].model
    assert model.queue is None  # it is the student's
    assert config.method == method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_plain_operators_train_the_same(data: Data, method: str, bfloat16: bool) -> None:
    # In bfloat16 plain similarities have its few digits, and training drives them apart.
    steps, rtol, atol = (2, 1e-2, 0) if bfloat16 else (4, 1e-4, 1e-5)

    def train(operators: str) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        state, config = started(
            data, method=method, operators=operators, queue_size=20, distillation=0.4,
            random_mask_steps=1, bfloat16=bfloat16,
        )  # fmt: skip
        rows = [train_step(state, data, config) for _ in range(steps)]
        return rows, [*state.model.parameters(), *state.teacher.parameters()]

    (rows, parameters), (plain_rows, plain_parameters) = train("library"), train("plain")
    for row, plain in zip(rows, plain_rows, strict=True):
        torch.testing.assert_close(row, plain, rtol=rtol, atol=atol)
    torch.testing.assert_close(parameters, plain_parameters, rtol=1e-2, atol=1e-3)


def test_compiled_encoders_are_what_a_step_calls(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, compile_ = set(), torch.compile

    def spy(function: Any, **options: Any) -> Any:
        traced = function.__name__ == "encode_image"  # to trace the others takes long
        compiled = compile_(function, backend="eager", **options) if traced else function

        def call(*args: Any, **kwargs: Any) -> Any:
            entered.add(type(function.__self__).__name__)
            return compiled(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", spy)
    losses = []
    for compiled in (False, True):
        state, config = started(data, method="simla", compile=compiled)
        losses.append(train_step(state, data, config))
        assert entered >= ({"SimlaModel", "BertEmbeddings", "SingleStream"} if compiled else set())
    torch.testing.assert_close(*losses)


def test_plain_queues_hold_the_keys_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "of_all", lambda x: torch.cat([x, 10 + x]))
    queue, ids, pointer = torch.zeros(1, 5), torch.zeros(5, dtype=torch.int64), torch.tensor([3])
    enqueue_(queue, pointer, torch.tensor([[1.0], [2.0]]), torch.tensor([1, 2]), ids)
    assert queue.tolist() == [[11, 12, 0, 1, 2]]
    assert ids.tolist() == [11, 12, 0, 1, 2]
    assert pointer.item() == 2


def test_grouped_batches_resume_in_the_middle_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining, "write_report", lambda run: run)
    options: dict[str, Any] = {
        "batches": "semi_hard", "steps": 8, "log_every": 1, "save_every": 5, "eval_every": 8,
        "keep_checkpoints": 2, "search_space": 16,
    }  # fmt: skip
    seen: list[list[int]] = []
    record = smk.GroupedBatchSampler.record

    def spy(self: Any, rows: Tensor, *features: Tensor) -> None:
        seen.append(rows.tolist())
        record(self, rows, *features)

    monkeypatch.setattr(smk.GroupedBatchSampler, "record", spy)
    pretrain(PretrainConfig(**SIZES | options, output=str(tmp_path / "whole")))
    whole = list(seen)
    for epoch in (whole[:3], whole[3:6]):  # 24 pairs
        assert sorted(row for batch in epoch for row in batch) == list(range(24))
    _, last = checkpoints(tmp_path / "whole")
    last.rename(tmp_path / "away")
    seen.clear()
    rows = load_metrics(tmp_path / "whole")
    pretrain(PretrainConfig(**SIZES | options, output=str(tmp_path / "whole"), resume=True))
    assert seen == whole[5:]

    def logged(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    assert logged(load_metrics(tmp_path / "whole")) == logged(rows)


# ---- what the methods share ----


def test_distillation_grows_to_its_share(data: Data, batch: Batch) -> None:
    alphas = [step_of(data, batch, i, distillation=0.4).alpha for i in (0, 1, 2, 9)]
    assert alphas == [0.0, 0.2, 0.4, 0.4]


@pytest.mark.parametrize("queue_size", [0, 6])
def test_contrast_with_the_teacher_is_albefs(data: Data, batch: Batch, queue_size: int) -> None:
    step = step_of(data, batch, 5, distillation=0.4, queue_size=queue_size)
    model, queue = step.student, step.student.queue
    if queue is not None:
        queue.item_ids[:3] = batch.item_ids[:3]
        images, texts, ids = (x.clone() for x in (queue.images, queue.texts, queue.item_ids))
    else:
        images = texts = torch.empty(8, 0)
        ids = torch.empty(0, dtype=torch.int64)
    image, text = (
        model.encode_image(batch.pixels),
        model.encode_text(batch.input_ids, batch.attended),
    )
    image_keys = step.teacher.image_features(step.teacher_image)
    text_keys = step.teacher.text_features(step.teacher_text)
    same = (batch.item_ids[:, None] == torch.cat([batch.item_ids, ids])).float()
    hard = same / same.sum(dim=1, keepdim=True)

    def one_way(query: Tensor, teacher: Tensor, keys: Tensor, past: Tensor) -> Tensor:
        every = torch.cat([keys.T, past], dim=1)
        soft = (teacher @ every / model.temperature).softmax(dim=1)
        targets = 0.4 * soft + 0.6 * hard
        return F.cross_entropy(query @ every / model.temperature, targets.detach())

    expected = one_way(model.image_features(image), image_keys, text_keys, texts) / 2
    expected = expected + one_way(model.text_features(text), text_keys, image_keys, images) / 2
    loss, _ = parts.contrast(step, image, text)
    torch.testing.assert_close(loss, expected)
    if queue is not None:
        assert queue.pointer.item() == 10 % 6
        assert sorted(queue.item_ids.tolist()) == sorted(batch.item_ids[-6:].tolist())


@pytest.mark.parametrize("target", ["pixels", "norm_pixels", "features", "codes"])
def test_patches_are_told_by_their_target(data: Data, batch: Batch, target: str) -> None:
    step = step_of(data, batch, mim_target=target)
    model, states = step.student, torch.randn(10, 17, 24)
    mask = torch.zeros(10, 16, dtype=torch.bool)
    mask[:, 3] = mask[:, 11] = True
    ids = torch.tensor([[3, 11, -1]]).expand(10, 3)
    loss = parts.mim_loss(step, lambda _model, _image: states, mask, ids)
    told = model.mim_head(states[:, 1:][mask])
    patches = batch.pixels.reshape(10, 3, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1)
    patches = patches.reshape(10, 16, 48)[mask]
    if target == "codes":
        expected = F.cross_entropy(told, model.mim_head.codes(batch.pixels)[mask])
    elif target == "features":
        wanted = F.layer_norm(step.teacher_image[:, 1:], (24,))[mask]
        expected = F.l1_loss(told, wanted)
    else:
        if target == "norm_pixels":
            deviation = (patches.var(dim=1, keepdim=True) + 1e-6).sqrt()
            patches = (patches - patches.mean(dim=1, keepdim=True)) / deviation
        expected = F.l1_loss(told, patches)
    torch.testing.assert_close(loss, expected)


def test_codes_tell_patches_apart_but_not_their_brightness(data: Data) -> None:
    torch.manual_seed(0)
    codes = started(data, method="simla")[0].model.mim_head.codes
    pixels = torch.rand(4, 3, 16, 16)
    assert len(codes(pixels).unique()) > 32
    assert torch.equal(codes(0.5 * pixels + 0.1), codes(pixels))


# ---- SyCoCa ----


def test_captions_are_told_without_looking_ahead(data: Data, batch: Batch) -> None:
    model = step_of(data, batch, method="sycoca").student
    assert isinstance(model, SyCoCaModel)
    other = batch.input_ids.clone()
    other[:, 4:] = other[:, 4:].flip(1)
    image = model.encode_image(batch.pixels)
    every = torch.ones_like(batch.attended)
    first, second = (
        model.describe(model.read(x, every), every, image) for x in (batch.input_ids, other)
    )
    torch.testing.assert_close(first[:, :4], second[:, :4])
    assert not torch.allclose(first[:, 4:], second[:, 4:])
    text = model.encode_text(batch.input_ids, batch.attended)
    last = batch.attended.sum(dim=1) - 1
    torch.testing.assert_close(text[:, 0], text[torch.arange(10), last])


def test_caption_loss_is_over_the_words_that_follow(data: Data, batch: Batch) -> None:
    model = step_of(data, batch, method="sycoca").student
    hidden = torch.rand(10, 16) < 0.5
    words = model.read(batch.input_ids, batch.attended)
    told = model.describe(words, batch.attended, model.encode_image(batch.pixels, hidden))
    logits = model.word_transform(told) @ model.word_embeddings.T + model.word_bias
    follows = batch.attended[:, 1:]
    expected = F.cross_entropy(logits[:, :-1][follows], batch.input_ids[:, 1:][follows])
    loss = sycoca.caption_loss(model, batch, words, hidden)
    torch.testing.assert_close(loss, expected)


def test_sycoca_rebuilds_the_patches_most_like_the_text(
    data: Data, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(data, batch, method="sycoca", high_ratio=0.25, low_ratio=0.5)
    model = step.student
    image, text = (
        model.encode_image(batch.pixels),
        model.encode_text(batch.input_ids, batch.attended),
    )
    similarity = model.patch_features(image) @ model.word_features(text).transpose(1, 2)
    similarity = similarity.masked_fill(~batch.token_valid[:, None], -torch.inf)
    scores = similarity.amax(dim=2)
    hidden = []
    encode = type(model).encode_image

    def spy(self: Any, pixels: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        hidden.append(patch_mask)
        return encode(self, pixels, patch_mask)

    monkeypatch.setattr(type(model), "encode_image", spy)
    sycoca.losses(step)
    clean, low, high = hidden
    assert clean is None
    assert torch.equal(high, smk.topk_mask(scores, k=4).mask)
    assert torch.equal(low, smk.topk_mask(scores, k=8, largest=False).mask)


def test_sycocas_teacher_rebuilds_from_its_own_words(
    data: Data, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(data, batch, 5, method="sycoca", mim_target="codes", distillation=0.4)
    teacher, read = step.teacher, []
    draw = teacher.draw

    def spy(image: Tensor, words: Tensor, attended: Tensor) -> Tensor:
        read.append(words)
        return draw(image, words, attended)

    monkeypatch.setattr(teacher, "draw", spy)
    sycoca.losses(step)
    (words,) = read
    torch.testing.assert_close(words, teacher.read(batch.input_ids, batch.attended))


# ---- SIMLA ----


def test_keywords_are_the_words_the_cls_looks_at(data: Data, batch: Batch) -> None:
    step = step_of(data, batch, method="simla", keywords=3)
    model = step.teacher
    assert isinstance(model, SimlaModel)
    ids, row = simla.keywords(model, batch, step.teacher_image, step.config)
    maps: list[Tensor] = []
    last = model.stack.encoder.layer[-1].attention.self
    last.register_forward_hook(lambda *call: maps.append(call[2][1]))
    model.stack.set_attn_implementation("eager")
    padding = torch.zeros(batch.attended.shape).masked_fill(~batch.attended, -torch.inf)
    model.stack.encoder(
        model.stack.embed(batch.input_ids),
        attention_mask=padding[:, None, None],
        encoder_hidden_states=step.teacher_image,
    )
    (probabilities,) = maps
    torch.testing.assert_close(row, probabilities[:, :, 0].mean(dim=1))
    for chosen, heads, valid in zip(ids, probabilities[:, :, 0], batch.token_valid, strict=True):
        looked_at = heads.masked_fill(~valid, -1).argsort(descending=True)[:, :4].flatten().tolist()
        ballots = Counter(place for place in looked_at if valid[place])
        best = sorted(ballots, key=lambda place: (-ballots[place], place))
        assert chosen.tolist() == sorted(best[:3])


def test_keyword_loss_is_a_soft_multi_label_loss(data: Data, batch: Batch) -> None:
    step = step_of(data, batch, 9, method="simla", distillation=0.4)
    image = step.student.encode_image(batch.pixels)
    ids, _ = simla.keywords(step.teacher, batch, step.teacher_image, step.config)
    targets = torch.zeros(10, len(data.tokenizer))
    for target, row, words in zip(targets, ids, batch.input_ids, strict=True):
        target[words[row[row >= 0]]] = 1
    teacher = step.teacher.keyword_head(step.teacher.image_features(step.teacher_image)).sigmoid()
    logits = step.student.keyword_head(step.student.image_features(image))
    hard, soft = (F.binary_cross_entropy_with_logits(logits, t) for t in (targets, teacher))
    torch.testing.assert_close(simla.keyword_loss(step, image), 0.6 * hard + 0.4 * soft)


def test_blocks_hide_neighbours_together() -> None:
    torch.manual_seed(0)
    scores = simla.block_scores(400, 14, torch.empty(0))
    mask = smk.topk_mask(scores, ratio=0.3).mask.view(400, 14, 14)
    assert (mask.sum(dim=(1, 2)) == 59).all()
    together = (mask[:, :, 1:] & mask[:, :, :-1]).sum() / mask[:, :, :-1].sum()
    assert together > 0.75  # of masked patches at random: 0.3
    assert mask.any(dim=0).all()  # no place is spared


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_shows_the_masks_of_the_method(data: Data, method: str) -> None:
    state, config = started(data, method=method)
    figures, encoded = evaluate(state.teacher.eval(), data.val, data.tokenizer, config)
    assert encoded.patch_mask.any()
    assert encoded.token_mask.any() == (method != "sycoca")
    assert torch.equal(
        encoded.random_patch_mask.sum(dim=2),
        encoded.patch_mask.sum(dim=1, keepdim=True).expand(-1, 20),
    )
    assert 0 <= figures["masks"]["patches_described"] <= 1
