"""What the report shows of a model: pairs with their masks, and what it retrieves."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from reference.data import PairDataset
from reference.downstream.recall import nearest
from reference.evaluate import Encoded
from reference.run_files import Examples


def examples(
    encoded: Encoded,
    dataset: PairDataset,
    tokenizer: PreTrainedTokenizerFast,
    items: int = 6,
    queries: int = 6,
) -> Examples:
    """Pairs with their masks, up to two views of each of `items` items, and retrieved neighbours.

    Items and queries are spread evenly over the data set.
    """
    texts = _first_uses(dataset.captions)
    shown = torch.cat(
        [
            (dataset.item_ids == item).nonzero()[:2, 0]
            for item in _spread(dataset.item_ids.unique(), items)
        ]
    )
    asked = _spread(texts, queries)
    images = _spread(torch.arange(len(dataset)), queries)
    found = nearest(encoded.text_features[asked], encoded.image_features, 5)
    answers = texts[nearest(encoded.image_features[images], encoded.text_features[texts], 3)]
    truth = dataset.truth
    unknown = torch.full_like(dataset.input_ids[shown], -1, dtype=torch.int8)
    return Examples(
        image=dataset.images[shown],
        patch_mask=encoded.patch_mask[shown],
        patch_scores=encoded.patch_scores[shown],
        token_mask=encoded.token_mask[shown],
        token_scores=encoded.token_scores[shown],
        token_visible=unknown if truth is None else truth.word_visible[shown],
        gallery_images=dataset.images[found],
        gallery_hits=dataset.item_ids[found] == dataset.item_ids[asked, None],
        query_images=dataset.images[images],
        query_hits=dataset.item_ids[answers] == dataset.item_ids[images, None],
        tokens=[
            [str(token) for token in tokenizer.convert_ids_to_tokens(row)]
            for row in dataset.input_ids[shown].tolist()
        ],
        captions=[dataset.captions[row] for row in shown.tolist()],
        gallery_queries=[dataset.captions[row] for row in asked.tolist()],
        query_captions=[[dataset.captions[row] for row in rows] for rows in answers.tolist()],
    )


def _first_uses(captions: list[str]) -> Tensor:
    """Rows of the first use of each caption."""
    first: dict[str, int] = {}
    for row, caption in enumerate(captions):
        first.setdefault(caption, row)
    return torch.tensor(list(first.values()))


def _spread(values: Tensor, count: int) -> Tensor:
    """At most `count` of the values, evenly spread."""
    positions = torch.linspace(0, len(values) - 1, min(count, len(values)))
    return values[positions.round().long()]
