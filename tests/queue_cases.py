"""Features, keys and queues for queue_contrastive_loss, and what its results are judged by."""

from __future__ import annotations

import torch
from torch.nn import functional as F

import syncmask_kernels as smk
from reference.ops import queue_losses as oracle
from tests.accuracy import assert_as_accurate

NAMES = ("image_feat", "text_feat", "image_key", "text_key", "image_queue", "text_queue")
B, D, Q = 5, 8, 23
ITEMS = torch.tensor([3, 7, 3, 9, 4])


class Case:
    """Random features and keys of length 1; the ids repeat within the batch and in the queue."""

    def __init__(self, dtype=torch.float32, queue_dtype=None, batch=B, queue=Q, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(rows):
            return F.normalize(torch.randn(rows, D, generator=generator), dim=1)

        self.tensors = [normal(batch).to(dtype) for _ in range(4)]
        self.tensors += [normal(queue).T.contiguous().to(queue_dtype or dtype) for _ in range(2)]
        self.temperature = torch.tensor(0.07)
        self.item_ids = ITEMS.repeat(batch)[:batch]
        self.queue_ids = torch.randint(10, (queue,), generator=generator)
        self.queue_ids[queue // 2 :] = -100

    def options(self, names):
        given = {
            "soft": {"alpha": 0.4},
            "teacher alone": {"alpha": 1.0},
            "items": {"item_ids": self.item_ids},
            "queued items": {"item_ids": self.item_ids, "queue_ids": self.queue_ids},
        }
        return {key: value for name in names for key, value in given[name].items()}


def plain(
    image_feat,
    text_feat,
    image_key,
    text_key,
    image_queue,
    text_queue,
    temperature,
    *,
    alpha=0.0,
    item_ids=None,
    queue_ids=None,
):
    """What ALBEF writes, in the type of the input, with a softmax in float32."""
    batch, dtype = image_feat.shape[0], image_feat.dtype
    targets = torch.eye(batch, batch + image_queue.shape[1])
    if item_ids is not None:
        ids = torch.full((image_queue.shape[1],), -1) if queue_ids is None else queue_ids
        targets = (item_ids[:, None] == torch.cat((item_ids, ids))).float()
        targets = targets / targets.sum(dim=1, keepdim=True)
    losses, sims = [], []
    for feat, key, other, queue in (
        (image_feat, image_key, text_key, text_queue),
        (text_feat, text_key, image_key, image_queue),
    ):
        columns = torch.cat((other.T, queue.to(dtype)), dim=1)
        logits = (feat @ columns).float() / temperature
        soft = ((key @ columns).float() / temperature).softmax(dim=1).detach()
        target = (1 - alpha) * targets + alpha * soft
        losses.append(-(logits.log_softmax(dim=1) * target).sum(dim=1).mean())
        sims.append(logits[:, :batch])
    return (losses[0] + losses[1]) / 2, *sims


def gradients(function, case, options, convert=lambda value: value):
    """The results and the gradients of the features and the temperature, by all results."""
    tensors = [convert(x).detach().clone() for x in (*case.tensors, case.temperature)]
    leaves = [tensors[0].requires_grad_(), tensors[1].requires_grad_(), tensors[6].requires_grad_()]
    loss, *sims = function(*tensors, **options)
    slopes = [torch.arange(s.numel()).reshape(s.shape).to(s) / s.numel() ** 2 for s in sims]
    total = loss + sum((s * slope).sum() for s, slope in zip(sims, slopes, strict=True)) / 10
    total.backward()
    return [loss.detach(), *(s.detach() for s in sims), *(x.grad for x in leaves)]


CASES = [
    (),
    ("soft",),
    ("teacher alone",),
    ("items",),
    ("queued items",),
    ("soft", "items"),
    ("soft", "queued items"),
]


def assert_accurate(got, case, options):
    """Results and gradients have at most twice the error of what ALBEF writes in that type."""
    same_type = gradients(plain, case, options)
    truth = gradients(oracle.queue_contrastive_loss, case, options, torch.Tensor.double)
    for value, own, want in zip(got, same_type, truth, strict=True):
        assert_as_accurate(value, own, want, factor=2.0)


def counted():
    """A call whose memory traffic docs/budgets.md has: the loss, and the gradient of both sides."""

    def contrast(image_feat, text_feat, **rest):
        leaves = [x.detach().requires_grad_() for x in (image_feat, text_feat)]
        loss = smk.queue_contrastive_loss(*leaves, temperature=0.1, alpha=0.4, **rest)[0]
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 16)] * 4 + [(16, 4096)] * 2
    drawn = {
        name: torch.randn(shape, generator=generator) / 4
        for name, shape in zip(NAMES, shapes, strict=True)
    }
    return {"queue_contrastive_loss [8, 16] x [16, 4096], soft": (contrast, drawn)}
