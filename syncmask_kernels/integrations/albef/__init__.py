"""ALBEF (salesforce/ALBEF): its pretraining step with these operators.

`patch` gives one model a forward of our own on the host's submodules, queues and parameters; the
functions that it is made of can be called by hand in a forward that differs. Names of modules and
buffers are the host's; see docs/integrations/albef.md.
"""

from syncmask_kernels.integrations.albef.functions import (
    ENCODERS,
    IGNORED,
    TEMPERATURES,
    Encoded,
    HardNegatives,
    MaskedWords,
    contrast,
    cross_attention,
    encode,
    enqueue_keys_,
    fused_matching_loss,
    hard_negatives,
    matching_loss,
    mlm_loss,
    random_words,
    sync_masks,
    sync_words,
    teacher_attention,
    update_teacher_,
)
from syncmask_kernels.integrations.albef.patching import patch
from syncmask_kernels.integrations.bert_attention import capture_attention
from syncmask_kernels.integrations.mlm import masked_lm_loss
from syncmask_kernels.integrations.replacing import Patched, unpatch

__all__ = [
    "ENCODERS",
    "IGNORED",
    "TEMPERATURES",
    "Encoded",
    "HardNegatives",
    "MaskedWords",
    "Patched",
    "capture_attention",
    "contrast",
    "cross_attention",
    "encode",
    "enqueue_keys_",
    "fused_matching_loss",
    "hard_negatives",
    "masked_lm_loss",
    "matching_loss",
    "mlm_loss",
    "patch",
    "random_words",
    "sync_masks",
    "sync_words",
    "teacher_attention",
    "unpatch",
    "update_teacher_",
]
