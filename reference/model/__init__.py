"""The models at any size: see `reference.model.syncmask`, `.sycoca` and `.simla`."""

from reference.model.config import ModelConfig
from reference.model.dual import DualEncoder
from reference.model.simla import SimlaModel
from reference.model.sycoca import SyCoCaModel
from reference.model.syncmask import SyncMaskModel

__all__ = ["DualEncoder", "ModelConfig", "SimlaModel", "SyCoCaModel", "SyncMaskModel"]
