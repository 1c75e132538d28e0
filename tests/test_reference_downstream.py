"""Retrieval, recognition and text-guided retrieval of the reference's models."""

from __future__ import annotations

import json
import shutil
from math import comb
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from reference import evaluate as evaluation
from reference import pretrain as pretraining
from reference.config import PretrainConfig
from reference.data import load_data
from reference.downstream.config import CATALOGUE, PHOTOS, DownstreamConfig
from reference.downstream.features import Encodings, Features, features
from reference.downstream.recall import chance
from reference.downstream.recognition import recognise
from reference.downstream.records import MissingRecords
from reference.downstream.retrieval import one_in_few
from reference.downstream.text_guided import Asked, build_changes, text_guided, train_head
from reference.evaluate import main
from reference.methods import METHODS
from reference.pretrain import build, pretrain
from reference.run_files import ChangeExamples, load_json

TINY: dict[str, Any] = {
    "image_size": 16, "patch_size": 8, "width": 16, "heads": 2, "image_layers": 1,
    "fusion_layers": 1, "projection": 8, "items": 30, "batch_size": 16, "steps": 30,
    "random_mask_steps": 4, "warmup_steps": 2, "eval_every": 100,
}  # fmt: skip
TASKS = {"one_in_few", "recognition", "text_guided", "skipped"}


def test_chance_of_a_random_ranking() -> None:
    found = chance(torch.tensor([1, 3]), 8, (1, 5, 10))
    for k in (1, 5):
        expected = [1 - comb(8 - p, k) / comb(8, k) for p in (1, 3)]
        assert found[f"r{k}"] == pytest.approx(sum(expected) / 2)
    assert found["r10"] == 1


SUBCATEGORIES = [f"sub{item % 3}" for item in range(30) for _ in range(2)]
ITEMS = torch.arange(30).repeat_interleave(2)


def rivals() -> tuple[Tensor, Tensor]:
    """Features by which any other item of the subcategory beats the own one, and no other does."""
    images = torch.eye(30)
    alike = torch.arange(30)[:, None] % 3 == torch.arange(30) % 3
    texts = F.normalize(alike.float() - torch.eye(30), dim=1)
    return images.repeat_interleave(2, dim=0), texts.repeat_interleave(2, dim=0)


@pytest.mark.parametrize(
    ("negatives", "rank", "share"), [(9, 9, 1), (12, 12, 0.75), (99, 29, 9 / 29)]
)
def test_one_in_few_ranks_among_the_own_subcategory(
    negatives: int, rank: int, share: float
) -> None:
    found = one_in_few(*rivals(), ITEMS, SUBCATEGORIES, negatives=negatives, queries=20)
    assert (found["queries"], found["candidates"]) == (20, rank + 1)
    assert found["same_subcategory"] == pytest.approx(share)
    # All wrong candidates are as similar as the right one, or more: they go before it.
    assert found["i2t"] == found["t2i"] == {"r1": 0, "r5": 0, "r10": float(rank < 10)}
    assert found["chance"]["t2i"]["r5"] == pytest.approx(5 / (rank + 1))


def test_one_in_few_of_a_perfect_model_and_its_seed() -> None:
    images = torch.eye(30).repeat_interleave(2, dim=0)
    assert one_in_few(images, images, ITEMS, SUBCATEGORIES)["i2t"]["r1"] == 1
    torch.manual_seed(0)
    noisy = F.normalize(images + 0.5 * torch.randn(60, 30), dim=1)
    first, again, other = (
        one_in_few(images, noisy, ITEMS, SUBCATEGORIES, negatives=5, seed=seed)
        for seed in (0, 0, 1)
    )
    assert first == again != other


RECORDS = [
    {"type": kind, "colour": colour, "pattern": pattern, "image": str(copy)}
    for kind, colour, pattern, copies in [
        ("bag", "red", "plain", 2), ("bag", "blue", "plain", 1), ("bag", "blue", "striped", 1),
        ("shirt", "red", "plain", 1), ("shirt", "blue", "striped", 1),
        ("hat", "red", "plain", 2), ("hat", "green", "plain", 1),
    ]
    for copy in range(copies)
]  # fmt: skip


