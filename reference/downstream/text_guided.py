"""Text-guided image retrieval: a reference image and the words of one change, "red".

Queries are built from records: an image, one of its attributes, and another value that the
attribute takes in an image alike in all other attributes. Every such image is right; all images but
the reference are candidates, so the reference's own look-alikes must be told from what was asked.

Methods, from nothing to a trained head on the frozen model:

- ``image``, ``text``: the feature of the reference alone, of the words alone.
- ``sum``: both added, each of unit length.
- ``head``: `Composer`, trained on the training split. The papers train the whole model; they, too,
  read the fused CLS of reference and words, contrast it with the targets' features, and use the
  references as further negatives.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from reference.data import PairDataset
from reference.downstream.config import DownstreamConfig, Layout
from reference.downstream.features import Encodings, Features, features
from reference.downstream.recall import chance, recalls
from reference.downstream.records import MissingRecords, column, numbered
from reference.run_files import ChangeExamples, TextGuided

KS = (1, 5, 10, 50)
TEMPERATURE = 0.07


class Changes(NamedTuple):
    """``Q`` queries among ``N`` images."""

    reference: Tensor
    """int64 ``[Q]``: the image that is shown"""
    words: list[str]
    """the change that is asked for"""
    wanted: Tensor
    """int64 ``[Q]``: the group that is right"""
    groups: Tensor
    """int64 ``[N]``: equal for images alike in all attributes"""


def build_changes(
    records: Sequence[dict[str, Any]],
    changed: Sequence[str],
    kept: Sequence[str],
    *,
    seed: int,
    limit: int | None = None,
) -> Changes:
    """One query for each image that has an answer, its change drawn at random.

    Args:
        records: of each image.
        changed: attributes that a query may change, one at a time.
        kept: further attributes in which reference and answer must agree.
        seed: of the draw.
        limit: at most so many images, drawn at random, are references.

    Raises:
        MissingRecords: a record lacks an attribute, or no two images differ in just one.

    >>> red, blue = {"type": "bag", "colour": "red"}, {"type": "bag", "colour": "blue"}
    >>> found = build_changes([red, blue, blue], ["colour"], ["type"], seed=0)
    >>> found.reference, found.words
    (tensor([0, 1, 2]), ['blue', 'red', 'red'])
    """
    names = (*changed, *kept)
    looks = list(zip(*(column(records, name) for name in names), strict=True))
    known = dict.fromkeys(looks)
    alternatives = defaultdict(list)
    for look in known:
        for i in range(len(changed)):
            alternatives[i, look[:i], look[i + 1 :]].append(look)
    rng = random.Random(seed)
    asked = []
    for row, look in enumerate(looks):
        choices = [
            (row, other[i], other)
            for i in range(len(changed))
            for other in alternatives[i, look[:i], look[i + 1 :]]
            if other != look
        ]
        asked += [rng.choice(choices)] if choices else []
    if not asked:
        raise MissingRecords(f"no two images differ in just one of {', '.join(names)}")
    if limit is not None and limit < len(asked):
        asked = [asked[i] for i in sorted(rng.sample(range(len(asked)), limit))]
    reference, words, wanted = zip(*asked, strict=True)
    numbers = numbered([*looks, *wanted])
    return Changes(
        torch.tensor(reference), list(words), numbers[len(looks) :], numbers[: len(looks)]
    )


class Asked(NamedTuple):
    """Queries with what a model makes of them and of the images they are asked among."""

    changes: Changes
    query: Features
    """of each reference with its words in the place of a caption"""
    candidates: Tensor
    """``[N, P]``: image features"""


def text_guided(
    encodings: Encodings, layout: Layout, config: DownstreamConfig
) -> tuple[TextGuided, ChangeExamples]:
    """Recall of all methods beside chance, and some queries with their first answers.

    Raises:
        MissingRecords: see `build_changes`; or the head cannot train on a stream.
    """

    def ask(split: str, limit: int | None) -> Asked:
        dataset = encodings.train_pairs if split == "train" else encodings.data.val
        changes = build_changes(
            dataset.records, layout.changed, layout.kept, seed=config.task_seed, limit=limit
        )
        query = features(
            encodings.model,
            dataset,
            encodings.data.tokenizer,
            f"{split} queries",
            changes.reference,
            changes.words,
        )
        return Asked(changes, query, getattr(encodings, split).image_features)

    val = ask("val", config.changes)
    image, text = val.query.image_features, val.query.text_features
    queries = {"image": image, "text": text, "sum": F.normalize(image + text, dim=1)}
    if config.head_steps:
        head = train_head(ask("train", None), config)
        queries["head"] = head(val.query).detach()
    answers = {name: _answers(feature, val) for name, feature in queries.items()}
    hits = {
        name: val.changes.groups[rows] == val.changes.wanted[:, None]
        for name, rows in answers.items()
    }
    positives = (val.changes.groups == val.changes.wanted[:, None]).sum(dim=1)
    candidates = len(val.candidates) - 1
    best = list(queries)[-1]
    return {
        "recalls": {name: recalls(found, KS) for name, found in hits.items()},
        "chance": chance(positives, candidates, KS),
        "changed": list(layout.changed),
        "queries": len(image),
        "candidates": candidates,
    }, _examples(encodings.data.val, val.changes, answers[best], hits[best])


def _answers(queries: Tensor, asked: Asked) -> Tensor:
    """The most similar images ``[Q, k]``, best first, without the references."""
    similarity = queries @ asked.candidates.T
    similarity[torch.arange(len(queries)), asked.changes.reference] = -torch.inf
    return similarity.topk(min(KS[-1], len(asked.candidates) - 1), dim=1).indices


def _examples(
    dataset: PairDataset, changes: Changes, answers: Tensor, hits: Tensor, count: int = 6
) -> ChangeExamples:
    shown = torch.linspace(0, len(answers) - 1, min(count, len(answers))).round().long()
    return ChangeExamples(
        references=dataset.images[changes.reference[shown]],
        answers=dataset.images[answers[shown, :5]],
        hits=hits[shown, :5],
        words=[changes.words[row] for row in shown.tolist()],
    )


class Composer(nn.Module):
    """Turns a reference and words into the feature of what is asked for.

    A residual on the sum of both features, zero at first, from them and from their fused CLS.
    """

    def __init__(self, query: Features, hidden: int = 256) -> None:
        super().__init__()
        projection = query.image_features.shape[1]
        self.enter = nn.Linear(_parts(query).shape[1], hidden)
        self.leave = nn.Linear(hidden, projection)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, query: Features) -> Tensor:
        """Unit features ``[Q, P]``."""
        change: Tensor = self.leave(F.gelu(self.enter(_parts(query))))
        return F.normalize(query.image_features + query.text_features + change, dim=1)


def _parts(query: Features) -> Tensor:
    return torch.cat([query.image_features, query.text_features, query.fused], dim=1)


def train_head(asked: Asked, config: DownstreamConfig) -> Composer:
    """Contrast composed queries with the images that are right, and with the references."""
    torch.manual_seed(config.task_seed)
    changes = asked.changes
    head = Composer(asked.query)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.head_learning_rate)
    by_group = changes.groups.argsort(stable=True)
    start = torch.searchsorted(changes.groups[by_group], changes.wanted)
    count = torch.bincount(changes.groups, minlength=int(changes.wanted.max()) + 1)[changes.wanted]
    for _ in tqdm(range(config.head_steps), "train head", unit="step"):
        rows = torch.randint(len(changes.words), (config.head_batch,))
        chosen = by_group[start[rows] + (torch.rand(len(rows)) * count[rows]).long()]
        against = torch.cat([chosen, changes.reference[rows]])
        right = changes.wanted[rows, None] == changes.groups[against]
        query = Features._make(part[rows] for part in asked.query)
        logits = head(query) @ asked.candidates[against].T / TEMPERATURE
        loss = F.cross_entropy(logits, right / right.sum(dim=1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head
