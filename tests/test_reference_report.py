"""The files of a run and the report made of them."""

import os
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from reference import report, report_curves
from reference.report_curves import loss_curves
from reference.report_pictures import (
    OUTLINE,
    chosen_view,
    gallery_sheet,
    heat_view,
    mask_sheet,
    masked_view,
    photo,
    views_of,
    words_of,
)  # fmt: skip
from reference.run_files import (
    CONFIG,
    EVALUATION,
    METRICS,
    ChangeExamples,
    Examples,
    append_metrics,
    atomic_path,
    keep_metrics,
    load_json,
    load_metrics,
    save_json,
)  # fmt: skip

RECALLS = {"r1": 0.125, "r5": 0.5, "r10": 0.75}
CHANCE = {"r1": 0.001, "r5": 0.005, "r10": 0.0125}
RETRIEVAL = {
    "i2t": RECALLS, "t2i": {**RECALLS, "r10": 0.875}, "chance": {"i2t": CHANCE, "t2i": CHANCE},
    "n_images": 321, "n_texts": 123,
}  # fmt: skip
MASKS = {
    "words_visible": 0.711, "words_visible_random": 0.661,
    "patches_described": 0.722, "patches_described_random": 0.402,
    "details_covered": 0.613, "details_covered_random": 0.253, "word_auc": 0.803,
}  # fmt: skip
DOWNSTREAM = {
    "one_in_few": {
        "i2t": RECALLS, "t2i": {**RECALLS, "r5": 0.511}, "queries": 77, "candidates": 66,
        "same_subcategory": 0.444, "chance": {"i2t": CHANCE, "t2i": {**CHANCE, "r5": 0.076}},
    },
    "recognition": {"article_type": {
        "probes": {
            "image": {"accuracy": 0.631, "macro_f": 0.391},
            "text": {"accuracy": 0.876, "macro_f": 0.727},
        },
        "chance": {
            "most_frequent": {"accuracy": 0.177, "macro_f": 0.006},
            "uniform": {"accuracy": 0.014, "macro_f": 0.012},
        },
        "classes": 72, "unseen": 1,
    }},
    "text_guided": {
        "recalls": {"sum": {"r1": 0.091, "r10": 0.414}, "text": {"r1": 0.033, "r10": 0.166}},
        "chance": {"r1": 0.004, "r10": 0.035},
        "changed": ["colour", "main_pattern"], "queries": 961, "candidates": 1003,
    },
    "skipped": {"one_in_few": "3 of 9 records have no 'size'"},
}  # fmt: skip


def make_examples(pairs=2, queries=1, **changes) -> Examples:
    generator = torch.Generator().manual_seed(0)

    def images(*shape):
        return torch.randint(256, (*shape, 3, 16, 16), generator=generator, dtype=torch.uint8)

    tokens = ["[CLS]", "red", "tro", "##users", "with", "badge", "[SEP]"]
    values = {
        "image": images(pairs),
        "patch_mask": torch.arange(16).repeat(pairs, 1) % 3 == 0,
        "patch_scores": torch.rand(pairs, 16, generator=generator),
        "token_mask": torch.tensor([[0, 1, 0, 1, 1, 0, 0, 0]] * pairs).view(pairs, 8).bool(),
        "token_scores": torch.rand(pairs, 8, generator=generator),
        "token_visible": torch.tensor([[-1, 1, 0, 0, -1, 0, -1, -1]] * pairs)
        .view(pairs, 8)
        .to(torch.int8),
        "gallery_images": images(queries, 5),
        "gallery_hits": torch.tensor([[True, False, False, True, False]] * queries).view(-1, 5),
        "query_images": images(queries),
        "query_hits": torch.tensor([[False, True, False]] * queries).view(-1, 3),
        "tokens": [tokens] * pairs,
        "captions": ["red trousers with badge"] * pairs,
        "gallery_queries": ["a <b>bold</b> & red bag"] * queries,
        "query_captions": [["first", "second", "third"]] * queries,
    }
    return Examples(**{**values, **changes})


SYCOCA = {"method": "sycoca", "high_ratio": 0.5, "low_ratio": 0.25}
LOSSES = {"itc": 0.4, "itm": 0.7, "mlm": 0.5, "mim": 0.2}


