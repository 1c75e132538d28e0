"""GRIT-VLP, FashionSAP and the encoders of SIMLA and BLIP at a small size, where clones are."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import nn

from tests.hosts.albef import TOKENIZER, Size, bert_checkpoint, bert_config, small_images
from tests.hosts.loading import folder_of, load

GRIT = "SYNCMASK_GRIT_VLP", "github.com/jaeseokbyun/GRIT-VLP"
FASHIONSAP = "SYNCMASK_FASHIONSAP", "github.com/hssip/FashionSAP"
SIMLA = "SYNCMASK_SIMLA", "github.com/codezakh/SIMLA"
BLIP = "SYNCMASK_BLIP", "github.com/salesforce/BLIP"
REPLACE_KINDS = 2


def _config(tmp_path: Path, size: Size) -> dict[str, Any]:
    return {
        "mlm_probability": 0.5,
        "embed_dim": size.embed,
        "image_res": size.image,
        "vision_width": size.width,
        "bert_config": str(bert_config(tmp_path, size)),
        "queue_size": size.queue,
        "momentum": 0.9,
        "temp": 0.07,
    }


def real_grit(tmp_path: Path, size: Size) -> nn.Module:
    host = load(folder_of(*GRIT), "models.model_pretrain_GRIT_VLP")
    config = _config(tmp_path, size)
    encoder = bert_checkpoint(host, Path(config["bert_config"]))
    with small_images(host, size):
        return host.ALBEF_Base(encoder, TOKENIZER, config, init_deit=False)


def real_groups() -> ModuleType:
    """GRIT-VLP's `models/GRIT_utils.py`."""
    return load(folder_of(*GRIT), "models.GRIT_utils")


def real_fashionsap(tmp_path: Path, size: Size) -> nn.Module:
    host = load(folder_of(*FASHIONSAP), "models.model_fashion_pretrain")
    with small_images(host, size):
        return host.FashionSAP(
            _config(tmp_path, size), SimpleNamespace(replace_kind_num=REPLACE_KINDS)
        )


def real_med(host: tuple[str, str]) -> ModuleType:
    """`models/med.py` of SIMLA or BLIP."""
    return load(folder_of(*host), "models.med")


def real_xbert(host: tuple[str, str]) -> ModuleType:
    """`models/xbert.py` of GRIT-VLP, FashionSAP or SIMLA."""
    return load(folder_of(*host), "models.xbert")


def real_masked_images(size: Size) -> nn.Module:
    """SIMLA's image encoder, which takes a mask of patches."""
    vit = load(folder_of(*SIMLA), "models.vit")
    return vit.VisionTransformer(
        img_size=size.image,
        patch_size=16,
        embed_dim=size.width,
        depth=size.image_layers,
        num_heads=size.heads,
        norm_layer=nn.LayerNorm,
    )
