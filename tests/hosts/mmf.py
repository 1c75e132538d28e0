"""The real FashionViL at a small size: its own encoder, losses and tasks, without the rest of MMF.

MMF wants torch 1.9 and transformers 4.10. The files that FashionViL's pretraining is made of run
with later ones when what they import besides is stood in for.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from tests.hosts.fashionvil import FEATURES, HEADS, VOCABULARY, WIDTH
from tests.hosts.loading import folder_of

VARIABLE, URL = "SYNCMASK_FASHIONVIL", "github.com/BrandonHanx/mmf"
PRETRAINING = "mmf.models.fashionvil.pretraining"
FOLDERS = ("mmf", "mmf.models", "mmf.models.fashionvil", "mmf.modules", "mmf.utils")


class NormalizationLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_s = nn.Parameter(torch.tensor([4.0]))

    def forward(self, x: Any) -> Any:
        return self.norm_s * F.normalize(x, dim=-1)


class Config(dict):
    """Of OmegaConf, which is not needed otherwise."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


def _keep(*names: Any) -> Any:
    return lambda registered: registered


def _stand_ins(folder: Path) -> dict[str, ModuleType]:
    from transformers.models.bert import modeling_bert
    from transformers.models.roberta import modeling_roberta

    def of(name: str, **attributes: Any) -> ModuleType:
        module = ModuleType(name)
        vars(module).update(attributes)
        return module

    registry = SimpleNamespace(register_loss=_keep)
    unused = dict.fromkeys(("AttentionLayer", "SelfAttention", "SelfGuidedAttention"), object)
    made = [
        of("mmf.common.registry", registry=registry),
        of("mmf.models.composition", NormalizationLayer=NormalizationLayer),
        of("mmf.modules.attention", **unused),
        of("mmf.modules.bottleneck", MovieBottleneck=object),
        of("mmf.modules.layers", AttnPool1d=object, Identity=object),
        of("mmf.utils.build", build_image_encoder=None),
        of("mmf.utils.configuration", get_mmf_cache_dir=str),
        of(
            "mmf.utils.distributed",
            gather_tensor_along_batch_with_backward=lambda tensor: tensor,
            get_rank=lambda: 0,
        ),
        of("mmf.utils.file_io", PathManager=object),
        of("mmf.utils.logger", log_class_usage=_keep),
        of("mmf.utils.patch", restore_saved_modules=None, safecopy_modules=None),
        of("mmf.utils.vocab", Vocab=object),
        of(
            "omegaconf",
            MISSING=None,
            OmegaConf=SimpleNamespace(to_container=lambda config, resolve: dict(config)),
        ),
    ]
    for name in FOLDERS:  # without their __init__, which imports all of MMF
        made.append(of(name, __path__=[str(folder / name.replace(".", "/"))]))
    aliases = {
        "transformers.modeling_bert": modeling_bert,
        "transformers.modeling_roberta": modeling_roberta,
    }
    return {module.__name__: module for module in made} | aliases


def load() -> ModuleType:
    """`mmf/models/fashionvil/pretraining.py`; skips where there is no clone."""
    folder = folder_of(VARIABLE, URL)
    with mock.patch.dict(sys.modules, _stand_ins(folder)):
        return importlib.import_module(PRETRAINING)


def real_fashionvil(
    tmp_path: Path,
    *,
    layers: int = 2,
    dropout: float = 0.0,
    double_view: bool = False,
    **sizes: int,
) -> nn.Module:
    """The host's own model; `sizes` are entries of its configuration."""
    host = load()
    config = {
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * WIDTH,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": dropout,
        "visual_embedding_dim": FEATURES,
        **sizes,
    }
    bert = host.BertForPreTraining(host.BertForPreTraining.config_class(**config))
    checkpoint = tmp_path / "bert"
    bert.save_pretrained(checkpoint)
    options = {
        "bert_model_name": str(checkpoint),
        "output_attentions": False,
        "output_hidden_states": False,
        "bypass_transformer": True,
        "task_for_inference": "itc",
        "tasks": ["itc", "itm", "mlm", "mpfr"],
        "double_view": double_view,
    }
    return host.FashionViLForPretraining(Config(config | options))
