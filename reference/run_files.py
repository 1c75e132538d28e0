"""The files of a training run: what the trainer writes and the report reads.

A run is a folder:

==========================  ======================================================================
``config.json``             the arguments of the run
``metrics.jsonl``           one object a line: a logged step ``{"step", "loss", "itc", "itm",
                            "mlm", "mim", "seconds", ...}`` (``seconds``: since the start of
                            training; ``broken``: pairs left out since it last began, if any)
                            or an evaluation ``{"step", "eval": Evaluation}``
``evaluation.json``         the final `Evaluation`; ``reference.evaluate`` adds to it
``examples.safetensors``,   the tensors and the texts of an `Examples`
``examples.json``
``changes.safetensors``,    the same of a `ChangeExamples`, where text-guided retrieval was
``changes.json``            evaluated
==========================  ======================================================================

Whole files are written atomically: a reader sees the old content or the new one, whatever kills
the writer. ``metrics.jsonl`` is appended to; a last line torn by a kill is ignored.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypedDict, TypeVar

import torch
from safetensors.torch import load_file, save
from torch import Tensor

CONFIG = "config.json"
METRICS = "metrics.jsonl"
EVALUATION = "evaluation.json"
EXAMPLES = "examples"
CHANGES = "changes"


class Recalls(TypedDict):
    """Share of queries with a hit among the first 1, 5, 10 answers."""

    r1: float
    r5: float
    r10: float


class Chance(TypedDict):
    """What a random ranking would reach, per direction."""

    i2t: Recalls
    t2i: Recalls


class Retrieval(TypedDict):
    """Image to text and text to image retrieval among ``n_images`` and ``n_texts`` candidates."""

    i2t: Recalls
    t2i: Recalls
    chance: Chance
    n_images: int
    n_texts: int


class MaskQuality(TypedDict, total=False):
    """How good the masks are where the truth is known; ``_random``: random masks of equal size.

    - ``words_visible``: share of the masked attribute words that are visible in their view.
    - ``patches_described``: share of the masked patches more than a quarter of which lies on
      described, visible parts.
    - ``details_covered``: share of the area of small described details that the mask covers.
    - ``word_auc``: how often, within a caption, a visible attribute word scores above an invisible
      one; 0.5 by chance.
    """

    words_visible: float
    words_visible_random: float
    patches_described: float
    patches_described_random: float
    details_covered: float
    details_covered_random: float
    word_auc: float


class OneInFew(TypedDict):
    """Retrieval of one right candidate among ``candidates``; see `reference.downstream`."""

    i2t: Recalls
    t2i: Recalls
    chance: Chance
    queries: int
    candidates: int
    same_subcategory: float
    """share of the wrong candidates that share the query's subcategory"""


class RecognitionScores(TypedDict):
    """Accuracy, and the F score averaged over classes."""

    accuracy: float
    macro_f: float


class LabelRecognition(TypedDict):
    """Linear probes of a frozen model, by their input, and guesses."""

    probes: dict[str, RecognitionScores]
    chance: dict[str, RecognitionScores]
    classes: int
    """known to training"""
    unseen: int
    """validation images of other classes"""


class TextGuided(TypedDict):
    """Recall at 1, 5, 10 and 50 of images that differ from a reference as words say."""

    recalls: dict[str, dict[str, float]]
    """by method"""
    chance: dict[str, float]
    changed: list[str]
    """attributes that change"""
    queries: int
    candidates: int


