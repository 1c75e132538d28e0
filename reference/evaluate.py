"""What a trained model can do: retrieval, and how well its masks find what image and text share.

``python -m reference.evaluate RUN`` prints it for the last checkpoint of a run.
"""

from __future__ import annotations

import argparse
import json
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from reference.batch import derived_seed, make_batch
from reference.checkpoint import checkpoints, load_model
from reference.config import PretrainConfig
from reference.data import PairDataset, Truth
from reference.masks import random_like
from reference.methods import METHODS
from reference.model import DualEncoder
from reference.run_files import Evaluation, MaskQuality, Recalls, Retrieval

CHUNK = 256
RANDOM_DRAWS = 20


class MaskFigures(MaskQuality, total=False):
    """`MaskQuality`, and ``word_auc``: how often, within a caption, a visible attribute word scores
    above an invisible one."""

    word_auc: float


class Encoded(NamedTuple):
    """Everything evaluation needs of ``N`` pairs, on the CPU."""

    image_features: Tensor
    text_features: Tensor
    patch_mask: Tensor
    token_mask: Tensor
    patch_scores: Tensor
    token_scores: Tensor
    random_patch_mask: Tensor
    """bool ``[N, draws, P]``"""
    random_token_mask: Tensor
    """bool ``[N, draws, T]``"""


def evaluate(
    model: DualEncoder,
    dataset: PairDataset,
    tokenizer: PreTrainedTokenizerFast,
    config: PretrainConfig,
) -> tuple[Evaluation, Encoded]:
    """Retrieval, and where the truth is known the figures of the masks; deterministic."""
    torch.manual_seed(derived_seed(config.seed, "evaluation", 0))
    encoded = encode(model, dataset, tokenizer, config)
    evaluation: Evaluation = {"retrieval": retrieval(encoded, dataset)}
    if dataset.truth is not None:
        evaluation["masks"] = mask_figures(encoded, dataset.truth)
    return evaluation, encoded


@torch.no_grad()
def encode(
    model: DualEncoder,
    dataset: PairDataset,
    tokenizer: PreTrainedTokenizerFast,
    config: PretrainConfig,
) -> Encoded:
    """Features and masks of every pair; the random masks come from the global generator."""
    device = model.temperature.device
    length = dataset.input_ids.shape[1]
    chunks: list[tuple[Tensor, ...]] = []
    for rows in torch.arange(len(dataset)).split(CHUNK):
        batch = make_batch(dataset[rows], tokenizer, device)
        image = model.encode_image(batch.pixels)
        text = model.encode_text(batch.input_ids, batch.attended)
        masks = METHODS[config.method].shown_masks(model, batch, image, text, config)
        draws = [random_like(masks, batch.token_valid) for _ in range(RANDOM_DRAWS)]
        chunk = (
            model.image_features(image),
            model.text_features(text),
            masks.patch_mask,
            _pad(masks.token_mask, length),
            masks.patch_scores,
            _pad(masks.token_scores, length),
            torch.stack([patch_mask for patch_mask, _ in draws], dim=1),
            _pad(torch.stack([token_mask for _, token_mask in draws], dim=1), length),
        )
        chunks.append(tuple(value.cpu() for value in chunk))
    return Encoded(*(torch.cat(values) for values in zip(*chunks, strict=True)))


def _pad(x: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, length - x.shape[-1]))


def nearest(queries: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Ids ``[Q, k]`` of the most similar candidates, best first."""
    return (queries @ candidates.T).topk(min(k, len(candidates)), dim=1).indices


def retrieval(encoded: Encoded, dataset: PairDataset) -> Retrieval:
    """Recall both ways by cosine similarity, without re-ranking by the fusion encoder.

    Every image and the text of every pair is a query and a candidate; a hit is any candidate of the
    query's item.
    """
    items = dataset.item_ids
    images, texts = encoded.image_features, encoded.text_features
    chance = _chance(items, items)
    return {
        "i2t": _recalls(nearest(images, texts, 10), items, items),
        "t2i": _recalls(nearest(texts, images, 10), items, items),
        "chance": {"i2t": chance, "t2i": chance},
        "n_images": len(items),
        "n_texts": len(items),
    }


def _recalls(ranked: Tensor, query_items: Tensor, candidate_items: Tensor) -> Recalls:
    hits = candidate_items[ranked] == query_items[:, None]
    r1, r5, r10 = (hits[:, :k].any(dim=1).double().mean().item() for k in (1, 5, 10))
    return {"r1": r1, "r5": r5, "r10": r10}


def _chance(query_items: Tensor, candidate_items: Tensor) -> Recalls:
    """Expected recall of a random ranking: one minus the chance that k draws miss all positives."""
    n = len(candidate_items)
    positives = (query_items[:, None] == candidate_items).sum(dim=1).tolist()
    r1, r5, r10 = (
        sum(1 - comb(n - p, k) / comb(n, k) for p in positives) / len(positives)
        for k in (min(k, n) for k in (1, 5, 10))
    )
    return {"r1": r1, "r5": r5, "r10": r10}


def mask_figures(encoded: Encoded, truth: Truth) -> MaskFigures:
    """The masks of the teacher against the truth, each figure beside random masks' of equal size.

    A masked patch counts as described when described, visible parts fill over a quarter of it.
    """
    visible, attribute = truth.word_visible == 1, truth.word_visible >= 0
    described = truth.patch_described > 0.25
    detail = truth.patch_detail.double()

    def share(mask: Tensor, good: Tensor, counted: Tensor) -> float:
        chosen = mask & counted
        return float((chosen & good).sum() / chosen.sum())

    def covered(mask: Tensor) -> float:
        area = detail.expand_as(mask)
        return float((area * mask).sum() / area.sum())

    everywhere = torch.ones_like(described)
    patches, tokens = encoded.patch_mask, encoded.token_mask
    random_patches = encoded.random_patch_mask.transpose(0, 1)
    random_tokens = encoded.random_token_mask.transpose(0, 1)
    return {
        "words_visible": share(tokens, visible, attribute),
        "words_visible_random": share(random_tokens, visible, attribute),
        "patches_described": share(patches, described, everywhere),
        "patches_described_random": share(random_patches, described, everywhere),
        "details_covered": covered(patches),
        "details_covered_random": covered(random_patches),
        "word_auc": word_auc(encoded.token_scores, truth.word_visible),
    }


def word_auc(scores: Tensor, word_visible: Tensor) -> float:
    """Mean over captions of P(score of a visible word > score of an invisible one); ties half."""
    visible, invisible = word_visible == 1, word_visible == 0
    pairs = visible[:, :, None] & invisible[:, None, :]
    difference = scores[:, :, None] - scores[:, None, :]
    wins = ((difference > 0).double() + (difference == 0).double() / 2) * pairs
    count = pairs.sum(dim=(1, 2))
    both = count > 0
    return float((wins.sum(dim=(1, 2))[both] / count[both]).mean())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="folder of a run")
    parser.add_argument(
        "--weights", choices=("teacher", "model"), default="teacher", help="whose weights"
    )
    arguments = parser.parse_args()
    saved = checkpoints(arguments.run)
    if not saved:
        raise SystemExit(f"error: {arguments.run} holds no checkpoint")
    model, config, tokenizer = load_model(saved[-1], arguments.weights)
    evaluation, _ = evaluate(model, config.load_data(tokenizer).val, tokenizer, config)
    print(json.dumps(evaluation, indent=2))


if __name__ == "__main__":
    main()
