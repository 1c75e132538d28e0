"""Contrast with a queue of momentum keys, and filling that queue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from syncmask_kernels import _checks, backends
from syncmask_kernels.backends.eager.attention import product
from syncmask_kernels.backends.queue_losses_request import Keys


class _Contrast(torch.autograd.Function):
    """Row losses [B] of queries [B, D]: cross entropy with the positives and the teacher's softmax.

    The gradient, where it is wanted, is formed in the forward pass, in which the keys are at hand;
    the backward pass reads none, so the queue may change before it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        run: Any,
        teacher: Tensor | None,
        keys: Keys,
        alpha: float | Tensor,
    ) -> Tensor:
        losses: Tensor
        losses, slope = run(queries, teacher, keys, alpha, ctx.needs_input_grad[0])
        ctx.save_for_backward(slope)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return grad.unsqueeze(1) * slope, None, None, None, None


def _check_pair(names: tuple[str, str], pair: tuple[Tensor, Tensor], first: Tensor) -> None:
    """Image and text, [B, D] as `image_feat`."""
    for name, value in zip(names, pair, strict=True):
        _checks.floating(name, value, "[B, D]")
        _checks.shape(name, value, "[B, D]", first.shape)
        _checks.same_device(name, value, "image_feat", first)


def _check_queue(name: str, queue: Tensor, width: int, columns: int | None, of: Tensor) -> None:
    _checks.floating(name, queue, "[D, Q]")
    _checks.shape(name, queue, "[D, Q]", (width, queue.shape[1] if columns is None else columns))
    _checks.same_device(name, queue, "the features", of)


def _check_weights(temperature: float | Tensor, alpha: float | Tensor, beside: Tensor) -> None:
    if isinstance(temperature, Tensor):
        _checks.floating("temperature", temperature)
        _checks.shape("temperature", temperature, "one value", ())
        _checks.same_device("temperature", temperature, "the features", beside)
    else:
        _checks.number("temperature", temperature)
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
    if isinstance(alpha, Tensor):
        _checks.floating("alpha", alpha)
        _checks.shape("alpha", alpha, "one value", ())
        _checks.same_device("alpha", alpha, "the features", beside)
    else:
        _checks.fraction("alpha", alpha)


