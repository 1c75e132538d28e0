"""What the records of a data set say of its images."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class MissingRecords(ValueError):
    """The records of a data set do not say what a task needs."""


def column(records: Sequence[dict[str, Any]], key: str) -> list[str]:
    """The value of `key` in each record.

    Raises:
        MissingRecords: a record lacks it.
    """
    lacking = sum(key not in record for record in records)
    if lacking:
        keys = sorted(set().union(*records))
        raise MissingRecords(
            f"{lacking} of {len(records)} records have no '{key}' (there are: {', '.join(keys)})"
        )
    return [str(record[key]) for record in records]


def numbered(values: Iterable[Hashable]) -> Tensor:
    """int64: equal values get equal numbers, from 0 in the order of their first use.

    >>> numbered(["red", "blue", "red"])
    tensor([0, 1, 0])
    """
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(value, len(numbers)) for value in values])
