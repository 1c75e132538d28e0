"""The launches of Triton kernels that are compiled ahead of time, as the operators make them."""

from __future__ import annotations

from typing import Any

import torch

from syncmask_kernels.backends import overloads
from syncmask_kernels.backends.overloads.negatives import MODES
from syncmask_kernels.backends.patch_losses_request import KINDS
from syncmask_kernels.backends.request import TOKEN_SCORES, Count, Scoring, SyncRequest
from syncmask_kernels.backends.triton import (
    attention,
    losses_rows,
    losses_streamed,
    masking,
    negatives,
    patch_losses,
    queue_losses,
    scores,
    selection,
)
from syncmask_kernels.backends.triton.launch import Launch


def sync_launches(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    rules: tuple[str, str] = ("mean", "max"),
    everything: bool = False,
    own_scores: bool = False,
) -> list[Launch]:
    batch, heads, words, keys = shape
    patches = keys - 1
    given: dict[str, Any] = dict.fromkeys(SyncRequest._fields[3:])
    k = lse = patch_valid = None
    if everything:
        k = torch.empty(batch, dtype=torch.int64)
        lse = torch.empty(1, batch, heads, words)
        patch_valid = torch.empty(batch, patches, dtype=torch.bool)
        given["patch_noise"] = torch.empty(batch, patches)
        given["token_noise"] = torch.empty(batch, words)
        given["word_ids"] = torch.empty(batch, words, dtype=torch.int64)
    if own_scores:
        given["patch_scores"] = torch.empty(batch, patches)
        given["token_scores"] = torch.empty(batch, words)
    attn = torch.empty(1, *shape, dtype=dtype)
    token_valid = torch.empty(batch, words, dtype=torch.bool)
    request = SyncRequest(
        Scoring(attn, lse, token_valid, patch_valid, *rules, 1, 0),
        Count(k, 1, 2, patches // 2),
        Count(None, 3, 20, words),
        **given,
    )
    return selection.sync_launches(*overloads.selection.sync_arguments(request))[1]


def topk_launches(size: int, dtype: torch.dtype) -> list[Launch]:
    return selection.topk_launches(
        torch.empty(64, size, dtype=dtype), None, None, 1, 2, size, True
    )[1]


def attention_inputs(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """q, k and v of one layer, and valid keys."""
    batch, heads, words, keys, dim = shape
    q = torch.empty(1, batch, heads, words, dim, dtype=dtype)
    k, v = torch.empty(2, 1, batch, heads, keys, dim, dtype=dtype)
    return q, k, v, torch.empty(batch, keys, dtype=torch.bool)


def average_launches(shape: tuple[int, ...], dtype: torch.dtype) -> list[Launch]:
    return attention.average_launches(torch.empty(shape, dtype=dtype), 1)[1]


def map_launches(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, output: bool
) -> list[Launch]:
    q, k, v, valid = attention_inputs(shape, dtype)
    return attention.map_launches(q, k, v if output else None, valid, 0.125, 1)[2]


def score_qk_launches(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, rule: str, everything: bool
) -> list[Launch]:
    batch, heads, words, keys, _ = shape
    q, k, _, valid = attention_inputs(shape, dtype)
    distance = torch.empty(1, batch, heads, keys) if everything else None
    masks = torch.empty(batch, words, dtype=torch.bool), valid[:, 1:] if everything else None
    return scores.score_qk_launches(
        q, k, distance, valid, *masks, 0.125, -1, TOKEN_SCORES.index(rule), 1
    )[1]


def similarity_launches(batch: int, dtype: torch.dtype) -> list[Launch]:
    patches, tokens = (torch.empty(batch, n, 512, dtype=dtype) for n in (256, 30))
    return scores.similarity_launches(patches, tokens, None)[1]


def masking_launches(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Launch]:
    batch, positions, width, columns = shape
    x, token = torch.empty(batch, positions, columns, dtype=dtype), torch.empty(columns)
    mask = torch.empty(batch, positions, dtype=torch.bool)
    ids = torch.empty(batch, width, dtype=torch.int64)
    return [
        *masking.mask_patches_launches(x, mask, token)[1],
        *masking.mask_patches_launches(x, mask, None)[1],
        *masking.masked_sum_launches(x, mask)[1],
        *masking.gather_launches(x, ids, 0.0)[1],
        *masking.scatter_launches(x[:, :width], ids, positions)[1],
    ]


def patch_launches(side: int, dtype: torch.dtype, kind: str, by_ids: bool = False) -> list[Launch]:
    """The loss of 64 images in 256 patches, normalised, and its gradient."""
    image = torch.empty(64, 3, 16 * side, 16 * side)
    pred = torch.empty(64, 256, 3 * side**2, dtype=dtype)
    chosen = torch.empty(64, 256, dtype=torch.bool)
    if by_ids:
        chosen = torch.empty(64, 64, dtype=torch.int64)
    options = KINDS.index(kind), side, True, by_ids
    outputs, launches = patch_losses.loss_launches(pred, image, chosen, *options, 0)
    given = *outputs, pred, image, chosen
    return launches + patch_losses.gradient_launches(*given, *options)[1]


def queue_launches(batch: int, queue: int, everything: bool) -> list[Launch]:
    logits = torch.empty((2 if everything else 1) * batch * (batch + queue))
    own_ids, queue_ids = (torch.empty(n, dtype=torch.int64) for n in (batch, queue))
    options = (
        (queue_ids, queue, True, 0.0, torch.empty(()))
        if everything
        else (None, queue, False, 0.0, None)
    )
    return queue_losses.slope_launches(logits, own_ids, *options)[1]


def negatives_launches(
    shape: tuple[int, int], dtype: torch.dtype, mode: str, everything: bool = False
) -> list[Launch]:
    one, other = (torch.empty(n, dtype=torch.int64) for n in shape)
    bars: list[Any] = [one, torch.empty(shape, dtype=torch.bool), one, other]
    seed = torch.empty(2, dtype=torch.int64) if mode == "multinomial" else None
    return negatives.negatives_launches(
        torch.empty(shape, dtype=dtype),
        *(bars if everything else [None] * 4),
        *(MODES.index(mode), 0.1, 1, 3, seed, None),
    )[1]


def row_launches(
    shape: tuple[int, int], dtype: torch.dtype, smoothing: float = 0.0, teacher: str = ""
) -> list[Launch]:
    logits, ids = torch.empty(shape, dtype=dtype), torch.empty(shape[0], dtype=torch.int64)
    logits_t = logits if teacher == "head" else None
    soft = torch.empty(shape) if teacher == "soft" else None
    sums, one = torch.empty(shape[0]), torch.empty(())
    return [
        losses_rows.row_launch(logits, logits_t, soft, ids, ids, sums, one, sums, smoothing),
        losses_rows.scale_launch(logits, one),
    ]


def stream_launches(
    shape: tuple[int, int], dtype: torch.dtype, smoothing: float = 0.0, teacher: str = ""
) -> list[Launch]:
    rows, count = torch.empty(1920, dtype=torch.int64), torch.empty((), dtype=torch.int64)
    hidden, weight = torch.empty(1920, shape[1], dtype=dtype), torch.empty(shape, dtype=dtype)
    bias = torch.empty(shape[0], dtype=dtype)
    soft = torch.empty(1920, shape[0]) if teacher == "soft" else None
    head_t = (hidden, weight, bias) if teacher == "head" else (None, None, None)
    call = losses_streamed.Rows(
        hidden, weight, bias, rows, rows, soft, *head_t, torch.empty(()), smoothing
    )
    sums, launch = losses_streamed.stream_launch(call, count)
    back = losses_streamed.gradient_launches(call, count, sums[:5, 0], sums[0, 0], [True] * 3)[1]
    return [launch, *back[:3]]


FP32, BF16 = torch.float32, torch.bfloat16
WORDS = (30_522, 768)
USUAL, ODD, LARGE = (64, 12, 30, 257, 64), (37, 7, 23, 198, 40), (8, 12, 128, 1025, 128)
CASES = {
    "default": lambda: sync_launches((64, 12, 30, 257), FP32),
    "default-bf16": lambda: sync_launches((64, 12, 30, 257), BF16),
    "dual": lambda: sync_launches((37, 7, 23, 198), FP32, ("cls", "dual"), everything=True),
    "dual-bf16": lambda: sync_launches((37, 7, 23, 198), BF16, ("cls", "dual"), everything=True),
    "long": lambda: sync_launches(
        (4, 12, 512, 577), FP32, ("mean", "text_softmax"), everything=True
    ),
    "own": lambda: sync_launches((37, 7, 23, 198), FP32, own_scores=True),
    "topk": lambda: topk_launches(196, FP32),
    "topk-long-bf16": lambda: topk_launches(4096, BF16),
    "average": lambda: average_launches((1, *USUAL[:4]), FP32),
    "output": lambda: map_launches(ODD, FP32, output=True),
    "output-bf16": lambda: map_launches(USUAL, BF16, output=True),
    "qk": lambda: score_qk_launches(ODD, FP32, "dual", everything=True)[1:],
    "qk-bf16": lambda: score_qk_launches(USUAL, BF16, "max", everything=True),
    "qk-large": lambda: score_qk_launches(LARGE, BF16, "dual", everything=False)[1:],
    "similarity": lambda: similarity_launches(64, FP32),
    "queue": lambda: queue_launches(64, 65536, everything=True),
    "queue-hard": lambda: queue_launches(37, 1023, everything=False),
    "similarity-bf16": lambda: similarity_launches(64, BF16),
    "masking": lambda: masking_launches((64, 256, 64, 768), FP32),
    "masking-odd": lambda: masking_launches((37, 197, 50, 771), FP32),
    "masking-bf16": lambda: masking_launches((64, 256, 64, 768), BF16),
    "patches": lambda: patch_launches(16, FP32, "mse"),
    "patches-ids-bf16": lambda: patch_launches(16, BF16, "cosine", by_ids=True),
    "patches-large-bf16": lambda: patch_launches(32, BF16, "smooth_l1"),
    "negatives": lambda: negatives_launches((64, 64), FP32, "multinomial"),
    "negatives-everything": lambda: negatives_launches(
        (256, 2048), FP32, "multinomial", everything=True
    ),
    "negatives-hardest-bf16": lambda: negatives_launches((37, 523), BF16, "hardest"),
    "negatives-semi-hard": lambda: negatives_launches(
        (256, 65536), FP32, "semi_hard", everything=True
    ),
    "rows": lambda: row_launches((288, WORDS[0]), FP32),
    "rows-soft": lambda: row_launches((288, WORDS[0]), FP32, 0.1, "soft"),
    "rows-teacher-bf16": lambda: row_launches((288, WORDS[0]), BF16, 0.1, "head"),
    "stream": lambda: stream_launches(WORDS, FP32),
    "stream-soft-bf16": lambda: stream_launches(WORDS, BF16, 0.1, "soft"),
    "stream-teacher-bf16": lambda: stream_launches(WORDS, BF16, 0.0, "head"),
}
