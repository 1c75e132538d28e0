"""From the items of a data set to the tensors of a step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import syncmask_kernels as smk


class Batch(NamedTuple):
    """``B`` image-text pairs on the device of the model."""

    pixels: Tensor
    """float32 ``[B, 3, S, S]`` in [-1, 1]"""
    input_ids: Tensor
    """int64 ``[B, T]``, cut after the longest text"""
    attended: Tensor
    """bool ``[B, T]``, False: padding"""
    token_valid: Tensor
    """bool ``[B, T]``, True: a word, neither padding nor special"""
    word_ids: Tensor
    """int64 ``[B, T]``: pieces of one word share an id"""
    item_ids: Tensor
    """int64 ``[B]``: pairs of one item share an id"""
    rows: Tensor
    """int64 ``[B]``, on the CPU: which pairs of the data set these are"""


def make_batch(
    pairs: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    length: int | None = None,
) -> Batch:
    """Cut rows of a `PairDataset`, scale pixels to [-1, 1], move to `device`.

    Texts are cut to `length`, by default that of the longest.
    """
    attended = pairs["input_ids"] != tokenizer.pad_token_id
    if length is None:
        length = int(attended.sum(dim=1).max())
    input_ids = pairs["input_ids"][:, :length].to(device)
    return Batch(
        pairs["image"].to(device).float() / 127.5 - 1,
        input_ids,
        attended[:, :length].to(device),
        smk.token_valid(input_ids, tokenizer.all_special_ids),
        pairs["word_ids"][:, :length].to(device),
        pairs["item_id"].to(device),
        pairs["index"],
    )


def crop_and_flip(pixels: Tensor, smallest: float = 0.8) -> Tensor:
    """Show a random window of each image, enlarged to its size and mirrored half of the time.

    Args:
        pixels: ``[B, 3, S, S]``.
        smallest: least height and width of the window, as a share of the image's.
    """
    rows = pixels.new_empty(len(pixels))
    scale = rows.uniform_(smallest, 1).clone()
    shift_x, shift_y = ((1 - scale) * rows.uniform_(-1, 1) for _ in range(2))
    flip = 1 - 2 * rows.bernoulli_(0.5)
    zero = torch.zeros_like(scale)
    window = torch.stack(
        [torch.stack([scale * flip, zero, shift_x], 1), torch.stack([zero, scale, shift_y], 1)], 1
    )
    grid = F.affine_grid(window, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def derived_seed(seed: int, stream: str, index: int) -> int:
    """An independent seed for the `index`-th use of a `stream`, so that no state must be saved."""
    sequence = np.random.SeedSequence([seed, index, *stream.encode()])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def step_indices(size: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The pairs ``[batch_size]`` of a step, counted from 0.

    Every epoch is a permutation of its own; what does not fill a batch is left out.
    """
    epoch, position = divmod(step, size // batch_size)
    generator = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
    order = torch.randperm(size, generator=generator)
    return order[position * batch_size :][:batch_size]
