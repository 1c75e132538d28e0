"""The study of masks: its rules, its tables, and that it goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reference import ablate as study_module
from reference import pretrain as pretraining
from reference.ablate import TRUNK, AblateConfig, Variant, ablate, as_markdown
from reference.batch import make_batch
from reference.checkpoint import checkpoints, load_model
from reference.config import PretrainConfig
from reference.data import load_data
from reference.masks import teacher_masks
from reference.pretrain import build
from reference.run_files import load_json, load_metrics, save_json
from reference.score_rules import all_scores


def test_rules_of_the_study_are_those_of_training() -> None:
    data = load_data(items=8, image_size=16, patch_size=4)
    config = PretrainConfig(
        image_size=16, patch_size=4, width=24, heads=3, image_layers=1, fusion_layers=2
    )
    model = build(config, data.tokenizer).teacher
    batch = make_batch(data.val[torch.arange(6)], data.tokenizer, torch.device("cpu"))
    image = model.encode_image(batch.pixels)
    text = model.encode_text(batch.input_ids, batch.attended)
    words, patches = all_scores(model, batch)
    for layer in (1, 2):
        for rule in ("max", "text_softmax", "dual", "image_effect", "leave_one_out"):
            config.mask_layer, config.word_score = layer - 1, rule
            expected = teacher_masks(model, batch, image, text, config).token_scores
            name = rule if rule in words else f"{rule}, layer {layer}"
            got = words[name].masked_fill(~batch.token_valid, 0)
            expected = expected.masked_fill(~batch.token_valid, 0)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        for rule in ("mean", "cls", "value", "cls_value"):
            config.mask_layer, config.patch_score = layer - 1, rule
            expected = teacher_masks(model, batch, image, text, config).patch_scores
            got = patches[f"{rule}, layer {layer}"]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for rule, name in (("image_to_text", "max"), ("image_to_text_cls", "cls")):
        config.word_score = rule
        expected = teacher_masks(model, batch, image, text, config).token_scores
        got = words[f"image to text, {name}, layer 1"].masked_fill(~batch.token_valid, 0)
        expected = expected.masked_fill(~batch.token_valid, 0)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for scores in (*words.values(), *patches.values()):
        assert scores.isfinite().all()


def test_the_study_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = {
        "sync, words only": Variant(2, {"masks": "words"}),
        "sync, batches of the hardest": Variant(4, {"batches": "hardest"}),
    }
    monkeypatch.setattr(study_module, "VARIANTS", variants)
    trained: list[tuple[str, str]] = []
    pretrain = study_module.pretrain

    def spy(config: PretrainConfig) -> Path:
        trained.append((config.masks, config.batches))
        if len(trained) == 2:
            raise KeyboardInterrupt
        config.heads, config.image_layers, config.log_every = 2, 1, 1
        return pretrain(config)

    monkeypatch.setattr(study_module, "pretrain", spy)
    monkeypatch.setattr(pretraining, "write_report", lambda run: run)
    study = AblateConfig(str(tmp_path), seeds=1, steps=6, every=3, batch_size=4, width=16, items=16)
    with pytest.raises(KeyboardInterrupt):
        ablate(study)
    page = ablate(study)
    shuffled = "shuffled"
    assert trained == [("random", shuffled), *[("words", shuffled)] * 2, ("sync", "hardest")]
    results = load_json(tmp_path / "results.json")
    assert set(results["Trained on the catalogue"]) == {TRUNK, *variants}
    assert set(results) == {
        "Trained on the catalogue",
        "Trained on the catalogue: more than with random masks of the same seed",
        *(f"{side}: what rules find after the fact" for side in ("Words", "Patches")),
    }
    words = results["Words: what rules find after the fact"]["image_effect"]
    assert set(words) == {
        f"{name} at {age}" for name in ("AUC", "visible", "attributes") for age in (3, 6)
    }
    assert "image_effect" in page.read_text()
    assert (tmp_path / "results.png").stat().st_size > 10_000
    trunk, words = (tmp_path / "catalogue" / n / "0" for n in ("random_masks", "sync-words_only"))
    assert load_model(checkpoints(words)[0])[1].masks == "words"
    # The variant has the trunk's losses up to where it leaves, and others after.
    ours, theirs = (
        [row["loss"] for row in load_metrics(run) if "loss" in row] for run in (words, trunk)
    )
    assert ours[:2] == theirs[:2]
    assert all(a != b for a, b in zip(ours[2:], theirs[2:], strict=True))
    # Beside a run of another rule, the trunk's teacher is judged by that rule too.
    kept = study_module._evaluation_by_rules_of(words, trunk)
    save_json(
        words / "config.json", load_json(words / "config.json") | {"word_score": "image_to_text"}
    )
    by_rule = study_module._evaluation_by_rules_of(words, trunk)
    assert kept == load_json(trunk / "evaluation.json")
    assert by_rule["retrieval"] == kept["retrieval"]
    same, other = (
        [evaluation["masks"][name] for evaluation in (kept, by_rule)]
        for name in ("patches_described", "word_auc")
    )
    assert same[0] == same[1]
    assert other[0] != other[1]


def test_a_study_too_short_for_its_variants_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps must be above 600"):
        ablate(AblateConfig(str(tmp_path), steps=600))
    assert not any(tmp_path.iterdir())


def test_what_is_trained_on_photos() -> None:
    """All that is trained on the catalogue, but for rules and ages; with every seed."""
    study = AblateConfig("runs", photos="products", seeds=2)
    trained: dict[str, list[tuple[str, int]]] = {}
    for training in study_module._trainings(study):
        options = training.options
        assert options["data"] == ("products" if training.where == "photos" else "catalogue")
        assert options["augment"] == (training.where == "photos")
        trained.setdefault(training.where, []).append((training.name, options["seed"]))
    catalogue, photos = trained["catalogue"], trained["photos"]
    assert catalogue == [(n, seed) for n in (TRUNK, *study_module.VARIANTS) for seed in (0, 1)]
    left_out = {name for name, _ in catalogue} - {name for name, _ in photos}
    assert left_out == {
        *(f"sync, words by {rule}" for rule in ("image_to_text", "image_to_text_cls")),
        *(f"sync, {age} teacher" for age in ("young", "grown")),
    }
    assert photos == [(name, seed) for name, seed in catalogue if name not in left_out]


def test_tables_show_mean_spread_and_the_best() -> None:
    table = {"a": {"x": [0.5, 0.7], "y": [0.1, 0.1]}, "b": {"x": [0.2, 0.2]}}
    assert as_markdown("Title", table).splitlines() == [
        "### Title", "", "| | x | y |", "|---|---|---|",
        "| a | **60.0 ± 14.1** | **10.0 ± 0.0** |", "| b | 20.0 ± 0.0 |  |",
    ]  # fmt: skip
