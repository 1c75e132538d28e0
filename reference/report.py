"""Write a run's report: ``python -m reference.report RUN_DIR``.

``report.html`` holds everything in one file; ``masks.png``, ``losses.png`` and ``gallery.png``
lie beside it. What is read is described in `reference.run_files`.
"""

from __future__ import annotations

import argparse
import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from reference.report_curves import loss_curves
from reference.report_pictures import (
    CHIPS,
    Views,
    gallery_sheet,
    mask_sheet,
    photo,
    views_of,
    words_of,
)
from reference.run_files import (
    CONFIG,
    EVALUATION,
    ChangeExamples,
    Evaluation,
    Examples,
    atomic_path,
    load_json,
    load_metrics,
)

_THUMBNAIL = 160


@dataclass(frozen=True)
class _Method:
    """What the page says of a way to pretrain."""

    name: str
    lead: str
    word: str
    """what a chosen word is"""
    title: str
    note: str
    """of the pairs that are shown with their masks"""
    random: str = ""
    """of its figures of masks, where they are not chosen"""


_METHODS = {
    "syncmask": _Method(
        "SyncMask",
        "A momentum teacher picks the words and the image patches that both "
        "modalities share; these are masked, and the model learns to restore them from the other "
        "modality. This is a reconstruction of the method: every number here is this run's own.",
        "masked word",
        "What is masked",
        "The patches that the teacher chose, the image as masked image modelling gets it, and the "
        "scores that the patches were chosen by (bright: high). In the caption, each masked word "
        "is marked.",
    ),
    "sycoca": _Method(
        "SyCoCa",
        "The patches most like the text are rebuilt from it, and the caption is told with the "
        "patches least like it hidden. This is a small version of the method: every number here "
        "is this run's own.",
        "masked word",
        "What is masked",
        "The patches most like a word of the text, which are rebuilt from it; the image without "
        "those least like it, of which the caption is told; and how like a word each patch is "
        "(bright: very). No word is masked.",
    ),
    "simla": _Method(
        "SIMLA",
        "One stack of layers restores masked words from the image and masked patches from the "
        "text, and the image alone must tell the keywords, which the teacher's attention votes "
        "for. This is a small version of the method: every number here is this run's own.",
        "keyword",
        "Keywords and masks",
        "In the caption, the keywords that the teacher's heads voted for are marked. Patches are "
        "masked in random blocks; here is one draw, and the image as masked image modelling gets "
        "it.",
        "Patches are masked in random blocks, which lie in the middle more often than at the rim, "
        "and so do garments.",
    ),
}


def write_report(run_dir: str | Path) -> Path:
    """Write the report of a finished run and return the path of ``report.html``.

    Raises:
        FileNotFoundError: a file of the run is missing.
    """
    run_dir = Path(run_dir)
    evaluation: Evaluation = load_json(run_dir / EVALUATION)
    examples, metrics = Examples.load(run_dir), load_metrics(run_dir)
    config = load_json(run_dir / CONFIG)
    method, views = _METHODS[config["method"]], views_of(config)
    changes = ChangeExamples.load(run_dir) if "text_guided" in evaluation else None
    curves = loss_curves(metrics)
    _save_png(mask_sheet(examples, views, word=method.word), run_dir / "masks.png")
    _save_png(gallery_sheet(examples), run_dir / "gallery.png")
    with atomic_path(run_dir / "losses.png") as temporary:
        temporary.write_bytes(curves)
    page = _environment().get_template("report.html.j2").render(
        config=config,
        method=method,
        evaluation=evaluation,
        data=_data(config),
        last=next((row for row in reversed(metrics) if "seconds" in row), None),
        chips={kind: "rgb({}, {}, {})".format(*colour) for kind, colour in CHIPS.items()},
        words_chosen=bool(examples.token_mask.any()),
        truth_known=bool((examples.token_visible >= 0).any()),
        pairs=[_pair(examples, views, i) for i in range(len(examples.image))],
        curves=_uri(curves, "png"),
        dark_curves=_uri(loss_curves(metrics, dark=True), "png"),
        text_queries=[
            {"text": text, "answers": _answers(map(_thumbnail, images), hits)}
            for text, images, hits in zip(
                examples.gallery_queries, examples.gallery_images, examples.gallery_hits,
                strict=True,
            )
        ],
        image_queries=[
            {"image": _thumbnail(image), "answers": _answers(captions, hits)}
            for image, captions, hits in zip(
                examples.query_images, examples.query_captions, examples.query_hits, strict=True
            )
        ],
        changes=[] if changes is None else [
            {
                "image": _thumbnail(image), "words": words,
                "answers": _answers(map(_thumbnail, answers), hits),
            }
            for image, words, answers, hits in zip(
                changes.references, changes.words, changes.answers, changes.hits, strict=True
            )
        ],
    )  # fmt: skip
    path = run_dir / "report.html"
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _data(config: dict[str, Any]) -> str:
    if config["data"] == "catalogue":
        return f"the drawn catalogue, {config['items']} items in two views"
    return Path(config["data"]).name


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}\u202f%"
    return environment


def _pair(examples: Examples, views: Views, i: int) -> dict[str, Any]:
    return {
        "views": {title: _image_uri(view(examples, i)) for title, view in views.items()},
        "words": words_of(examples, i),
        "caption": examples.captions[i],
    }


def _answers(answers: Iterable[str], hits: Tensor) -> list[tuple[str, bool]]:
    return list(zip(answers, hits.tolist(), strict=True))


def _thumbnail(image: Tensor) -> str:
    return _image_uri(photo(image, _THUMBNAIL))


def _image_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "WEBP", quality=88)
    return _uri(file.getvalue(), "webp")


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _save_png(image: Image.Image, path: Path) -> None:
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reference.report", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of a finished run")
    arguments = parser.parse_args()
    try:
        print(write_report(arguments.run_dir))
    except FileNotFoundError as error:
        parser.error(f"{arguments.run_dir} is not the folder of a finished run: {error}")


if __name__ == "__main__":
    main()