def make_run(folder, examples, evaluation, steps=30, method="syncmask", losses=LOSSES):
    examples.save(folder)
    options = {
        "data": "catalogue", "items": 40, "batch_size": 48, "note": "<script>", "method": method,
    }  # fmt: skip
    options = SYCOCA | options
    save_json(folder / CONFIG, options)
    save_json(folder / EVALUATION, evaluation)
    for step in range(10, steps + 1, 10):
        append_metrics(folder, {"step": step, "loss": 9 / step, **losses, "seconds": 6.0 * step})
    if steps:
        append_metrics(folder, {"step": steps, "eval": evaluation})
    return folder


def test_atomic_path_keeps_the_old_file_when_writing_fails(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fail_halfway():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        fail_halfway()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_metrics_survive_a_torn_line_and_are_cut_on_resume(tmp_path):
    assert load_metrics(tmp_path) == []
    rows = [{"step": step, "loss": 1 / 3 + step} for step in (10, 20, 30)]
    for row in rows:
        append_metrics(tmp_path, row)
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"step": 40, "lo')
    assert load_metrics(tmp_path) == rows
    keep_metrics(tmp_path, 20)
    append_metrics(tmp_path, {"step": 30, "loss": 0.5})
    assert load_metrics(tmp_path) == [*rows[:2], {"step": 30, "loss": 0.5}]


def test_examples_round_trip(tmp_path):
    examples = make_examples()
    examples.save(tmp_path)
    restored = Examples.load(tmp_path)
    for name, value in vars(examples).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(restored, name), value)
            assert getattr(restored, name).dtype == value.dtype
        else:
            assert getattr(restored, name) == value


def test_examples_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="captions has 1 entries, its group has 2"):
        make_examples(captions=["one"])
    with pytest.raises(ValueError, match="gallery_queries has 2 entries, its group has 1"):
        make_examples(gallery_queries=["a", "b"])


def test_words_join_their_pieces_and_tell_what_is_visible():
    words = [(word.text, word.kind) for word in words_of(make_examples(), 0)]
    assert words == [
        ("red", "seen"), ("trousers", "unseen"), ("with", "masked"), ("badge", "absent"),
    ]  # fmt: skip
    first_piece_only = torch.tensor([[0, 0, 1, 0, 0, 0, 0, 0]] * 2).bool()
    (word,) = [w for w in words_of(make_examples(token_mask=first_piece_only), 0) if "tr" in w.text]
    assert word.kind == "unseen"
    unknown = make_examples(token_visible=torch.full((2, 8), -1, dtype=torch.int8))
    kinds = [word.kind for word in words_of(unknown, 0)]
    assert kinds == ["masked", "masked", "masked", "plain"]


@pytest.fixture
def corner():
    """A colourful image of 4 x 4 patches with patch 3, in the top right corner, chosen."""
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    image[0] = 200
    mask = torch.zeros(16, dtype=torch.bool)
    mask[3] = True
    area = np.zeros((256, 256), dtype=bool)
    area[:64, 192:] = True
    return image, mask, area


def test_chosen_patches_keep_their_colour_and_get_a_rim(corner):
    image, mask, area = corner
    view = np.asarray(chosen_view(image, mask)).astype(int)
    assert (view[20:40, 210:230] == (200, 0, 0)).all()
    assert np.ptp(view[~area], axis=-1).max() == 0
    assert (view[63, 192:] == OUTLINE).all()
    assert (view[:64, 255] == OUTLINE).all()


def test_the_masked_view_hides_the_chosen_patches_only(corner):
    image, mask, area = corner
    view = np.asarray(masked_view(image, mask))
    assert (view[~area] == (200, 0, 0)).all()
    assert (view[area] != (200, 0, 0)).any(-1).all()


def test_heat_is_brightest_at_the_best_patch(corner):
    image, mask, _ = corner
    for scores in (mask.float(), mask.float().double() - 5):
        heat = np.asarray(heat_view(image, scores).convert("L")).reshape(4, 64, 4, 64)
        assert heat.mean((1, 3)).argmax() == 3
    heat_view(image, torch.full((16,), float("nan")))
    with pytest.raises(ValueError, match="15 patches"):
        heat_view(image, torch.zeros(15))


