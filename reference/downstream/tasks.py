"""All downstream tasks of one model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from reference.downstream.config import DownstreamConfig, Layout
from reference.downstream.features import Encodings
from reference.downstream.recognition import recognise
from reference.downstream.records import MissingRecords, column
from reference.downstream.retrieval import one_in_few
from reference.downstream.text_guided import text_guided
from reference.run_files import ChangeExamples, Evaluation


class Outcome(NamedTuple):
    """Figures, and examples of text-guided retrieval if it was evaluated."""

    evaluation: Evaluation
    examples: ChangeExamples | None


def run_tasks(encodings: Encodings, layout: Layout, config: DownstreamConfig) -> Outcome:
    """Evaluate the tasks of `config` on what a model makes of both splits.

    A task whose records are missing is skipped; ``evaluation["skipped"]`` says why. Of retrieval,
    this is the 1-in-101 protocol: the full one needs no records.
    """
    evaluation: Evaluation = {}
    skipped: dict[str, str] = {}
    examples = None

    @contextmanager
    def attempt(name: str) -> Iterator[None]:
        try:
            yield
        except MissingRecords as error:
            skipped[name] = str(error)

    if "retrieval" in config.task:
        val = encodings.data.val
        with attempt("one_in_few"):
            subcategories = column(val.records, layout.subcategory)
            evaluation["one_in_few"] = one_in_few(
                encodings.val.image_features,
                encodings.val.text_features,
                val.item_ids,
                subcategories,
                negatives=config.negatives,
                queries=config.item_queries,
                seed=config.task_seed,
            )
    if "recognition" in config.task:
        with attempt("recognition"):
            evaluation["recognition"] = {
                label: recognise(encodings, label) for label in layout.labels
            }
    if "text_guided" in config.task:
        with attempt("text_guided"):
            evaluation["text_guided"], examples = text_guided(encodings, layout, config)
    evaluation["skipped"] = skipped
    return Outcome(evaluation, examples)
