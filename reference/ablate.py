"""Which rule finds what image and text share, and what does training with it give?

``python -m reference.ablate --output runs/ablation`` answers it anew, on the drawn catalogue and,
with ``--photos FOLDER``, on photos. Two studies, each over `seeds`:

- *after the fact*: teachers trained with random masks score the validation pairs by every rule of
  `reference.score_rules`, at several ages;
- *by training*: each of `VARIANTS` goes on where a training with random masks was at some age;
  rules of words and ages of the teacher on the catalogue alone, where the truth is known.

Every training is a run of `reference.pretrain` in a folder of its own, so that the study goes on
where it was interrupted. Each ends with new ``results.json``, ``results.md`` and ``results.png``.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser

import syncmask_kernels as smk
from reference.batch import make_batch
from reference.checkpoint import checkpoints, load_model
from reference.config import PretrainConfig
from reference.data import PairDataset, Truth
from reference.downstream.features import CHUNK
from reference.evaluate import evaluate, word_auc
from reference.pretrain import pretrain
from reference.run_files import CONFIG, EVALUATION, METRICS, atomic_path, load_json, save_json
from reference.score_rules import all_scores

TRUNK = "random masks"


class Variant(NamedTuple):
    """A training that leaves the trunk, the training with random masks, after `age` steps of it.

    Up to there the two are the same, and so are the pairs of every step and the teacher's first
    ages: what differs in the end comes of what differs here.
    """

    age: int
    options: dict[str, Any]
    on_photos: bool = True


# Of every training that does not name another.
RULES = {"word_score": "image_effect"}
VARIANTS = {
    "sync": Variant(300, {}),
    "sync, patches only": Variant(300, {"masks": "patches"}),
    "sync, words only": Variant(300, {"masks": "words"}),
    "sync, words by leave_one_out": Variant(300, {"word_score": "leave_one_out"}),
    "sync, words by image_to_text": Variant(300, {"word_score": "image_to_text"}, False),
    "sync, words by image_to_text_cls": Variant(300, {"word_score": "image_to_text_cls"}, False),
    "sync, no noise": Variant(300, {"mask_noise": 0.0}),
    "sync, young teacher": Variant(100, {}, False),
    "sync, grown teacher": Variant(600, {}, False),
    "sync, batches of the hardest": Variant(300, {"batches": "hardest"}),
    "sync, batches of the semi-hard": Variant(300, {"batches": "semi_hard"}),
}
PATCH_SHARE = 0.25
AT = " at "  # between a figure and the age of the teacher it is of

Table = dict[str, dict[str, list[float]]]
"""Row -> column -> a value for each seed."""


@dataclass
class AblateConfig:
    """The options of ``python -m reference.ablate``."""

    output: str = field(default="runs/ablation", metadata={"help": "Folder of the study."})
    photos: str | None = field(default=None, metadata={"help": "Folder of photos: see --data."})
    seeds: int = field(default=3, metadata={"help": "Trainings of each kind."})
    steps: int = field(default=900, metadata={"help": "Steps of each training."})
    every: int = field(default=300, metadata={"help": "Steps between two looks at a teacher."})
    batch_size: int = field(default=32, metadata={"help": "Pairs of a step."})
    width: int = field(default=64, metadata={"help": "Hidden size of every encoder."})
    learning_rate: float = field(default=1.5e-3, metadata={"help": "Of every training."})
    items: int = field(default=4000, metadata={"help": "Items of the drawn catalogue."})


def ablate(study: AblateConfig) -> Path:
    """Run what is not there yet; returns the page of results."""
    oldest = max(variant.age for variant in VARIANTS.values())
    if study.steps <= oldest:
        raise ValueError(f"steps must be above {oldest}, where a variant begins, got {study.steps}")
    for training in tqdm(list(_trainings(study)), unit="training"):
        if not (training.run / EVALUATION).exists():
            _train(training, study)
        _write(Path(study.output), _results(study))
    return Path(study.output) / "results.md"


class Training(NamedTuple):
    """One of the study: which variant, on which data, in which folder, with which options."""

    name: str
    where: str
    run: Path
    options: dict[str, Any]


def _trainings(study: AblateConfig) -> Iterator[Training]:
    """The trunks first, which the rules are compared on, then the same variant's seeds in turn."""
    sources = {"catalogue": "catalogue"} | ({"photos": study.photos} if study.photos else {})
    for where, source in sources.items():
        variants = [n for n, v in VARIANTS.items() if where == "catalogue" or v.on_photos]
        for name in (TRUNK, *variants):
            options = VARIANTS[name].options if name in VARIANTS else {"masks": "random"}
            options = {"data": source, "augment": where == "photos"} | RULES | options
            for seed in range(study.seeds):
                run = _folder(study, where, name, seed)
                yield Training(name, where, run, options | {"seed": seed})


