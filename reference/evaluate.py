"""What a trained model can do, and how well its masks find what image and text share.

``python -m reference.evaluate RUN [--task retrieval recognition text_guided]`` evaluates the last
checkpoint of a run on the tasks of `reference.downstream`, adds the figures to its
``evaluation.json`` and to its report, and prints them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import HfArgumentParser, PreTrainedTokenizerFast

from reference.batch import derived_seed, make_batch
from reference.checkpoint import checkpoints, load_model
from reference.config import PretrainConfig
from reference.data import PairDataset, Truth, kind_of
from reference.downstream.config import DownstreamConfig
from reference.downstream.features import CHUNK, Encodings
from reference.downstream.retrieval import full
from reference.downstream.tasks import run_tasks
from reference.masks import random_like
from reference.methods import METHODS
from reference.model import DualEncoder
from reference.report import write_report
from reference.run_files import (
    EVALUATION,
    EXAMPLES,
    ChangeExamples,
    Evaluation,
    MaskQuality,
    Retrieval,
    load_json,
    save_json,
)

RANDOM_DRAWS = 20


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


def retrieval(encoded: Encoded, dataset: PairDataset) -> Retrieval:
    """Recall both ways; see `reference.downstream.retrieval.full`."""
    return full(encoded.image_features, encoded.text_features, dataset.item_ids)


def mask_figures(encoded: Encoded, truth: Truth) -> MaskQuality:
    """The masks of the teacher against the truth, each figure beside random masks' of equal size.

    Of masked words, none where the method masks none. A masked patch counts as described when
    described, visible parts fill over a quarter of it.
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
    figures: MaskQuality = {
        "patches_described": share(patches, described, everywhere),
        "patches_described_random": share(random_patches, described, everywhere),
        "details_covered": covered(patches),
        "details_covered_random": covered(random_patches),
        "word_auc": word_auc(encoded.token_scores, truth.word_visible),
    }
    if tokens.any():
        figures["words_visible"] = share(tokens, visible, attribute)
        figures["words_visible_random"] = share(random_tokens, visible, attribute)
    return figures


def word_auc(scores: Tensor, word_visible: Tensor) -> float:
    """Mean over captions of P(score of a visible word > score of an invisible one); ties half."""
    visible, invisible = word_visible == 1, word_visible == 0
    pairs = visible[:, :, None] & invisible[:, None, :]
    difference = scores[:, :, None] - scores[:, None, :]
    wins = ((difference > 0).double() + (difference == 0).double() / 2) * pairs
    count = pairs.sum(dim=(1, 2))
    both = count > 0
    return float((wins.sum(dim=(1, 2))[both] / count[both]).mean())


def evaluate_run(run: Path, options: DownstreamConfig) -> Evaluation:
    """Evaluate the last checkpoint of a run; keep the teacher's results and write the report anew.

    Raises:
        FileNotFoundError: there is no checkpoint.
    """
    saved = checkpoints(run)
    if not saved:
        raise FileNotFoundError(f"{run} holds no checkpoint")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, config, tokenizer = load_model(saved[-1], options.weights, device)
    data = config.load_data(tokenizer)
    found, shown = run_tasks(Encodings(model, data), options.layout(kind_of(config.data)), options)
    if "retrieval" in options.task:
        found.update(evaluate(model, data.val, tokenizer, config)[0])
    if options.weights == "teacher":
        _keep(run, found, shown)
    return found


def _keep(run: Path, found: Evaluation, shown: ChangeExamples | None) -> None:
    path = run / EVALUATION
    before: Evaluation = load_json(path) if path.exists() else {}
    skipped = before.get("skipped", {}) | found["skipped"]
    after: Evaluation = {**before, **found}
    after["skipped"] = {task: why for task, why in skipped.items() if task not in found}
    save_json(path, after)
    if shown is not None:
        shown.save(run)
    if (run / f"{EXAMPLES}.json").exists():
        write_report(run)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = HfArgumentParser(DownstreamConfig, description=__doc__)  # type: ignore[arg-type]
    parser.add_argument("run", type=Path, help="Folder of a run.")
    options, positional = parser.parse_args_into_dataclasses(arguments)
    try:
        evaluation = evaluate_run(positional.run, options)
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from error
    print(json.dumps(evaluation, indent=2))
    for task, why in evaluation["skipped"].items():
        print(f"skipped {task}: {why}", file=sys.stderr)


if __name__ == "__main__":
    main()
