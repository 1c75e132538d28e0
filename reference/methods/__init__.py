"""Ways to pretrain: each is a model and an objective on parts that all share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

import syncmask_kernels as smk
from reference.masks import teacher_masks
from reference.methods import simla, sycoca, syncmask
from reference.model import DualEncoder, ModelConfig, SimlaModel, SyCoCaModel, SyncMaskModel
from reference.step import Step


class Method(NamedTuple):
    """``model(config, vocab_size, pad_id)`` is built, ``losses(step)`` are summed and minimised.

    ``shown_masks(model, batch, image, text, config)`` is what a report shows: the patches that are
    masked, the words that are masked, or that are keywords, and their scores.
    """

    model: Callable[[ModelConfig, int, int], DualEncoder]
    losses: Callable[[Step[Any]], dict[str, Tensor]]
    shown_masks: Callable[..., smk.SyncMask]


METHODS = {
    "syncmask": Method(SyncMaskModel, syncmask.losses, teacher_masks),
    "sycoca": Method(SyCoCaModel, sycoca.losses, sycoca.shown_masks),
    "simla": Method(SimlaModel, simla.losses, simla.shown_masks),
}
