"""What a method gets to see in a training step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reference.batch import Batch
from reference.config import PretrainConfig
from reference.model import DualEncoder

Model = TypeVar("Model", bound=DualEncoder)


@dataclass
class Step(Generic[Model]):
    """A batch, the student that learns from it and the momentum teacher."""

    student: Model
    teacher: Model
    batch: Batch
    index: int
    tokenizer: PreTrainedTokenizerBase
    config: PretrainConfig
    features: tuple[Tensor, Tensor] | None = None
    """Of images and texts ``[B, projection]``, without gradient, once ITC has made them."""

    @cached_property
    @torch.no_grad()
    def teacher_image(self) -> Tensor:
        """The teacher's view of the clean images ``[B, 1 + P, D]``."""
        return self.teacher.encode_image(self.batch.pixels)

    @cached_property
    @torch.no_grad()
    def teacher_text(self) -> Tensor:
        """The teacher's view of the clean texts ``[B, T, D]``."""
        return self.teacher.encode_text(self.batch.input_ids, self.batch.attended)

    @property
    def alpha(self) -> float:
        """The teacher's share in the targets; it grows from 0, since a young teacher knows little.

        ALBEF lets it grow over the first epoch.
        """
        return self.config.distillation * min(1.0, self.index / self.config.distillation_steps)
