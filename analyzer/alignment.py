"""Two sequences that should be the same, item by item: which of one is which of the other."""

from collections.abc import Sequence

_ALIKE = 4
"""Items in a row that must agree before two sequences are taken to go on together after a difference."""
_FURTHEST = 100
"""Items that are looked through for the place where they do."""


def aligned(expected: Sequence[object], found: Sequence[object]) -> list[int | None]:
    """For each item found, its place among those expected; None for one that is not among them there.

    Where the two differ, the nearest place is taken from which several items in a row agree. Places only ever grow.
    """
    places: list[int | None] = []
    here = there = 0
    while there < len(found):
        if here < len(expected) and expected[here] == found[there]:
            places.append(here)
            here, there = here + 1, there + 1
            continue
        missing, added = _resumed(expected, found, here, there)
        places += [None] * added
        here, there = here + missing, there + added
    return places


def _resumed(expected: Sequence[object], found: Sequence[object], here: int, there: int) -> tuple[int, int]:
    """Items to leave out of each, so that they agree from there on; all that is left where they never do."""
    for distance in range(1, _FURTHEST):
        for missing in range(distance + 1):
            added = distance - missing
            if _agree(expected, found, here + missing, there + added):
                return missing, added
    return 0, len(found) - there if here >= len(expected) else 1


def _agree(expected: Sequence[object], found: Sequence[object], here: int, there: int) -> bool:
    left = min(len(expected) - here, len(found) - there, _ALIKE)
    if left < _ALIKE and len(expected) - here != len(found) - there:
        return False
    return left > 0 and all(expected[here + i] == found[there + i] for i in range(left))
