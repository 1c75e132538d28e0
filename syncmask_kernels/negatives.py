"""Hard negatives: one column for each row of a similarity matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from syncmask_kernels import _checks, _host, backends
from syncmask_kernels.backends.overloads.negatives import MODES


class Negatives(NamedTuple):
    """``ids [B]`` int64, the column chosen for each row, and ``found [B]`` bool."""

    ids: Tensor
    found: Tensor


def _check_mode(mode: str, margin: float, quantile: float | None, noise: Tensor | None) -> None:
    _checks.choice("mode", mode, MODES)
    if mode == "semi_hard":
        _checks.number("margin", margin)
    elif margin != 0 or quantile is not None:
        raise ValueError(
            f"margin and quantile are for mode 'semi_hard', got mode {mode!r}, margin={margin}, "
            f"quantile={quantile}"
        )
    if mode != "multinomial" and noise is not None:
        raise ValueError(f"noise is for mode 'multinomial', got mode {mode!r}")
    if quantile is not None:
        _checks.fraction("quantile", quantile)


def _check_items(row_ids: Tensor | None, col_ids: Tensor | None, sim: Tensor) -> None:
    if row_ids is None or col_ids is None:
        raise ValueError("row_ids and col_ids must be given together, got one of them")
    _checks.ids("row_ids", row_ids, "[B]", sim.shape[:1], "sim", sim)
    _checks.ids("col_ids", col_ids, "[N]", sim.shape[1:], "sim", sim)


def _check_noise(
    noise: Tensor, seed: Tensor | None, generator: torch.Generator | None, sim: Tensor
) -> None:
    if seed is not None or generator is not None:
        raise ValueError("at most one of generator, seed and noise must be given, got more")
    _checks.floating("noise", noise)
    _checks.shape("noise", noise, "the shape of sim", sim.shape)
    _checks.same_device("noise", noise, "sim", sim)


def sample_negatives(
    sim: Tensor,
    *,
    positive: Tensor | None = None,
    exclude: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    mode: str = "multinomial",
    margin: float = 0.0,
    quantile: float | None = None,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
    noise: Tensor | None = None,
) -> Negatives:
    """Choose a hard negative for each row, for image-text matching.

    A column is a candidate of a row unless it is the row's positive, is excluded, carries the id of
    the row, or has a similarity of NaN or -inf (whose softmax is 0).

    Args:
        sim: ``[B, N]`` floating logits (similarity / temperature), before any softmax; N may cover
            the keys of all ranks.
        positive: ``[B]`` int64, each row's own column. Default ``arange(B)`` where B = N, else
            none; required for ``"semi_hard"``.
        exclude: ``[B, N]`` bool, True for columns that are no candidates.
        row_ids: ``[B]`` int64 ids of the items of the rows, with `col_ids` ``[N]``: a column with
            the row's id (another view of the product, another caption of the image) is no
            candidate.
        col_ids: see `row_ids`.
        mode: ``"multinomial"`` (default) draws a candidate from the softmax of the logits over the
            candidates; ``"hardest"`` takes the most similar one; ``"semi_hard"`` the most similar
            one of those with ``sim < sim[positive] - margin``, and where there is none of those,
            the least similar candidate. Ties go to the lower index.
        margin: see ``"semi_hard"``, in units of `sim`, default 0.
        quantile: for ``"semi_hard"``, which of the candidates below the ceiling to take, by
            similarity: 1 (default) the most similar, 0 the least, else the one of ascending rank
            ``ceil(quantile * count)`` (numpy's ``inverted_cdf``).
        generator: where `seed` is drawn from, on the device of `sim`. Default: torch's own. Modes
            that draw nothing leave it as it is.
        seed: int64 ``[2]`` on the device, instead of a generator; compiled code passes it.
        noise: ``[B, N]`` floating, in the place of the Gumbel noise that is added to the logits (in
            float32, or float64 for float64 `sim`).

    Returns:
        Negatives: ``ids [B]`` int64 and ``found [B]`` bool; a row without a candidate has id 0 and
        found False. No gradient flows.

    Raises:
        TypeError: types do not fit.
        ValueError: shapes, devices, `mode`, `margin` or `quantile` do not fit, one of `row_ids` and
            `col_ids` is missing, more than one of `generator`, `seed` and `noise` is given, or (on
            the CPU) `positive` is outside ``[0, N)``.

    Deterministic given `seed` or `noise`: the draw is a Gumbel-max over the logits, so it follows
    the softmax without computing it and cannot underflow; cell (b, n) takes word ``n % 4`` of the
    Philox4x32-10 counter (n // 4, b, 0, 0), as ``-log(-log(u))``, ``u = (word // 2^9 + 1/2) /
    2^23``. No host sync.

    Source: ALBEF's hard negatives (multinomial), GRIT-VLP's (hardest), FaceNet's semi-hard rule.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> sim = torch.tensor([[9.0, 2.0, 5.0], [4.0, 9.0, 4.0], [1.0, 3.0, 9.0]])
        >>> smk.sample_negatives(sim, mode="hardest")
        Negatives(ids=tensor([2, 0, 1]), found=tensor([True, True, True]))
        >>> items = torch.tensor([7, 7, 8])  # the first two show one product
        >>> smk.sample_negatives(sim, row_ids=items, col_ids=items).ids[:2]
        tensor([2, 2])
    """
    _checks.floating("sim", sim, "[B, N]")
    if mode != "multinomial" or margin != 0 or quantile is not None:
        _check_mode(mode, margin, quantile, noise)
    if row_ids is not None or col_ids is not None:
        _check_items(row_ids, col_ids, sim)
    if positive is not None:
        _checks.ids("positive", positive, "[B]", sim.shape[:1], "sim", sim)
        _host.ids_within("positive", positive, 0, sim.shape[1], "N")
    elif mode == "semi_hard" and sim.shape[0] != sim.shape[1]:
        rows, columns = sim.shape
        raise ValueError(
            f"positive must be given for semi_hard where B != N, got B={rows}, N={columns}"
        )
    if exclude is not None:
        _checks.mask("exclude", exclude, "the shape of sim", sim.shape, "sim", sim)
    if noise is not None:
        _check_noise(noise, seed, generator, sim)
    elif mode == "multinomial":
        seed = _host.philox_seed(seed, generator, sim.device)
    elif seed is not None or generator is not None:
        _host.check_seed(seed, generator, sim.device)
    num, den = (1, 1) if quantile is None else _host.as_fraction(quantile)
    run = backends.choose("sample_negatives", sim, sim)
    if sim.requires_grad:
        sim = sim.detach()
    # In the order of the schema: no adapter of a backend stands between.
    ids = positive, exclude, row_ids, col_ids
    return Negatives(*run(sim, *ids, MODES.index(mode), margin, num, den, seed, noise))


class _Exchange(torch.autograd.Function):
    """Rows to every rank, and as many as it sends from every rank, in the order of ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.sizes = sent, received
        output = rows.new_empty((sum(received), *rows.shape[1:]))
        # Not every backend of torch.distributed knows bool.
        pair = output, rows.contiguous()
        if rows.dtype == torch.bool:
            pair = output.view(torch.uint8), pair[1].view(torch.uint8)
        distributed.all_to_all_single(*pair, received, sent)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        sent, received = ctx.sizes
        return _Exchange.apply(grad, received, sent), None, None


def _exchanged(rows: Tensor, wanted: Tensor) -> Tensor:
    """rows [B, ...], wanted [ranks, B] ids on the CPU -> the rows that this rank wants."""
    rank, batch = distributed.get_rank(), rows.shape[0]
    owners = wanted // max(batch, 1)
    sizes = [(owners == owner).sum(dim=1) for owner in range(len(wanted))]
    # To every rank in turn what it wants of this one; each rank gets its rows in order of owners.
    sent = rows.index_select(0, (wanted % max(batch, 1))[owners == rank].to(rows.device))
    received = _Exchange.apply(sent, sizes[rank].tolist(), [int(size[rank]) for size in sizes])
    places = owners[rank].argsort(stable=True).argsort()
    return received.index_select(0, places.to(rows.device))


def gather_negatives(rows: Tensor, ids: Tensor) -> Tensor:
    """The rows that `ids` names among those of all ranks: what a model needs of its negatives.

    Where `torch.distributed` is initialised, row ``b`` of rank ``r`` has the id ``r * B + b``, as
    in features that were gathered in the order of ranks, and only the chosen rows travel: the
    memory taken is that of `rows`, however many ranks there are. A process alone needs no group.

    Args:
        rows: ``[B, ...]`` of any type: features ``[B, S, D]``, a mask ``[B, S]``. Of the same shape
            and type on every rank (pad captions to one length).
        ids: ``[B]`` int64, columns of `sample_negatives` over the keys of all ranks. On a rank
            alone any number of them.

    Returns:
        Tensor: ``[B, ...]``, the row of each id (of id 0 where none was found). Gradients flow back
        to the rank that a row came from; every rank has to take part in the backward.

    Raises:
        TypeError: types do not fit.
        ValueError: shapes or devices do not fit, or (on the CPU, or with ranks) an id is outside of
            ``[0, ranks * B)``.

    With ranks, the host waits once for the ids, for it has to know how many rows go where;
    gathering the rows of all ranks would not wait, and take the memory and traffic of all of them.

    Source: ALBEF draws negatives from its own rank, BLIP's retrieval from all ranks, whose features
    it gathers.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> features = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> smk.gather_negatives(features, torch.tensor([1, 0]))
        tensor([[3., 4.],
                [1., 2.]])
    """
    _checks.tensor("rows", rows)
    if rows.dim() == 0:
        raise ValueError("rows must be [B, ...], got shape ()")
    _checks.rank("ids", ids, "[B]")
    _checks.dtype("ids", ids, torch.int64)
    _checks.same_device("ids", ids, "rows", rows)
    batch = rows.shape[0]
    if not (distributed.is_available() and distributed.is_initialized()):
        _host.ids_within("ids", ids, 0, batch, "B")
        return rows.index_select(0, ids)
    _checks.shape("ids", ids, "[B]", (batch,))
    gathered = [torch.empty_like(ids) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, ids.contiguous())
    wanted = torch.stack(gathered).cpu()
    _host.ids_within("ids", wanted, 0, wanted.numel(), "ranks * B")
    return _exchanged(rows, wanted)
