"""Sizes of the models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ModelConfig:
    """Sizes of the encoders. The defaults learn in minutes on two cores; the paper's are unknown.

    An ALBEF-sized model is ``image_size=256, patch_size=16, width=768, heads=12, image_layers=12,
    text_layers=6, fusion_layers=6, image_fusion_layers=6, projection=256``.
    """

    image_size: int = field(default=64, metadata={"help": "Height and width of the image."})
    patch_size: int = field(default=8, metadata={"help": "Height and width of a patch."})
    max_tokens: int = field(default=32, metadata={"help": "Longest text in tokens; rest is cut."})
    width: int = field(default=96, metadata={"help": "Hidden size of every encoder."})
    heads: int = field(default=4, metadata={"help": "Attention heads of every layer."})
    image_layers: int = field(default=3, metadata={"help": "Layers of the image encoder."})
    text_layers: int = field(default=1, metadata={"help": "Layers of the text encoder."})
    fusion_layers: int = field(default=2, metadata={"help": "Fusion layers, text queries image."})
    image_fusion_layers: int = field(
        default=1, metadata={"help": "Fusion layers of masked image modelling, image queries text."}
    )
    projection: int = field(default=64, metadata={"help": "Size of the contrastive features."})
    queue_size: int = field(
        default=0, metadata={"help": "Past pairs that the contrastive loss looks back on."}
    )
    mim_target: Literal["default", "pixels", "norm_pixels", "features", "codes"] = field(
        default="default",
        metadata={"help": "What masked patches are told by. Default: codes in SIMLA, else pixels."},
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout of hidden states, attention."})

    def __post_init__(self) -> None:
        sizes = ("image_size", "patch_size", "max_tokens", "width", "heads", "image_layers")
        for name in (*sizes, "text_layers", "fusion_layers", "image_fusion_layers", "projection"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size {self.patch_size}, "
                f"got {self.image_size}"
            )
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads {self.heads}, got {self.width}")
        if self.queue_size < 0:
            raise ValueError(f"queue_size must be at least 0, got {self.queue_size}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2
