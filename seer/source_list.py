"""Several sources of training images as a configuration names them: `NAME WEIGHT PATTERN` each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from seer.errors import UserError


class Source(NamedTuple):
    """A source: its name, its weight in the mixture, and the pattern of its shards."""

    name: str
    weight: float
    pattern: str

    def __str__(self) -> str:
        return f"{self.name} {self.weight!r} {self.pattern}"


def read_sources(mixture: Sequence[str]) -> list[Source]:
    """What `data.mixture` names.

    Raises:
        UserError: an entry of another form, a weight that is no positive number, a name that comes twice.
    """
    found: list[Source] = []
    for text in mixture:
        words = text.split(maxsplit=2)
        try:
            weight = float(words[1])
        except (IndexError, ValueError):
            weight = math.nan
        if len(words) < 3 or not 0 < weight < math.inf:
            raise UserError(
                f"data.mixture holds {text!r}",
                "a source is NAME WEIGHT PATTERN, and its weight a positive number",
                "write for example data.mixture='[web 0.8 WEB/*.tar,own 0.2 OWN/*.tar]'",
            )
        if words[0] in [source.name for source in found]:
            raise UserError(
                f"data.mixture names {words[0]} twice",
                "a source has one pattern",
                "write PATTERN as {A,B}, or give the second another name",
            )
        found.append(Source(words[0], weight, words[2]))
    return found


def quotas(weights: Sequence[float], places: int) -> list[int]:
    """Whole numbers in the ratio of the weights that sum to `places`, by largest remainder: none is off by one or more.

    Of equal remainders the first ones are rounded up.
    """
    largest = max(weights)  # the sum of weights near 1e308 is beyond floats
    parts = [weight / largest for weight in weights]
    exact = [part / sum(parts) * places for part in parts]
    # Rounded, since a share such as 0.3 of 10 may come out just below its whole number.
    found = [math.floor(round(share, 9)) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: round(found[number] - exact[number], 9))
    for number in by_remainder[: places - sum(found)]:
        found[number] += 1
    return found