class Page(HTMLParser):
    """Collects the tags, the sources and the text of a page, and checks that tags close."""

    VOID = frozenset({"meta", "img", "source", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.sources, self.classes, self.text, self.open = [], [], [], "", []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.sources += [values[k] for k in ("src", "srcset", "href") if k in values]
        self.classes += (values.get("class") or "").split()
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


FILES = ("report.html", "masks.png", "losses.png", "gallery.png")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The folder of a reported run on drawn data."""
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, make_examples(), {"retrieval": RETRIEVAL, "masks": MASKS})
    assert report.write_report(folder) == folder / "report.html"
    return folder


def read_page(run) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


def test_report_of_a_drawn_catalogue(drawn):
    page = read_page(drawn)
    for figure in (12.5, 50, 75, 87.5, 0.1, 0.5, 1.2, 71.1, 66.1, 72.2, 40.2, 61.3, 25.3, 80.3):
        assert f"{figure:.1f}\u202f%" in page.text
    assert "321 validation images, 123 texts" in page.text
    assert "3.0 min" in page.text
    assert "30 steps of 48 pairs" in page.text
    # Words of two pairs, and one of each kind in the legend.
    for kind in ("seen", "unseen", "masked", "absent"):
        assert page.classes.count(kind) == 3
    # Two images and one text are hits.
    assert page.classes.count("hit") == 3
    # Four views of two pairs, five answers, one query, the curves.
    assert page.tags.count("img") == 2 * 4 + 5 + 1 + 1


def test_report_is_self_contained_and_escapes_texts(drawn):
    page = read_page(drawn)
    assert page.sources
    assert all(source.startswith("data:image/") for source in page.sources)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.tags.count("b") == page.classes.count("fact")
    assert "a <b>bold</b> & red bag" in page.text
    assert "url(" not in (drawn / "report.html").read_text(encoding="utf-8")


def test_pictures_beside_the_report(drawn):
    for name in FILES[1:]:
        with Image.open(drawn / name) as image:
            assert image.format == "PNG"
            assert image.width > 600
            assert len(image.getcolors(1 << 24)) > 50
    assert not list(drawn.glob(".*"))


def test_command_line_repeats_the_report(drawn, capsys, monkeypatch):
    first = [(drawn / name).read_bytes() for name in FILES]
    monkeypatch.setattr("sys.argv", ["report", str(drawn)])
    report.main()
    assert capsys.readouterr().out.strip() == str(drawn / "report.html")
    assert first == [(drawn / name).read_bytes() for name in FILES]


def test_command_line_tells_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit):
        report.main()
    error = capsys.readouterr().err
    assert "not the folder of a finished run" in error
    assert EVALUATION in error


def test_report_of_photos_has_no_truth(tmp_path):
    unknown = torch.full((2, 8), -1, dtype=torch.int8)
    run = make_run(tmp_path, make_examples(token_visible=unknown), {"retrieval": RETRIEVAL})
    report.write_report(run)
    page = read_page(run)
    assert "Mask quality" not in page.text
    assert "visible" not in page.text
    assert page.classes.count("masked") == 1 + 2 * 3
    assert not {"seen", "unseen", "absent"} & set(page.classes)


def test_report_of_a_run_without_steps_or_examples(tmp_path):
    run = make_run(tmp_path, make_examples(0, 0), {"retrieval": RETRIEVAL}, steps=0)
    report.write_report(run)
    page = read_page(run)
    assert page.tags.count("img") == 1
    assert "What is masked" not in page.text


def test_report_of_downstream_tasks(tmp_path):
    run = make_run(tmp_path, make_examples(), {"retrieval": RETRIEVAL, **DOWNSTREAM})
    generator = torch.Generator().manual_seed(0)
    ChangeExamples(
        references=torch.randint(256, (2, 3, 16, 16), generator=generator, dtype=torch.uint8),
        answers=torch.randint(256, (2, 5, 3, 16, 16), generator=generator, dtype=torch.uint8),
        hits=torch.tensor([[False, True, False, False, False], [True, False, False, False, True]]),
        words=["Navy Blue", "<i>"],
    ).save(run)
    report.write_report(run)
    page = read_page(run)
    figures = (51.1, 7.6, 44.4, 63.1, 39.1, 87.6, 72.7, 17.7, 0.6, 1.4, 9.1, 41.4, 3.3, 16.6, 3.5)
    for figure in figures:
        assert f"{figure:.1f}\u202f%" in page.text
    for text in (
        "one in 66", "77 items", "Article type", "72 classes", "961 queries", "all 1003 others",
        "colour or its main pattern", "but navy blue", "but <i>",
        "Not evaluated: one in few. 3 of 9 records have no 'size'.",
    ):  # fmt: skip
        assert " ".join(text.split()) in " ".join(page.text.split())
    assert "Composed by a head" not in page.text
    # Three more answers are right than without the task.
    assert page.classes.count("hit") == 3 + 3


@pytest.mark.parametrize(
    ("method", "name", "losses"),
    [("sycoca", "SyCoCa", ["itc", "caption", "mim"]), ("simla", "SIMLA", [*LOSSES, "keywords"])],
)
def test_report_of_other_methods(tmp_path, method, name, losses):
    masks = {key: value for key, value in MASKS.items() if not key.startswith("words")}
    nothing = torch.zeros(2, 8, dtype=torch.bool)
    examples = make_examples(**({"token_mask": nothing} if method == "sycoca" else {}))
    evaluation = {"retrieval": RETRIEVAL, "masks": masks}
    logged = dict.fromkeys(losses, 0.5) | {"broken": 7}
    run = make_run(tmp_path, examples, evaluation, method=method, losses=logged)
    report.write_report(run)
    page = read_page(run)
    assert f"{name} pretraining" in page.text
    assert "SyncMask" not in page.text
    assert "the drawn catalogue, 40 items" in page.text
    views = {"sycoca": "For the captioner", "simla": "Random blocks"}
    for other, view in views.items():
        assert (view in page.text) == (other == method)
    assert "7Broken pairs met" in page.text
    assert ("keyword, visible in this view" in page.text) == (method == "simla")
    assert ("seen" in page.classes) == (method == "simla")


def test_curves_show_every_logged_loss(monkeypatch):
    titles = []

    def style(axis, title, *colours):
        titles.append(title)

    monkeypatch.setattr(report_curves, "_style", style)
    rows = [{"step": 1, "loss": 2.0, "itc": 1.0, "caption": 1.0, "seconds": 3.0}]
    loss_curves(rows)
    assert titles[:3] == ["Total loss", "ITC: image-text contrast", "Captioning: next word"]
    assert titles[3:] == ["Recall at 10, validation"]
    loss_curves([*rows, {"step": 1, "eval": {"retrieval": RETRIEVAL, "masks": MASKS}}])
    assert titles[-2:] == ["Recall at 10, validation", "Masks, validation"]


def test_the_captioner_does_not_see_what_is_least_like_the_text():
    examples = make_examples(1)
    examples.patch_scores[0] = torch.arange(16)
    views = views_of(SYCOCA)
    assert list(views) == [
        "Image",
        "Patches to rebuild",
        "For the captioner",
        "Likeness to the text",
    ]
    image, seen = (np.asarray(views[name](examples, 0)) for name in ("Image", "For the captioner"))
    assert np.array_equal(image[64:], seen[64:])  # four patches, of 64 pixels, are a row
    assert (image[:64] != seen[:64]).any(-1).all()


def test_sheets_hold_every_pair_and_frame_hits_green():
    examples = make_examples(3, 2)
    views = views_of({"method": "simla"})
    assert mask_sheet(examples, views).height > mask_sheet(make_examples(2), views).height
    assert mask_sheet(examples, views).width < mask_sheet(examples, views | views_of(SYCOCA)).width
    sheet = np.asarray(gallery_sheet(examples, side=64)).astype(int)
    green = (sheet == (46, 158, 91)).all(-1).sum()
    frame = 65 * 65 - 53 * 53
    assert green == 2 * 2 * frame
    small = np.asarray(photo(examples.gallery_images[0, 0], 64))
    assert any(
        np.array_equal(sheet[y + 10 : y + 50, 46:86], small[10:50, 10:50])
        for y in range(sheet.shape[0] - 64)
    )


def test_curves_of_a_diverged_run():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}]
    light, dark = loss_curves(rows), loss_curves(rows, dark=True)
    assert light.startswith(b"\x89PNG")
    assert light != dark


def test_json_is_readable_and_whole(tmp_path):
    save_json(tmp_path / "a.json", {"é": [1, 2.5]})
    assert load_json(tmp_path / "a.json") == {"é": [1, 2.5]}
