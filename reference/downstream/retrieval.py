"""Image-text retrieval, full and one in a few; see `full` and `one_in_few`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from reference.downstream.recall import chance, nearest, recalls
from reference.downstream.records import numbered
from reference.run_files import OneInFew, Recalls, Retrieval

KS = (1, 5, 10)


def full(images: Tensor, texts: Tensor, items: Tensor) -> Retrieval:
    """Recall both ways by cosine similarity, without re-ranking by a fusion encoder.

    Every image and the text of every pair is a query and a candidate; a hit is any candidate of the
    query's item.

    Args:
        images, texts: unit features ``[N, P]`` of ``N`` pairs.
        items: ``[N]``, equal for pairs of one item.
    """

    def recall(queries: Tensor, candidates: Tensor) -> Recalls:
        hits = items[nearest(queries, candidates, KS[-1])] == items[:, None]
        return cast(Recalls, recalls(hits, KS))

    positives = torch.cat([(chunk[:, None] == items).sum(dim=1) for chunk in items.split(1024)])
    random = cast(Recalls, chance(positives, len(items), KS))
    return {
        "i2t": recall(images, texts),
        "t2i": recall(texts, images),
        "chance": {"i2t": random, "t2i": random},
        "n_images": len(items),
        "n_texts": len(items),
    }


def one_in_few(
    images: Tensor,
    texts: Tensor,
    items: Tensor,
    subcategories: Sequence[str],
    *,
    negatives: int = 100,
    queries: int = 1000,
    seed: int = 0,
) -> OneInFew:
    """FashionGen's protocol: each query ranks its positive among wrong ones of its subcategory.

    Of every item one pair is drawn. At most `queries` items are queries; the candidates of a query
    are its own pair and `negatives` other items' of the same subcategory, topped up from the rest
    where it has fewer. Both ways share them. A wrong candidate as similar as the right one goes
    before it, so a model that tells nothing apart gets nothing.

    Args:
        images, texts: unit features ``[N, P]`` of ``N`` pairs.
        items: ``[N]``, equal for pairs of one item.
        subcategories: ``N`` names.
        negatives, queries: see above; fewer where there are not as many.
        seed: of everything drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(items), generator=generator).tolist()
    pairs = torch.tensor(list({int(items[row]): row for row in drawn}.values()))
    images, texts = images[pairs], texts[pairs]
    groups = numbered(subcategories)[pairs]
    asked = torch.arange(min(queries, len(pairs)))
    other = groups[asked, None] != groups
    order = torch.rand(len(asked), len(pairs), generator=generator) + other
    order[asked, asked] = torch.inf
    wrong = order.topk(min(negatives, len(pairs) - 1), largest=False).indices

    def recall(asking: Tensor, candidates: Tensor) -> Recalls:
        similarity = asking[asked] @ candidates.T
        right = similarity[asked, asked]
        rank = (similarity.gather(1, wrong) >= right[:, None]).sum(dim=1)
        return cast(Recalls, recalls(rank[:, None] == torch.arange(KS[-1]), KS))

    random = cast(Recalls, chance(torch.ones_like(asked), 1 + wrong.shape[1], KS))
    return {
        "i2t": recall(images, texts),
        "t2i": recall(texts, images),
        "chance": {"i2t": random, "t2i": random},
        "queries": len(asked),
        "candidates": 1 + wrong.shape[1],
        "same_subcategory": 1 - other.gather(1, wrong).double().mean().item(),
    }