def _folder(study: AblateConfig, where: str, name: str, seed: int) -> Path:
    return Path(study.output) / where / name.replace(", ", "-").replace(" ", "_") / str(seed)


def _train(training: Training, study: AblateConfig) -> None:
    name, where, run, options = training
    trunk = _folder(study, where, TRUNK, options["seed"])
    if name != TRUNK and not checkpoints(run):
        _leave(trunk, run, VARIANTS[name].age)
    ages = [variant.age for variant in VARIANTS.values()]
    pretrain(
        PretrainConfig(
            **options,
            output=str(run),
            resume=(run / CONFIG).exists(),
            random_mask_steps=0,
            steps=study.steps,
            batch_size=study.batch_size,
            width=study.width,
            learning_rate=study.learning_rate,
            items=study.items,
            eval_every=study.every,
            save_every=math.gcd(study.every, *ages),
            keep_checkpoints=study.steps if name == TRUNK else 1,
        )
    )


def _leave(trunk: Path, run: Path, age: int) -> None:
    """Give `run` the trunk's configuration, metrics and checkpoint of that age."""
    folder = run / "checkpoints" / f"step-{age:08d}"
    run.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, METRICS):
        shutil.copy(trunk / name, run / name)
    with atomic_path(folder) as temporary:
        shutil.copytree(trunk / "checkpoints" / folder.name, temporary)


def _results(study: AblateConfig) -> dict[str, Table]:
    results: dict[str, Table] = {}
    for name, where, run, options in _trainings(study):
        if not (run / EVALUATION).exists():
            continue
        outcome = _outcome(load_json(run / EVALUATION))
        _append(results.setdefault(f"Trained on the {where}", {}), name, outcome)
        if name != TRUNK:
            trunk = _folder(study, where, TRUNK, options["seed"])
            before = _outcome(_evaluation_by_rules_of(run, trunk))
            gains = {column: value - before[column] for column, value in outcome.items()}
            title = f"Trained on the {where}: more than with random masks of the same seed"
            _append(results.setdefault(title, {}), name, gains)
        elif where == "catalogue":
            for words, patches, age in _rules(run, study.every):
                for side, rules in (("Words", words), ("Patches", patches)):
                    table = results.setdefault(f"{side}: what rules find after the fact", {})
                    for rule, figures in rules.items():
                        _append(table, rule, {f"{k}{AT}{age}": v for k, v in figures.items()})
    return results


def _evaluation_by_rules_of(run: Path, trunk: Path) -> dict[str, Any]:
    """That of the trunk, its masks by the rule of `run`, so that training alone makes the gain."""
    rule, trunks_rule = (load_json(folder / CONFIG)["word_score"] for folder in (run, trunk))
    if rule == trunks_rule:
        return dict(load_json(trunk / EVALUATION))
    file = trunk / f"evaluation-{rule}.json"
    if not file.exists():
        model, config, tokenizer = load_model(max(checkpoints(trunk)))
        config.word_score = rule
        save_json(file, evaluate(model, config.load_data(tokenizer).val, tokenizer, config)[0])
    return dict(load_json(file))


def _append(table: Table, row: str, figures: dict[str, float]) -> None:
    for column, value in figures.items():
        table.setdefault(row, {}).setdefault(column, []).append(value)


def _outcome(evaluation: dict[str, Any]) -> dict[str, float]:
    """Recall at 10 and, where the truth is known, what the masks of the last teacher are worth."""
    found = {f"{way} R@10": evaluation["retrieval"][way]["r10"] for way in ("t2i", "i2t")}
    masks = evaluation.get("masks", {})
    kept = ("word_auc", "words_visible", "patches_described", "details_covered")
    return found | {name: masks[name] for name in kept if name in masks}


def _rules(run: Path, every: int) -> Iterator[tuple[dict[str, Any], dict[str, Any], int]]:
    """The figures of all rules for the teachers of a run, kept beside their checkpoints."""
    for folder in checkpoints(run):
        age = int(folder.name.split("-")[1])
        if age % every:
            continue
        file = run / f"rules-{folder.name}.json"
        if not file.exists():
            model, config, tokenizer = load_model(folder)
            data = config.load_data(tokenizer).val
            save_json(file, rule_figures(model, data, tokenizer, config.token_ratio))
        words, patches = load_json(file)
        yield words, patches, age


