"""Every option of a pretraining run, as one dataclass that is also the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from reference.data import Data, kind_of, load_data
from reference.model.config import ModelConfig


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class MaskConfig:
    """How the words of MLM and the patches of MIM are chosen; see `reference.masks`."""

    masks: Literal["sync", "patches", "words", "random"] = _option(
        "sync", "Chosen by the teacher: both, patches or words alone, or nothing (at random)."
    )
    word_score: Literal[
        "leave_one_out",
        "image_effect",
        "image_to_text",
        "image_to_text_cls",
        "text_softmax",
        "dual",
        "max",
    ] = _option("leave_one_out", "Rule that scores a word.")
    patch_score: Literal["cls_value", "value", "mean", "cls"] = _option(
        "cls_value", "Rule that scores a patch."
    )
    mask_layer: int = _option(-1, "Fusion layer whose attention is read; negative: from the end.")
    token_ratio: float = _option(0.2, "Share of a text's words that is masked.")
    patch_ratio: float = _option(0.375, "Share of an image's patches that is masked.")
    mask_noise: float = _option(0.5, "Gaussian noise on the scores, in deviations of their row.")
    random_mask_steps: int = _option(200, "Steps of random masks before the teacher's.")

    def __post_init__(self) -> None:
        for name in ("token_ratio", "patch_ratio"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in (0, 1), got {getattr(self, name)}")
        for name in ("mask_noise", "random_mask_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


@dataclass
class SyCoCaConfig:
    """Options of `reference.methods.sycoca`, with the paper's values."""

    high_ratio: float = _option(0.5, "SyCoCa: share of patches, most like the text, to rebuild.")
    low_ratio: float = _option(0.5, "SyCoCa: share, least like it, hidden from the captioner.")
    caption_weight: float = _option(2.0, "SyCoCa: weight of captioning.")
    image_weight: float = _option(1.0, "SyCoCa: weight of text-guided masked image modelling.")

    def __post_init__(self) -> None:
        for name in ("high_ratio", "low_ratio"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in (0, 1), got {getattr(self, name)}")


@dataclass
class SimlaConfig:
    """Options of `reference.methods.simla`, with the values of its code."""

    keyword_votes: int = _option(4, "SIMLA: words that each head votes for.")
    keywords: int = _option(5, "SIMLA: most-voted words that the image is to be told by.")

    def __post_init__(self) -> None:
        for name in ("keyword_votes", "keywords"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class DataConfig:
    """How data is read; see `reference.data`."""

    data: str = _option(
        "catalogue",
        "`catalogue` draws one; else a folder of photos, of FashionGen's files or of shards.",
    )
    items: int = _option(4000, "Items of the drawn catalogue.")
    max_broken: float = _option(0.1, "Share of broken pairs to leave out; more stop the run.")
    workers: int = _option(2, "Processes that read shards, of each process that trains.")
    shuffle_buffer: int = _option(1000, "Pairs among which each of them shuffles.")

    def __post_init__(self) -> None:
        if not 0 <= self.max_broken <= 1:
            raise ValueError(f"max_broken must lie in [0, 1], got {self.max_broken}")
        for name, least in (("workers", 0), ("shuffle_buffer", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass
class PretrainConfig(SimlaConfig, SyCoCaConfig, MaskConfig, DataConfig, ModelConfig):
    """The options of ``python -m reference.pretrain``."""

    method: Literal["syncmask", "sycoca", "simla"] = _option(
        "syncmask", "What is trained: see `reference.methods`."
    )
    output: str = _option("runs/syncmask", "Folder of the run.")
    resume: bool = _option(False, "Go on from the last checkpoint of the output folder.")
    steps: int = _option(600, "Optimiser steps.")
    batch_size: int = _option(48, "Pairs of a batch, of one process.")
    learning_rate: float = _option(1e-3, "Peak, reached after the warm-up, cosine to 0.")
    warmup_steps: int = _option(60, "Steps of linear warm-up.")
    weight_decay: float = _option(0.05, "AdamW's, of matrices.")
    batches: Literal["shuffled", "hardest", "semi_hard"] = _option(
        "shuffled", "From the second epoch on: shuffled, or grouped by similarity, as in GRIT-VLP."
    )
    search_space: int = _option(1920, "Pairs of a group, from which similar ones share a batch.")
    negatives: Literal["semi_hard", "multinomial", "hardest"] = _option(
        "semi_hard", "How the wrong pairs of ITM are chosen in a batch."
    )
    negative_quantile: float = _option(
        0.75, "Of semi-hard negatives: rank by similarity below the pair's own; 1: the hardest."
    )
    operators: Literal["library", "plain"] = _option(
        "library", "Of syncmask_kernels, or the same in plain PyTorch, to compare them."
    )
    accumulate: int = _option(1, "Batches whose gradients make one step.")
    bfloat16: bool = _option(False, "Compute in bfloat16 where autocast does.")
    compile: bool = _option(False, "Compile the encoders with torch.compile.")
    mlm_mask: float = _option(
        0.8, "Of words to predict: masked; of the rest half is replaced, half left as it is."
    )
    distillation: float = _option(0.0, "Share of the teacher in soft targets; ALBEF's is 0.4.")
    distillation_steps: int = _option(200, "Steps over which that share grows from 0.")
    momentum: float = _option(0.995, "Of the teacher, once it is warm.")
    augment: bool = _option(False, "Random crop and horizontal flip.")
    seed: int = _option(0, "Of initialisation, order, augmentation, masks and negatives.")
    log_every: int = _option(10, "Steps between two logged lines.")
    eval_every: int = _option(200, "Steps between two evaluations; the last step always has one.")
    save_every: int = _option(200, "Steps between two checkpoints; the last step always has one.")
    keep_checkpoints: int = _option(1, "Checkpoints kept.")

    def __post_init__(self) -> None:
        for options in (SimlaConfig, SyCoCaConfig, MaskConfig, DataConfig, ModelConfig):
            options.__post_init__(self)
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"distillation must lie in [0, 1], got {self.distillation}")
        if not 0 <= self.mlm_mask <= 1:
            raise ValueError(f"mlm_mask must lie in [0, 1], got {self.mlm_mask}")
        counts = ("steps", "accumulate", "distillation_steps", "keep_checkpoints", "search_space")
        for name in (*counts, "log_every", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.negative_quantile <= 1:
            raise ValueError(f"negative_quantile must lie in [0, 1], got {self.negative_quantile}")
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size must be at least 2 for a negative to exist, got {self.batch_size}"
            )
        layers = self.fusion_layers
        if not -layers <= self.mask_layer < layers:
            raise ValueError(f"mask_layer must lie in [{-layers}, {layers}), got {self.mask_layer}")

    def load_data(self, tokenizer: PreTrainedTokenizerFast | None = None) -> Data:
        """The data of the run, with a tokenizer of its own unless one is given.

        Raises:
            ValueError: batches are to be grouped, but the data is a stream.
        """
        if self.batches != "shuffled" and kind_of(self.data) == "shards":
            raise ValueError(
                f"batches is '{self.batches}', but shards are a stream, from which no pairs can be "
                "chosen: take 'shuffled', or a folder of photos"
            )
        return load_data(
            self.data,
            image_size=self.image_size,
            patch_size=self.patch_size,
            max_tokens=self.max_tokens,
            items=self.items,
            seed=self.seed,
            tokenizer=tokenizer,
            max_broken=self.max_broken,
            batch_size=self.batch_size,
            workers=self.workers,
            shuffle_buffer=self.shuffle_buffer,
        )
