"""Options of the downstream tasks, and which keys of a data set's records they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

TASKS = ("retrieval", "recognition", "text_guided")


class Layout(NamedTuple):
    """Which keys of the records say what."""

    labels: Sequence[str]
    """what recognition tells apart"""
    subcategory: str
    """where the wrong candidates of 1-in-101 retrieval come from"""
    changed: Sequence[str]
    """attributes that a text asks to change"""
    kept: Sequence[str]
    """attributes that stay when another changes"""


CATALOGUE = Layout(("type", "colour", "pattern"), "type", ("colour", "pattern"), ("type", "view"))
"""Of the drawn catalogue. Its small details are ignored: garments that agree in all of them, too,
are rare."""
PHOTOS = Layout(
    ("category", "article_type"), "article_type", ("colour",), ("gender", "article_type")
)
"""Of the photos: category and subcategory, and "the same in red". Season and usage are ignored: an
image does not show them."""
FASHIONGEN = Layout(
    ("category", "subcategory"), "subcategory", ("colour",), ("gender", "subcategory")
)
"""Of FashionGen, which names no colours apart from its texts: no query can be built of them."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class DownstreamConfig:
    """The options of ``python -m reference.evaluate``."""

    task: list[str] = field(
        default_factory=lambda: list(TASKS), metadata={"help": f"Any of: {', '.join(TASKS)}."}
    )
    weights: Literal["teacher", "model"] = _option(
        "teacher", "Whose weights; results of the model's are printed, but not kept with the run."
    )
    labels: list[str] | None = field(
        default=None, metadata={"help": "Keys of the records to recognise."}
    )
    subcategory: str | None = _option(None, "Key of the records: wrong candidates share it.")
    changed: list[str] | None = field(
        default=None, metadata={"help": "Keys of the records that a text asks to change."}
    )
    kept: list[str] | None = field(
        default=None, metadata={"help": "Keys of the records that stay when one changes."}
    )
    negatives: int = _option(100, "Wrong candidates of a query in 1-in-101 retrieval.")
    item_queries: int = _option(1000, "At most so many items are queries of 1-in-101 retrieval.")
    changes: int = _option(2000, "At most so many text-guided queries are asked.")
    head_steps: int = _option(300, "Steps of the head of text-guided retrieval; 0: no head.")
    head_batch: int = _option(256, "Queries of a step of the head.")
    head_learning_rate: float = _option(1e-3, "Of the head.")
    task_seed: int = _option(0, "Of candidates, queries and the head.")

    def __post_init__(self) -> None:
        unknown = sorted(set(self.task) - set(TASKS))
        if unknown:
            raise ValueError(f"task must be among {', '.join(TASKS)}, got {', '.join(unknown)}")
        for name in ("negatives", "item_queries", "changes", "head_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.head_steps < 0:
            raise ValueError(f"head_steps must be at least 0, got {self.head_steps}")

    def layout(self, kind: str) -> Layout:
        """The keys to read: what is given here, else those of the kind of data (`kind_of`)."""
        known = {"catalogue": CATALOGUE, "fashiongen": FASHIONGEN}.get(kind, PHOTOS)
        given = {name: getattr(self, name) for name in Layout._fields}
        return known._replace(**{name: keys for name, keys in given.items() if keys is not None})