def rule_figures(
    model: Any, dataset: PairDataset, tokenizer: Any, token_ratio: float
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """What masks by each rule would hide, of words and of a quarter of the patches."""
    assert dataset.truth is not None
    torch.manual_seed(0)
    found: tuple[dict[str, list[Tensor]], ...] = ({}, {})
    length, valid = dataset.input_ids.shape[1], []
    for rows in torch.arange(len(dataset)).split(CHUNK):
        batch = make_batch(dataset[rows], tokenizer, torch.device("cpu"), length)
        valid.append(batch.token_valid)
        for side, rules in zip(found, all_scores(model, batch), strict=True):
            for rule, scores in rules.items():
                side.setdefault(rule, []).append(scores)
    words, patches = ({rule: torch.cat(parts) for rule, parts in side.items()} for side in found)
    truth, counted = dataset.truth, torch.cat(valid)
    return (
        {rule: _of_words(scores, counted, truth, token_ratio) for rule, scores in words.items()},
        {rule: _of_patches(scores, truth) for rule, scores in patches.items()},
    )


def _of_words(scores: Tensor, valid: Tensor, truth: Truth, ratio: float) -> dict[str, float]:
    chosen = smk.topk_mask(scores, ratio=ratio, valid=valid).mask
    attributes = chosen & (truth.word_visible >= 0)
    visible = attributes & (truth.word_visible == 1)
    return {
        "AUC": word_auc(scores, truth.word_visible),
        "visible": float(visible.sum() / attributes.sum()),
        "attributes": float(attributes.sum() / chosen.sum()),
    }


def _of_patches(scores: Tensor, truth: Truth) -> dict[str, float]:
    chosen = smk.topk_mask(scores, ratio=PATCH_SHARE).mask
    described, detail = truth.patch_described > 0.25, truth.patch_detail.double()
    return {
        "described": float((chosen & described).sum() / chosen.sum()),
        "details": float((detail * chosen).sum() / detail.sum()),
    }


def _write(folder: Path, results: dict[str, Table]) -> None:
    save_json(folder / "results.json", results)
    with atomic_path(folder / "results.md") as temporary:
        temporary.write_text("\n\n".join(map(as_markdown, results, results.values())) + "\n")
    with atomic_path(folder / "results.png") as temporary:
        draw(results).savefig(temporary, format="png", dpi=120)


def as_markdown(title: str, table: Table) -> str:
    """Mean and standard deviation over the seeds, in percent; the best of each column in bold."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    best = {c: max(mean(row[c]) for row in table.values() if c in row) for c in columns}

    def cell(values: list[float], top: float) -> str:
        spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
        text = f"{100 * mean(values):.1f}{spread}"
        return f"**{text}**" if mean(values) == top else text

    lines = [f"### {title}", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in table.items():
        cells = [cell(row[c], best[c]) if c in row else "" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[str, Table]) -> Figure:
    """A row of panels for each table, one for each figure; a dot for each seed and age."""
    heights = [1 + 0.17 * len(table) for table in results.values()]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(results), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (title, table) in zip(parts, results.items(), strict=True):
        part.suptitle(title, fontsize=9, x=0, ha="left")
        panels: dict[str, list[str]] = {}
        for column in dict.fromkeys(column for row in table.values() for column in row):
            panels.setdefault(column.partition(AT)[0], []).append(column)
        all_axes = part.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (name, columns) in zip(all_axes, panels.items(), strict=True):
            _draw_panel(axes, name, columns, table)
        ages = all_axes[0].get_legend_handles_labels()
        if ages[0]:
            part.legend(*ages, loc="upper right", ncols=len(ages[0]), fontsize=7, frameon=False)
    return figure


def _draw_panel(axes: Axes, name: str, columns: list[str], table: Table) -> None:
    for number, column in enumerate(columns, 1):
        shade = str(0.8 * (1 - number / len(columns)))  # the older, the darker
        places = [place for place, row in enumerate(table.values()) for _ in row.get(column, ())]
        values = [value for row in table.values() for value in row.get(column, ())]
        age = column.partition(AT)[2]
        axes.plot(values, places, ".", color=shade, label=f"{age} steps" if age else None)
    axes.set_yticks(range(len(table)), list(table), fontsize=7)
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="both", color="0.93")
    axes.set_title(name, fontsize=8)
    if any(
        value < 0 for row in table.values() for column in columns for value in row.get(column, ())
    ):
        axes.axvline(0, color="#c0392b", linewidth=0.8)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = HfArgumentParser(AblateConfig, description=__doc__)  # type: ignore[arg-type]
    (study,) = parser.parse_args_into_dataclasses(sys.argv[1:] if arguments is None else arguments)
    print(f"results: {ablate(study)}")


if __name__ == "__main__":
    main()
