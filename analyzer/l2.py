"""What of a sequence of kernels crosses the memory bus, given a cache between the kernels and device memory.

Two answers. `kept_at_best` is for bounds: no cache of that size, however it is run, saves more, so that what is left
is a lower limit. `kept_by_reuse` is for estimates: a buffer is found in the cache when what was touched since then
fits beside it (LRU stack distance: Mattson et al., "Evaluation techniques for storage hierarchies", 1970).

Both assume the steady state: the same step ran before, over the same weights and into the same buffers.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from .repetition import longest_run


@dataclass(frozen=True, slots=True)
class Touch:
    """Bytes of a buffer that a kernel reads and writes.

    Attributes:
        buffer: any number that names it.
        read: bytes read.
        written: bytes written.
        lasting: true where what is written is a result of the step, which has to reach device memory at last.
    """

    buffer: int
    read: int
    written: int
    lasting: bool = False


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes that a kernel need not read from, and need not write to, device memory."""

    read: float = 0.0
    written: float = 0.0


@dataclass(frozen=True, slots=True)
class Link:
    """A touch, and where the same buffer is touched before and after it: (kernel, position), or None."""

    read: int
    written: int
    lasting: bool
    before: tuple[int, int] | None
    after: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Folded:
    """A sequence with the middle of its longest run of like layers left out.

    Attributes:
        links: the touches of the kernels that are left.
        kept: which kernels those are.
        source: for every kernel of the whole sequence, the position in `kept` of itself or of its like.
        footprint: bytes of all buffers of the whole sequence.
    """

    links: tuple[tuple[Link, ...], ...]
    kept: tuple[int, ...]
    source: tuple[int, ...]
    footprint: int


def fold(sequence: Sequence[Sequence[Touch]], kinds: Sequence[int]) -> Folded:
    """Fold a sequence of kernels.

    Args:
        sequence: the touches of each kernel of a step, in order, each buffer once.
        kinds: a number for each kernel; equal numbers touch equal bytes in the same order.
    """
    before, after = _neighbours(sequence)
    names: dict[object, int] = {}
    shape = [
        names.setdefault(
            (
                kind,
                *[b and (index - b[0], b[1]) for b in before[index]],
                *[a and (a[0] - index, a[1]) for a in after[index]],
            ),
            len(names),
        )
        for index, kind in enumerate(kinds)
    ]
    layers = longest_run(shape, left=_TURNS_KEPT + 1)
    start, period, turns = (layers.start, layers.period, layers.turns) if layers else (0, 0, 0)
    count = len(sequence)
    gap = max(0, turns - _TURNS_KEPT - 1) * period
    first_gone = start + _TURNS_KEPT * period if gap else count
    gone = range(first_gone, first_gone + gap)
    run = range(start, start + turns * period)
    source = [
        i if i < first_gone else first_gone - period + (i - first_gone) % period if i in gone else i - gap
        for i in range(count)
    ]

    def moved(place: int, other: tuple[int, int] | None) -> tuple[int, int] | None:
        if other is None or not gap:
            return other
        if place in run and other[0] in run:
            return source[place] + other[0] - place, other[1]
        lost = other[0] in gone or (place < first_gone) != (other[0] < first_gone)
        return None if lost else (source[other[0]], other[1])

    kept = (*range(first_gone), *range(first_gone + gap, count))
    links = tuple(
        tuple(
            Link(t.read, t.written, t.lasting, moved(i, b), moved(i, a))
            for t, b, a in zip(sequence[i], before[i], after[i], strict=True)
        )
        for i in kept
    )
    return Folded(links, kept, tuple(source), _footprint(sequence))


def kept_at_best(folded: Folded, capacity: int, useful: Sequence[bool]) -> list[Kept]:
    """The most that a cache of `capacity` bytes can keep, for each kernel that the fold left.

    From kernel to kernel of a step: bytes whose next use is nearest are kept (Belady, "A study of replacement
    algorithms for a virtual-storage computer", 1966), once to spare reads and once, on its own, to spare the writing
    back of results; together no less than what any policy saves. From step to step: at most the capacity in all.

    Args:
        folded: the kernels.
        capacity: bytes of cache.
        useful: by kernel left, whether memory limits it; sparing others traffic saves no time.
    """
    reads = _nearest_first(folded.links, capacity, useful, written=False)
    writes = _nearest_first(folded.links, capacity, useful, written=True)
    # what a step finds of the one before is spread over all it could find, since any of it may be what was kept
    firsts = [
        (
            sum(max(0, x.read - known) for x, known in zip(touches, before, strict=True)),
            sum(x.written for x in touches if x.lasting or x.after is None),
        )
        for touches, before in zip(folded.links, _seen_before(folded.links), strict=True)
    ]
    times = Counter(folded.source)
    total = sum(times[i] * sum(first) for i, first in enumerate(firsts) if useful[i])
    share = min(1.0, capacity / total) if total else 0.0
    return [
        Kept(read + share * first[0], written + share * first[1]) if wanted else Kept()
        for read, written, first, wanted in zip(reads, writes, firsts, useful, strict=True)
    ]


