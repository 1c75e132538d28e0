"""The SyncMask model at any size: see `reference.model.syncmask`."""

from reference.model.config import ModelConfig
from reference.model.syncmask import SyncMaskModel

__all__ = ["ModelConfig", "SyncMaskModel"]