def test_changes_differ_from_their_reference_in_one_attribute() -> None:
    names = ("colour", "pattern", "type")
    asked = set()
    for seed in range(20):
        found = build_changes(RECORDS, names[:2], names[2:], seed=seed)
        for row, word, wanted in zip(found.reference, found.words, found.wanted, strict=True):
            right = (found.groups == wanted).nonzero().flatten().tolist()
            assert right
            for answer in right:
                (changed,) = (n for n in names if RECORDS[answer][n] != RECORDS[row][n])
                assert RECORDS[answer][changed] == word
                assert changed != "type"
            asked.add((int(row), word))
    # No shirt has an answer; a plain blue bag has two.
    assert {row for row, _ in asked} == {0, 1, 2, 3, 6, 7, 8}
    assert {word for row, word in asked if row == 2} == {"red", "striped"}
    few = build_changes(RECORDS, ["colour"], ["type"], seed=0, limit=2)
    assert len(few.words) == len(few.reference) == len(few.wanted) == 2
    assert len(few.groups) == len(RECORDS)


def test_changes_say_what_records_lack() -> None:
    with pytest.raises(MissingRecords, match=r"9 of 9 records have no 'size' \(there are: colour,"):
        build_changes(RECORDS, ["size"], ["type"], seed=0)
    with pytest.raises(MissingRecords, match="1 of 10 records have no 'colour'"):
        build_changes([*RECORDS, {"type": "bag"}], ["colour"], ["type"], seed=0)
    with pytest.raises(MissingRecords, match="no two images differ in just one of colour, image"):
        build_changes(RECORDS[:1], ["colour"], ["image"], seed=0)


def test_the_head_learns_to_take_the_new_colour_and_keep_the_type() -> None:
    """The words' features say nothing to the images', so that the sum keeps the old colour."""
    torch.manual_seed(0)
    colours, types = torch.randint(4, (200,)), torch.randint(4, (200,))
    records = [{"colour": f"c{c}", "type": f"t{t}"} for c, t in zip(colours, types, strict=True)]
    changes = build_changes(records, ["colour"], ["type"], seed=0)
    image = torch.cat([F.one_hot(colours, 4), F.one_hot(types, 4), 0 * F.one_hot(types, 4)], dim=1)
    image = F.normalize(image.float(), dim=1)
    text = F.one_hot(torch.tensor([8 + int(word[1:]) for word in changes.words]), 12).float()
    reference = image[changes.reference]
    query = Features(reference, text, torch.zeros_like(text), reference, text)
    asked = Asked(changes, query, image)

    def right(queries: Tensor) -> float:
        found = changes.groups[(queries @ image.T).argmax(dim=1)]
        return (found == changes.wanted).double().mean().item()

    head = train_head(asked, DownstreamConfig(head_steps=60))
    assert right(reference + text) < 0.5
    assert right(head(query)) > 0.95
    torch.testing.assert_close(
        train_head(asked, DownstreamConfig(head_steps=0))(query), F.normalize(reference + text)
    )
    again = train_head(asked, DownstreamConfig(head_steps=60))
    assert torch.equal(again(query), head(query))


COLOURS = {"Red": (220, 30, 30), "Green": (30, 160, 40), "Navy Blue": (20, 20, 120)}


def write_photos(folder: Path) -> None:
    """Squares and bars in three colours."""
    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, count in (("train", 60), ("val", 24)):
        lines = []
        for i in range(count):
            colour = list(COLOURS)[i % 3]
            article, category = [("Shirts", "Apparel"), ("Belts", "Accessories")][i // 3 % 2]
            pixels = np.full((16, 16, 3), 255, np.uint8)
            top = 6 if article == "Belts" else 2
            pixels[top : 16 - top, 2:14] = COLOURS[colour] + random.integers(-9, 9, 3)
            name = f"images/{split}{i}.png"
            Image.fromarray(pixels).save(folder / name)
            record = {"image": name, "caption": f"{colour} {article} {i}", "gender": "Men",
                      "category": category, "article_type": article, "colour": colour}  # fmt: skip
            lines.append(json.dumps(record))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))