def kept_by_reuse(folded: Folded, capacity: float) -> list[Kept]:
    """What a cache with LRU replacement keeps, for each kernel that the fold left.

    A buffer that fits in part is found in part. A result that is still there at its last use is never written back:
    its memory is taken for other results.
    """
    if folded.footprint <= capacity:  # all of the step stays from turn to turn
        return [Kept(sum(x.read for x in touches), sum(x.written for x in touches)) for touches in folded.links]
    return _least_recent_out(folded.links, capacity)


def _seen_before(links: Sequence[Sequence[Link]]) -> list[list[int]]:
    """For each touch, the bytes of its buffer that kernels of the same step have read or written before."""
    seen: list[list[int]] = []
    for touches in links:
        seen.append([max(seen[b[0]][b[1]], *_bytes_at(links, b)) if (b := x.before) else 0 for x in touches])
    return seen


def _bytes_at(links: Sequence[Sequence[Link]], place: tuple[int, int]) -> tuple[int, int]:
    link = links[place[0]][place[1]]
    return link.read, link.written


_Places = list[list[tuple[int, int] | None]]


def _neighbours(sequence: Sequence[Sequence[Touch]]) -> tuple[_Places, _Places]:
    last: dict[int, tuple[int, int]] = {}
    before: _Places = []
    after: _Places = []
    for index, touches in enumerate(sequence):
        known: list[tuple[int, int] | None] = []
        for position, touch in enumerate(touches):
            here = (index, position)
            previous = last.get(touch.buffer)
            known.append(previous)
            if previous is not None:
                after[previous[0]][previous[1]] = here
            last[touch.buffer] = here
        before.append(known)
        after.append([None] * len(known))
    return before, after


_TURNS_KEPT = 3


def _nearest_first(
    links: Sequence[Sequence[Link]], capacity: int, useful: Sequence[bool], *, written: bool
) -> list[float]:
    """Bytes kept for reads (credited where they are read), or of results (credited where they are written)."""
    saved = [0.0] * len(links)
    held: dict[tuple[int, int], float] = {}  # by the place of the next use
    room = float(capacity)
    furthest: list[tuple[int, int, int, int]] = []
    for index, touches in enumerate(links):
        for position, link in enumerate(touches):
            found = held.pop((index, position), 0.0)
            room += found
            if found:
                previous = link.before
                credited = previous[0] if written and previous else index
                saved[credited] += found
        for position, link in enumerate(touches):
            if link.after is None:
                continue
            reader = links[link.after[0]][link.after[1]]
            if written and link.lasting:
                continue
            wanted = float(link.written if written else min(max(link.read, link.written), reader.read))
            if not wanted or not useful[index if written else link.after[0]]:
                continue
            heappush(furthest, (-link.after[0], -link.after[1], index, position))
            held[link.after] = wanted
            room -= wanted
        while room < 0:
            place = furthest[0]
            key = (-place[0], -place[1])
            size = held.get(key, 0.0)
            taken = min(size, -room)
            room += taken
            if taken < size:
                held[key] = size - taken
            else:
                held.pop(key, None)
                heappop(furthest)
        if len(furthest) > 4 * len(held) + 64:
            furthest = [x for x in furthest if (-x[0], -x[1]) in held]
            heapify(furthest)
    return saved


def _least_recent_out(links: Sequence[Sequence[Link]], capacity: float) -> list[Kept]:
    names: dict[tuple[int, int], int] = {}
    recent: dict[int, int] = {}  # size by buffer, the latest last
    kept: list[Kept] = []
    seen = _seen_before(links)
    dirty: dict[int, tuple[int, float]] = {}  # which kernel wrote a result, and the bytes of it that never left
    for index, touches in enumerate(links):
        read = 0.0
        for position, link in enumerate(touches):
            names[index, position] = names[link.before] if link.before is not None else len(names)
        for position, link in enumerate(touches):
            name = names[index, position]
            size = max(link.read, link.written)
            found = _share_found(recent, name, size, capacity) if link.before is not None else 0.0
            read += found * min(link.read, seen[index][position])
            if name in dirty:
                writer, still = dirty.pop(name)
                still *= found
                if link.after is not None and not link.written:
                    dirty[name] = (writer, still)
                else:
                    kept[writer] = Kept(kept[writer].read, kept[writer].written + still)
            if link.written and link.after is not None and not link.lasting:
                dirty[name] = (index, float(link.written))
        for position, link in enumerate(touches):
            name = names[index, position]
            recent.pop(name, None)
            if link.after is not None:
                recent[name] = max(link.read, link.written)
            else:
                recent[-1 - index] = recent.get(-1 - index, 0) + max(link.read, link.written)
        kept.append(Kept(read, 0.0))
        _forget(recent, capacity)
    return kept


def _share_found(recent: dict[int, int], name: int, size: int, capacity: float) -> float:
    if name not in recent or not size:
        return 0.0
    between = 0
    for other in reversed(recent):
        if other == name:
            break
        between += recent[other]
    return min(1.0, max(0.0, (capacity - between) / size))


def _forget(recent: dict[int, int], capacity: float) -> None:
    total = sum(recent.values())
    while total > 2 * capacity and len(recent) > 1:
        oldest = next(iter(recent))
        total -= recent.pop(oldest)


def _footprint(sequence: Iterable[Sequence[Touch]]) -> int:
    sizes: dict[int, int] = {}
    for touches in sequence:
        for touch in touches:
            sizes[touch.buffer] = max(sizes.get(touch.buffer, 0), touch.read, touch.written)
    return sum(sizes.values())
