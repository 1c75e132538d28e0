"""A training step of BERT with cross-attention, of `transformers`, whose teacher chooses words."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import syncmask_kernels as smk
from benchmarks.measure import DEVICE
from benchmarks.report import Case

pytest.importorskip("transformers", minversion="5")

from transformers import BertConfig, BertForMaskedLM

from syncmask_kernels.integrations.transformers import collect_maps, masked_lm_loss

# ALBEF's vocabulary, caption and image; half its width and depth.
PAIRS, WORDS, KEYS, VOCABULARY, LAYER, MASK = 16, 30, 257, 30_522, 5, 103
CONFIG = BertConfig(
    vocab_size=VOCABULARY,
    hidden_size=384,
    num_attention_heads=6,
    num_hidden_layers=6,
    intermediate_size=1536,
    is_decoder=True,
    add_cross_attention=True,
)
CONFIG.is_causal = False  # words see each other both ways


def make_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    length = torch.randint(8, WORDS + 1, (PAIRS, 1), generator=generator)
    ids = torch.randint(MASK + 1, VOCABULARY, (PAIRS, WORDS), generator=generator)
    attended = torch.arange(WORDS) < length
    image = torch.randn(PAIRS, KEYS, CONFIG.hidden_size, generator=generator)
    return {
        "input_ids": ids.where(attended, 0).to(DEVICE),
        "attention_mask": attended.to(DEVICE),
        "encoder_hidden_states": image.to(DEVICE),
    }


def models() -> tuple[Any, Any]:
    torch.manual_seed(0)
    student = BertForMaskedLM(CONFIG).train().to(DEVICE)
    return student, copy.deepcopy(student).eval()


def eager_map(teacher: Any, given: dict[str, Any]) -> Tensor:
    teacher.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = teacher.bert(**given, output_attentions=True).cross_attentions
    return attentions[LAYER].mean(dim=1)[..., 1:]


def collected_map(teacher: Any, given: dict[str, Any]) -> Tensor:
    teacher.set_attn_implementation("syncmask")
    with torch.no_grad(), collect_maps(teacher.bert, [LAYER]) as maps:
        teacher.bert(**given)
    return maps[LAYER]


def bench_transformers_teacher(compare: Callable[..., None]) -> None:
    _, teacher = models()
    given = make_inputs()

    def no_map(_: Any) -> Tensor:
        teacher.set_attn_implementation("sdpa")
        return teacher.bert(**given).last_hidden_state

    expected = eager_map(teacher, given)
    compare(
        Case("teacher's map", (PAIRS, WORDS, KEYS), torch.float32, "of one of 6 layers"),
        {
            "SDPA, no map": no_map,
            "eager, output_attentions": lambda _: eager_map(teacher, given),
            "syncmask": lambda _: collected_map(teacher, given),
        },
        [given["input_ids"], given["input_ids"]],
        lambda found: torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6),
    )


def bench_transformers_step(compare: Callable[..., None]) -> None:
    student, teacher = models()
    for part in student.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0  # so that losses can be compared
    given = make_inputs()
    valid = smk.token_valid(given["input_ids"], [0])
    seed = torch.tensor([1, 2], device=DEVICE)

    def masked(found: Tensor) -> tuple[dict[str, Any], Tensor, Tensor]:
        chosen = smk.sync_topk_mask(found.unsqueeze(1), valid, skip_keys=0)
        words, labels = smk.mask_tokens(
            given["input_ids"], chosen.token_mask, mask_id=MASK, vocab_size=VOCABULARY, seed=seed
        )
        return given | {"input_ids": words}, labels, chosen.token_ids

    def step(loss_of: Callable[[], Tensor]) -> Callable[[Any], Tensor]:
        def call(_: Any) -> Tensor:
            student.zero_grad()
            with torch.enable_grad():
                loss = loss_of()
                loss.backward()
            return loss.detach()

        return call

    def encoder_alone() -> Tensor:
        words, _, _ = masked(collected_map(teacher, given))
        return student.bert(**words).last_hidden_state.mean()

    def own() -> Tensor:
        words, labels, _ = masked(eager_map(teacher, given))
        return student(**words, labels=labels).loss

    def gathered_by_hand() -> Tensor:
        words, labels, _ = masked(eager_map(teacher, given))
        known = labels != -100
        return F.cross_entropy(student.cls(student.bert(**words)[0][known]), labels[known])

    def ours() -> Tensor:
        words, labels, ids = masked(collected_map(teacher, given))
        hidden = student.bert(**words).last_hidden_state
        return masked_lm_loss(student.cls.predictions, hidden, labels, ids=ids)

    expected = step(own)(None)
    compare(
        Case("training step", (PAIRS, WORDS, KEYS), torch.float32, "BERT, half size"),
        {
            "no head": step(encoder_alone),
            "transformers": step(own),
            "rows gathered by hand": step(gathered_by_hand),
            "syncmask": step(ours),
        },
        [given["input_ids"], given["input_ids"]],
        lambda loss: torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0),
    )