class Evaluation(TypedDict, total=False):
    """``retrieval`` always; ``masks`` only where the data carries a truth (the catalogue).

    The others by ``python -m reference.evaluate``; ``skipped`` says why a task was not evaluated.
    """

    retrieval: Retrieval
    masks: MaskQuality
    one_in_few: OneInFew
    recognition: dict[str, LabelRecognition]
    """by what is recognised"""
    text_guided: TextGuided
    skipped: dict[str, str]


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; replace `path` by it once the body has succeeded.

    The body makes a file or a folder. The content and the rename are flushed to disk. If the body
    raises, `path` is left as it was.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_path(Path(folder) / "a.txt") as temporary:
    ...         _ = temporary.write_text("whole")
    ...     [p.name for p in Path(folder).iterdir()]
    ['a.txt']
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            _flush(written)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def load_json(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def append_metrics(run_dir: str | Path, row: dict[str, Any]) -> None:
    """Append one object to ``metrics.jsonl``."""
    with open(Path(run_dir) / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def load_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl`` (none: no rows); a line torn by a kill is left out."""
    path = Path(run_dir) / METRICS
    if not path.exists():
        return []
    *lines, _torn = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def keep_metrics(run_dir: str | Path, last_step: int) -> None:
    """Drop the rows after `last_step`: a resumed run writes those steps again."""
    rows = [row for row in load_metrics(run_dir) if row["step"] <= last_step]
    with atomic_path(Path(run_dir) / METRICS) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


_Stored = TypeVar("_Stored", bound="Stored")


class Stored:
    """A data class of tensors and texts: ``<stem>.safetensors`` and ``<stem>.json`` of a run."""

    stem: ClassVar[str]

    def save(self, run_dir: str | Path) -> None:
        """Write both files into `run_dir`."""
        values = vars(self)
        tensors = {k: v.detach().cpu().contiguous() for k, v in values.items() if _is_tensor(v)}
        with atomic_path(Path(run_dir) / f"{self.stem}.safetensors") as temporary:
            temporary.write_bytes(save(tensors))
        texts = {k: v for k, v in values.items() if not _is_tensor(v)}
        save_json(Path(run_dir) / f"{self.stem}.json", texts)

    @classmethod
    def load(cls: type[_Stored], run_dir: str | Path) -> _Stored:
        """Read what `save` wrote."""
        values: dict[str, Any] = dict(load_file(Path(run_dir) / f"{cls.stem}.safetensors"))
        return cls(**values, **load_json(Path(run_dir) / f"{cls.stem}.json"))


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


@dataclass
class Examples(Stored):
    """Validation pairs with their masks, and retrieved neighbours: what the report shows.

    `n` pairs, `q` text queries, `m` image queries; `P` patches in row-major order, `T` tokens,
    images `S` x `S`. Every leading size may be 0.
    """

    image: Tensor
    """uint8 [n, 3, S, S]"""
    patch_mask: Tensor
    """bool [n, P], True: chosen"""
    patch_scores: Tensor
    """float32 [n, P]"""
    token_mask: Tensor
    """bool [n, T], True: chosen"""
    token_scores: Tensor
    """float32 [n, T]"""
    token_visible: Tensor
    """int8 [n, T]: 1 the word names something visible in this view, 0 something that is not,
    -1 no attribute word, or not known"""
    gallery_images: Tensor
    """uint8 [q, 5, 3, S, S]: the first images for each text query"""
    gallery_hits: Tensor
    """bool [q, 5]: the image shows the queried item"""
    query_images: Tensor
    """uint8 [m, 3, S, S]: image queries"""
    query_hits: Tensor
    """bool [m, 3]: the caption is the queried item's"""
    tokens: list[list[str]]
    """word pieces of each pair; padding may be left out"""
    captions: list[str]
    gallery_queries: list[str]
    query_captions: list[list[str]]
    """the first three captions for each image query"""

    stem = EXAMPLES

    def __post_init__(self) -> None:
        n, q, m = len(self.image), len(self.gallery_images), len(self.query_images)
        leading = {
            "image": n, "patch_mask": n, "patch_scores": n, "token_mask": n, "token_scores": n,
            "token_visible": n, "tokens": n, "captions": n,
            "gallery_images": q, "gallery_hits": q, "gallery_queries": q,
            "query_images": m, "query_hits": m, "query_captions": m,
        }  # fmt: skip
        for name, size in leading.items():
            if len(getattr(self, name)) != size:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, its group has {size}"
                )


@dataclass
class ChangeExamples(Stored):
    """Text-guided queries and what a model answers: what the report shows of them."""

    references: Tensor
    """uint8 [n, 3, S, S]"""
    answers: Tensor
    """uint8 [n, 5, 3, S, S]: the first images for each query"""
    hits: Tensor
    """bool [n, 5]"""
    words: list[str]
    """what is to change"""

    stem = CHANGES
