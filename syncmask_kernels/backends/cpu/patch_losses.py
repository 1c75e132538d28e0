"""Calls of the C++ kernels of patch losses (`csrc/cpu/patch_losses.cpp`)."""

from __future__ import annotations

from syncmask_kernels.backends import patch_losses_calls

masked_patch_loss, masked_patch_loss_backward = patch_losses_calls.define("cpu")