def queue_contrastive_loss(
    image_feat: Tensor,
    text_feat: Tensor,
    image_key: Tensor,
    text_key: Tensor,
    image_queue: Tensor,
    text_queue: Tensor,
    temperature: float | Tensor,
    *,
    alpha: float | Tensor = 0.0,
    item_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Image-text contrast (ITC) of a batch with its momentum keys and a queue of earlier ones.

    Each image is compared with the B texts of `text_key` and the Q of `text_queue`, each text with
    the images likewise; the loss is the mean of both cross entropies. The queue is read where it
    lies, neither cloned nor concatenated; one buffer holds the logits of a direction, the gradient
    takes their place, and nothing of their size is kept. As the gradient is formed in the forward
    pass, `enqueue_` may follow before the backward pass.

    Args:
        image_feat: ``[B, D]`` floating features of the images, normalised as the host does.
        text_feat: ``[B, D]`` features of their texts.
        image_key: ``[B, D]`` features of the same images by the momentum model: a constant.
        text_key: ``[B, D]`` likewise of the texts.
        image_queue: ``[D, Q]`` floating, keys of earlier images in its columns (ALBEF's layout), in
            a type of its own. Q may be 0.
        text_queue: ``[D, Q]`` keys of the texts that belong to them.
        temperature: what similarities are divided by, a positive float or a tensor of one value,
            learned or not.
        alpha: weight of the momentum model's softmax (at the same temperature) in the targets,
            ``(1 - alpha) positives + alpha softmax``; a float or a tensor of one value (a schedule
            without recompiling). Default 0: the teacher's similarities are not computed.
        item_ids: ``[B]`` int64. All keys of an id are positives of its rows, with equal shares.
            Default: the own key alone.
        queue_ids: ``[Q]`` int64 ids of the columns, any unused id (ALBEF's -100) for empty ones.
            Default: none in the queue is a positive.

    Returns:
        tuple: the loss, one value, and ``sim_i2t``, ``sim_t2i`` ``[B, B]``, the similarities with
        the keys of the batch divided by the temperature, which hard negatives are drawn from. All
        are float32 (float64 where an input is). Gradients flow to the features and the temperature.
        Over an empty batch the loss is 0 with zero gradients.

    Raises:
        TypeError: types do not fit.
        ValueError: shapes or devices do not fit, `temperature` is not positive, `alpha` is outside
            ``[0, 1]``, or `queue_ids` comes without `item_ids`.

    Products are taken in float32 (float64 where an input is), under autocast too. Deterministic,
    as far as torch's own matrix product is; no host sync; once differentiable.

    Source: ALBEF `models/model_pretrain.py` (soft targets) and `model_retrieval.py` (positives by
    id).

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> image, text = torch.eye(2, 4), torch.eye(2, 4)
        >>> queue = torch.zeros(4, 6)
        >>> loss, sim_i2t, _ = smk.queue_contrastive_loss(
        ...     image, text, image, text, queue, queue, temperature=0.5
        ... )
        >>> loss, sim_i2t  # log(e^2 + 7) - 2
        (tensor(0.6665), tensor([[2., 0.],
                [0., 2.]]))
    """
    _checks.floating("image_feat", image_feat, "[B, D]")
    features, own_keys = (image_feat, text_feat), (image_key, text_key)
    _check_pair(("image_feat", "text_feat"), features, image_feat)
    _check_pair(("image_key", "text_key"), own_keys, image_feat)
    batch, width = image_feat.shape
    _check_queue("image_queue", image_queue, width, None, image_feat)
    columns = image_queue.shape[1]
    _check_queue("text_queue", text_queue, width, columns, image_feat)
    _check_weights(temperature, alpha, image_feat)
    if item_ids is not None:
        _checks.ids("item_ids", item_ids, "[B]", (batch,), "image_feat", image_feat)
    if queue_ids is not None:
        _checks.ids("queue_ids", queue_ids, "[Q]", (columns,), "image_feat", image_feat)
    if queue_ids is not None and item_ids is None:
        raise ValueError("queue_ids must come with item_ids, got queue_ids alone")
    wide = torch.float32
    for tensor in (*features, *own_keys, image_queue, text_queue):
        wide = torch.promote_types(wide, tensor.dtype)
    ids = torch.arange(batch, device=image_feat.device) if item_ids is None else item_ids
    images, texts = (
        Keys(key.detach().to(wide), queue.detach(), ids, queue_ids)
        for key, queue in ((image_key, image_queue), (text_key, text_queue))
    )
    if isinstance(temperature, Tensor):
        temperature = temperature.to(wide)
    distilled = isinstance(alpha, Tensor) or alpha > 0
    run = backends.choose("queue_contrastive_loss", image_feat, images)
    loss, sims = image_feat.new_zeros((), dtype=wide), []
    for feature, own, others in zip(features, (images, texts), (texts, images), strict=True):
        queries = feature.to(wide) / temperature
        sims.append(product(queries, others.batch.T))
        if batch == 0:
            loss = loss + queries.sum()
            continue
        with torch.no_grad():
            teacher = own.batch / temperature if distilled else None
        loss = loss + _Contrast.apply(queries, run, teacher, others, alpha).mean() / 2
    return loss, sims[0], sims[1]


def _of_all_ranks(rows: Tensor) -> Tensor:
    """rows [B, ...] of every process, in the order of ranks; of this one where there is no group"""
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    rows = rows.contiguous()
    gathered = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, rows)
    return torch.cat(gathered)


def enqueue_(
    queue: Tensor,
    pointer: Tensor,
    keys: Tensor,
    ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
) -> None:
    """Put keys into the columns of a queue, over its oldest ones, in place.

    Where `torch.distributed` is initialised the keys of all ranks are put in, in the order of
    ranks, so that queues that were equal stay equal; a process alone needs no process group. Every
    rank must bring as many keys as the others (as hosts' samplers see to), because learning the
    counts would wait for the device; from batch to batch their number may change.

    Args:
        queue: ``[D, Q]`` floating, Q > 0 (a buffer in ALBEF's layout). Its storage is kept.
        pointer: ``[1]`` int64, the column to write next; it moves on by the number of keys, modulo
            Q. Queues that share a pointer: hand all but the last call ``pointer.clone()``.
        keys: ``[B, D]`` floating, cast to the type of the queue. Any B: columns wrap around, and of
            more than Q keys the last Q stay.
        ids: ``[B]`` int64 item ids of the keys, with `queue_ids`.
        queue_ids: ``[Q]`` int64, written like the queue (of ALBEF's ``[1, Q]`` its only row).

    Raises:
        TypeError: types do not fit.
        ValueError: shapes or devices do not fit, Q is 0, or `ids` comes without `queue_ids`.

    Deterministic, without gradient, no host sync.

    Source: ALBEF `_dequeue_and_enqueue`, which wants Q to be a multiple of the batch.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> queue, pointer = torch.zeros(1, 4), torch.tensor([3])
        >>> smk.enqueue_(queue, pointer, torch.tensor([[7.0], [8.0]]))
        >>> queue, pointer
        (tensor([[8., 0., 0., 7.]]), tensor([1]))
    """
    _checks.floating("queue", queue, "[D, Q]")
    width, columns = queue.shape
    if columns == 0:
        raise ValueError(f"queue must be [D, Q] with Q > 0, got shape {tuple(queue.shape)}")
    _checks.dtype("pointer", pointer, torch.int64)
    _checks.shape("pointer", pointer, "[1]", (1,))
    _checks.same_device("pointer", pointer, "queue", queue)
    _checks.floating("keys", keys, "[B, D]")
    _checks.shape("keys", keys, "[B, D]", (keys.shape[0], width))
    _checks.same_device("keys", keys, "queue", queue)
    if (ids is None) != (queue_ids is None):
        raise ValueError("ids and queue_ids must be given together, got one of them")
    if ids is not None and queue_ids is not None:
        _checks.ids("ids", ids, "[B]", keys.shape[:1], "queue", queue)
        _checks.ids("queue_ids", queue_ids, "[Q]", (columns,), "queue", queue)
        ids = _of_all_ranks(ids)
    keys = _of_all_ranks(keys.detach())
    backends.choose("enqueue_", queue)(queue, pointer, keys, ids, queue_ids)