def test_text_guided_recall_against_brute_force(tmp_path: Path) -> None:
    write_photos(tmp_path)
    data = load_data(tmp_path, image_size=16)
    model = build(PretrainConfig(**TINY), data.tokenizer).teacher
    config = DownstreamConfig(head_steps=0, changes=20)
    found, shown = text_guided(Encodings(model, data), PHOTOS, config)
    assert set(found["recalls"]) == {"image", "text", "sum"}
    asked = build_changes(data.val.records, PHOTOS.changed, PHOTOS.kept, seed=0, limit=20)
    images = features(model, data.val, data.tokenizer, "images").image_features
    query = features(model, data.val, data.tokenizer, "queries", asked.reference, asked.words)
    ranks: dict[str, list[int]] = {"image": [], "text": [], "sum": []}
    by_chance = []
    for row, reference in enumerate(asked.reference.tolist()):
        right = asked.groups == asked.wanted[row]
        features_of = {"image": query.image_features[row], "text": query.text_features[row]}
        features_of["sum"] = sum(features_of.values())
        for name, feature in features_of.items():
            order = [i for i in (images @ feature).argsort(descending=True) if i != reference]
            ranks[name].append(min(rank for rank, i in enumerate(order) if right[i]))
        by_chance.append(1 - comb(23 - int(right.sum()), 5) / comb(23, 5))
    for name, values in ranks.items():
        for k in (1, 5, 10, 50):
            assert found["recalls"][name][f"r{k}"] == sum(rank < k for rank in values) / 20
    assert found["chance"]["r5"] == pytest.approx(sum(by_chance) / 20)
    assert found["queries"] == 20
    assert torch.equal(shown.references[-1], data.val.images[asked.reference[-1]])
    answers = [(data.val.images == answer).flatten(1).all(1) for answer in shown.answers[-1]]
    right = asked.groups == asked.wanted[-1]
    assert shown.hits[-1].tolist() == [bool(right[answer].any()) for answer in answers]


def encodings(train: Features, val: Features, labels: tuple[list[str], list[str]]) -> Encodings:
    splits = (SimpleNamespace(records=[{"kind": name} for name in names]) for names in labels)
    found = Encodings(
        model=None, data=SimpleNamespace(**dict(zip(("train", "val"), splits, strict=True)))
    )
    found.__dict__.update(train=train, val=val)
    return found


def test_probes_recognise_what_their_input_tells() -> None:
    torch.manual_seed(0)
    kinds = torch.arange(300) % 4
    labels = [["bag", "bag", "cap", "sock"][kind] for kind in kinds]
    telling, noise = F.one_hot(kinds, 4) + 0.1 * torch.randn(300, 4), torch.randn(300, 4)
    train = Features(telling, noise, noise + telling, noise, noise)
    val = Features(*(part[:90] for part in train))
    # 46 bags, 22 caps, and 22 hats that look like socks.
    names = [{"sock": "hat"}.get(label, label) for label in labels[:90]]
    found = recognise(encodings(train, val, (labels, names)), "kind")
    assert set(found["probes"]) == {"image", "text", "fused"}
    assert found["probes"]["image"]["accuracy"] == pytest.approx(68 / 90)
    accuracies = [found["probes"][kind]["accuracy"] for kind in ("text", "fused", "image")]
    assert accuracies == sorted(set(accuracies))
    assert found["probes"]["image"]["macro_f"] == pytest.approx(2 / 3)
    assert found["probes"]["text"]["accuracy"] < 0.6
    assert found["chance"]["most_frequent"]["accuracy"] == pytest.approx(46 / 90)
    assert found["chance"]["uniform"]["accuracy"] == pytest.approx(68 / 90 / 3, abs=0.02)
    assert (found["classes"], found["unseen"]) == (3, 22)


def test_fused_features_of_every_method_see_image_and_text() -> None:
    data = load_data(items=2, image_size=16)
    rows = torch.tensor([0, 1, 2])
    captions = [data.val.captions[row] for row in rows]
    for method in METHODS:
        model = build(PretrainConfig(**TINY, method=method), data.tokenizer).teacher
        plain = features(model, data.val, data.tokenizer, "pairs", rows)
        words = features(model, data.val, data.tokenizer, "pairs", rows, ["red", "a", "blue bag"])
        other = features(model, data.val, data.tokenizer, "pairs", rows + 5, captions)
        assert torch.equal(plain.image, words.image)
        assert not torch.equal(plain.text, words.text)
        assert ((plain.fused - words.fused).abs().amax(dim=1) > 1e-4).all()
        assert ((plain.fused - other.fused).abs().amax(dim=1) > 1e-4).all()


@pytest.fixture(scope="module")
def photo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on photos, evaluated."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder / "data")
    options = TINY | {"data": str(folder / "data"), "output": str(folder / "run")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "write_report", lambda run: run)
        pretrain(PretrainConfig(**options))
    main([str(folder / "run"), "--head_steps", "100"])
    return folder / "run"


