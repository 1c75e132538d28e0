"""Pairs that cannot be used: named, counted and left out, until they are too many."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

_SHOWN = 10
_REMEMBERED = 1000


class TooManyBroken(ValueError):
    """A larger share of the pairs is broken than allowed."""


class Broken:
    """What is broken among the pairs that were read from a source.

    Args:
        source: its name.
        most: largest share that may be broken; more raises `TooManyBroken`.
        grace: pairs before which the share is not looked at: it counts as if so many had been read.

    >>> Broken("train", most=0.5).note(read=2, problems=["line 1: no JSON", "line 2: no JSON"])
    Traceback (most recent call last):
    reference.data.broken.TooManyBroken: train: 2 of 2 pairs read are broken, over the 50% that
    max_broken allows
      line 1: no JSON
      line 2: no JSON
    """

    def __init__(self, source: str, most: float, grace: int = 0) -> None:
        self.source, self.most, self.grace = source, most, grace
        self.read = self.count = 0
        self._known: set[str] = set()

    def note(self, read: int, problems: Sequence[str]) -> None:
        """Count pairs that were read, and name those that are broken the first time they are met.

        Args:
            read: how many, broken ones included.
            problems: where and why, of each that is broken.

        Raises:
            TooManyBroken: see `most`.
        """
        self.read += read
        self.count += len(problems)
        found = f"{self.source}: {self.count} of {self.read} pairs read are broken"
        if self.count > self.most * max(self.read, self.grace):
            raise TooManyBroken(
                f"{found}, over the {self.most:.0%} that max_broken allows{_listed(problems)}"
            )
        new = [problem for problem in problems if problem not in self._known]
        if new and len(self._known) < _REMEMBERED:
            self._known.update(new)
            warnings.warn(f"{found} and left out{_listed(new)}", stacklevel=2)


def _listed(problems: Sequence[str]) -> str:
    lines = list(problems[:_SHOWN])
    if len(problems) > _SHOWN:
        lines.append(f"and {len(problems) - _SHOWN} more")
    return "".join(f"\n  {line}" for line in lines)


def stand_ins(usable: Sequence[bool]) -> list[int]:
    """Which pair of a batch takes each place: its own, or the next one that is usable.

    >>> stand_ins([True, False, False, True]), stand_ins([True, True, False])
    ([0, 3, 3, 3], [0, 1, 0])
    >>> stand_ins([False])
    []
    """
    good = [place for place, fine in enumerate(usable) if fine]
    if not good:
        return []
    return [next((other for other in good if other >= i), good[0]) for i in range(len(usable))]