def test_photos_are_evaluated_and_reported(photo_run: Path) -> None:
    found = load_json(photo_run / "evaluation.json")
    assert set(found) == {"retrieval", *TASKS}
    assert found["skipped"] == {}
    assert set(found["recognition"]) == {"category", "article_type"}
    image = found["recognition"]["article_type"]["probes"]["image"]
    assert image["accuracy"] == 1  # a bar or a square
    guided = found["text_guided"]
    assert (guided["changed"], guided["queries"], guided["candidates"]) == (["colour"], 24, 23)
    assert guided["recalls"]["head"]["r5"] > guided["chance"]["r5"] + 0.2
    assert set(ChangeExamples.load(photo_run).words) <= set(COLOURS)
    page = (photo_run / "report.html").read_text()
    for text in ("Article type", "one in 24", "the same, but navy blue", "Words alone"):
        assert text in page


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "write_report", lambda run: run)


def test_a_task_alone_leaves_the_others(
    photo_run: Path, no_report: None, capsys: pytest.CaptureFixture
) -> None:
    before = load_json(photo_run / "evaluation.json")
    main([str(photo_run), "--task", "recognition", "--labels", "colour"])
    printed = json.loads(capsys.readouterr().out)
    after = load_json(photo_run / "evaluation.json")
    assert set(printed) == {"recognition", "skipped"}
    assert set(printed["recognition"]) == {"colour"}
    assert after == before | {"recognition": printed["recognition"]}
    main([str(photo_run), "--task", "text_guided", "--head_steps", "100"])
    assert load_json(photo_run / "evaluation.json") == after  # deterministic


def test_a_finished_run_that_is_resumed_keeps_its_results(photo_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(photo_run, run)
    before = load_json(run / "evaluation.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "write_report", lambda run: run)
        pretraining.main(["--output", str(run), "--resume"])
        assert load_json(run / "evaluation.json") == before
        pretraining.main(["--output", str(run), "--resume", "--steps", "31"])
    assert set(load_json(run / "evaluation.json")) == {"retrieval"}  # others were of step 30


def test_results_of_the_student_are_not_kept(photo_run: Path) -> None:
    before = (photo_run / "evaluation.json").read_bytes()
    main([str(photo_run), "--weights", "model", "--head_steps", "0", "--task", "text_guided"])
    assert (photo_run / "evaluation.json").read_bytes() == before


def test_missing_records_skip_their_task_only(
    photo_run: Path, no_report: None, capsys: pytest.CaptureFixture
) -> None:
    main([str(photo_run), "--subcategory", "size", "--changed", "cut", "--labels", "category"])
    why = load_json(photo_run / "evaluation.json")["skipped"]
    assert set(why) == {"one_in_few", "text_guided"}
    assert "24 of 24 records have no 'size' (there are: article_type" in why["one_in_few"]
    assert "skipped text_guided: 24 of 24 records have no 'cut'" in capsys.readouterr().err


def test_the_drawn_catalogue_has_all_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(pretraining, "write_report", lambda run: run)
    pretrain(PretrainConfig(**TINY, output=str(run), method="sycoca"))
    assert "words_visible" not in load_json(run / "evaluation.json")["masks"]
    main([str(run), "--head_steps", "5"])
    found = load_json(run / "evaluation.json")
    assert set(found) == {"retrieval", "masks", *TASKS}
    assert found["skipped"] == {}
    assert set(found["recognition"]) == set(CATALOGUE.labels)
    assert found["one_in_few"]["candidates"] == 50  # as many items as there are
    assert "SyCoCa pretraining" in (run / "report.html").read_text()


def test_layouts_and_options() -> None:
    assert DownstreamConfig().layout("catalogue") == CATALOGUE
    assert DownstreamConfig().layout("fashiongen").subcategory == "subcategory"
    given = DownstreamConfig(changed=["gender"], subcategory="category").layout("photos")
    assert given == PHOTOS._replace(changed=["gender"], subcategory="category")
    with pytest.raises(ValueError, match=r"task must be among .*, got captioning"):
        DownstreamConfig(task=["captioning"])
    with pytest.raises(ValueError, match="negatives must be at least 1, got 0"):
        DownstreamConfig(negatives=0)
    with pytest.raises(ValueError, match="head_steps must be at least 0, got -1"):
        DownstreamConfig(head_steps=-1)


def test_a_run_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no checkpoint"):
        main([str(tmp_path)])
