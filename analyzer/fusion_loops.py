"""Loops that write buffers, and which of them become one kernel: the rules of Inductor's scheduler.

Loops are merged when they run over the same elements and share memory, and nothing outside must run between them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from .cost import Access, Cost

_LARGEST = 64
"""Loops in a kernel, and ops between loops that are merged only for what both read: Inductor's max_fusion_size."""

_WORTH = 10
"""Bytes that loops must share to be merged for what both read: Inductor's score_fusion_memory_threshold."""

_NEIGHBOURS = 4
"""Latest readers of a tensor that are tried."""

_MULTIPROCESSORS = 132
_THREADS = _MULTIPROCESSORS * 2048


@dataclass(slots=True, eq=False)
class Buffer:
    """Memory written by a loop, or given from outside.

    Attributes:
        storage: index in `Graph.storages`; None for statistics that the graph does not name.
        nbytes: its size in bytes.
        write: how a loop writes it; None for statistics and for memory from outside.
        writer: the loop that writes it.
        kept: true when the caller wants it.
        in_place: true when a loop writes into a part of memory that exists.
        before: what was in the same memory before, if it is overwritten.
        readers: loops that read it.
        reads: ways in which it is read.
    """

    storage: int | None
    nbytes: int
    write: Access | None = None
    writer: "Loop | None" = None
    kept: bool = False
    in_place: bool = False
    before: "Buffer | None" = None
    readers: "list[Loop]" = field(default_factory=list)
    reads: "dict[tuple[object, ...], Read]" = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Read:
    """One way of reading a buffer.

    Attributes:
        access: the tensor and the bytes.
        straight: element by element in the order of the loop, so that a writer can hand the values over on chip.
        elements: distinct elements read.
        readers: loops that read in this way.
    """

    buffer: Buffer
    access: Access
    straight: bool
    elements: int
    readers: "list[Loop]" = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Loop:
    """A kernel in the making: one loop, or several that were merged.

    Attributes:
        ops: indices of the ops computed in it.
        reads: what it reads, its own results included.
        numel: results; for a reduction, before any pointwise work on whole rows.
        reduced: elements combined into each result; 0 without a reduction.
        trailing: true when the reduced dimensions are the innermost ones.
        place: loops and branches of the program around it.
        last: its latest op.
        cost: that of a kernel that merges with nothing.
        depth: kernels before it on the longest way.
        size: loops merged.
        writes: what it writes.
        needs: kernels that write what it reads.
        followers: kernels that need it.
    """

    ops: frozenset[int]
    reads: frozenset[Read]
    numel: int
    reduced: int
    trailing: bool
    place: object
    last: int
    cost: Cost | None = None
    depth: int = 0
    size: int = 1
    writes: list[Buffer] = field(default_factory=list)
    needs: "set[Loop]" = field(default_factory=set)
    followers: "set[Loop]" = field(default_factory=set)

    def take(self, other: "Loop") -> None:
        """Add another's work."""
        self.ops |= other.ops
        self.reads |= other.reads
        self.size += other.size
        self.last = max(self.last, other.last)
        if other.reduced and not self.reduced:
            self.numel, self.reduced, self.trailing = other.numel, other.reduced, other.trailing


class Schedule:
    """Kernels so far."""

    def __init__(self) -> None:
        self.kernels: dict[Loop, None] = {}  # in the order in which they began

    def add(self, loop: Loop, writes: Sequence[Buffer]) -> None:
        """Put a loop, which reads what earlier loops wrote, into the kernel that it fits best, or into a new one."""
        needs = {writer for read in loop.reads if (writer := read.buffer.writer) is not None}
        for buffer in writes:
            if buffer.before is not None:
                needs.update(buffer.before.readers)
                if buffer.before.writer is not None:
                    needs.add(buffer.before.writer)
        partners = [] if loop.cost is not None else _partners(loop, needs)
        if partners:
            kernel = partners[0]
            for other in partners[1:]:
                if _may_merge(kernel, other):
                    self._merge(kernel, other)
                    needs.discard(other)
            needs.discard(kernel)
            kernel.take(loop)
        else:
            kernel = loop
            self.kernels[kernel] = None
        kernel.needs |= needs
        for need in needs:
            need.followers.add(kernel)
            kernel.depth = max(kernel.depth, need.depth + 1)
        for buffer in writes:
            buffer.writer = kernel
        kernel.writes += writes
        for read in loop.reads:
            if not read.readers or read.readers[-1] is not kernel:
                read.readers.append(kernel)
                read.buffer.readers.append(kernel)

    def _merge(self, kernel: Loop, other: Loop) -> None:
        del self.kernels[other]
        kernel.take(other)
        kernel.depth = max(kernel.depth, other.depth)
        kernel.writes += other.writes
        for buffer in other.writes:
            buffer.writer = kernel
        for read in other.reads:
            read.readers = [kernel if reader is other else reader for reader in read.readers]
            read.buffer.readers = [kernel if reader is other else reader for reader in read.buffer.readers]
        for need in other.needs:
            need.followers.discard(other)
            need.followers.add(kernel)
        for follower in other.followers:
            follower.needs.discard(other)
            follower.needs.add(kernel)
        kernel.needs |= other.needs
        kernel.followers |= other.followers

    def in_order(self) -> Iterable[Loop]:
        """Kernels in the program's order, as far as they do not wait for others."""
        waiting = {kernel: len(kernel.needs) for kernel in self.kernels}
        ready = [(kernel.last, number, kernel) for number, kernel in enumerate(self.kernels) if not kernel.needs]
        heapify(ready)
        number = len(self.kernels)
        while ready:
            kernel = heappop(ready)[2]
            yield kernel
            for follower in kernel.followers:
                waiting[follower] -= 1
                if not waiting[follower]:
                    heappush(ready, (follower.last, number, follower))
                    number += 1


def splits(numel: int, reduced: int, inner: bool) -> int:
    """Parts into which Inductor splits each of `numel` reductions when they are too few to fill an H100."""
    elements = numel * reduced
    few, many = 32 * _THREADS, 512 * _THREADS
    if inner:
        if numel >= 2 * _MULTIPROCESSORS or reduced <= 8192:
            return 1
        blocks = -(-(_THREADS // 512) // numel)
        size = 32 if elements <= few else -(-reduced // (256 * blocks)) if elements < many else 512
        return -(-reduced // (size * 256))
    if reduced <= 32 or numel >= 64 * _MULTIPROCESSORS:
        return 1
    blocks = -(-(_THREADS // 256) // -(-numel // 128))
    size = 32 if elements < few else -(-reduced // (4 * blocks)) if elements < many else 512
    return -(-reduced // (4 * size))


def _partners(loop: Loop, needs: set[Loop]) -> list[Loop]:
    """Kernels that the loop may join, those first with which it shares most."""
    shared: dict[Loop, int] = {}
    barred: set[Loop] = set()
    for read in loop.reads:
        writer, nbytes = read.buffer.writer, read.access.read
        if writer is not None:
            if read.straight and not read.buffer.in_place:
                shared[writer] = shared.get(writer, 0) + nbytes
            else:
                barred.add(writer)  # it must be complete before it is read
        if nbytes >= _WORTH:
            for reader in read.readers[-_NEIGHBOURS:]:
                shared[reader] = shared.get(reader, 0) + nbytes
    fitting = [kernel for kernel in shared if kernel not in barred and _fits(kernel, loop)]
    joined = [kernel for kernel in fitting if _may_join(kernel, loop, needs, fitting)]
    return sorted(joined, key=lambda kernel: -shared[kernel]) if len(joined) > 1 else joined


def _fits(kernel: Loop, loop: Loop) -> bool:
    """Whether both run over the same elements: the rule of Inductor's GPU backend."""
    if kernel.cost is not None or kernel.place != loop.place or kernel.size + loop.size > _LARGEST:
        return False
    if kernel.reduced and loop.reduced:
        return (kernel.numel, kernel.reduced, kernel.trailing) == (loop.numel, loop.reduced, loop.trailing)
    if not kernel.reduced and not loop.reduced:
        return kernel.numel == loop.numel
    rows, other = (kernel, loop) if kernel.reduced else (loop, kernel)
    return other.numel == rows.numel or (rows.trailing and other.numel == rows.numel * rows.reduced)


def _may_join(kernel: Loop, loop: Loop, needs: set[Loop], fitting: Sequence[Loop]) -> bool:
    """Whether all else that the loop needs can run before the kernel or in it, and they are close in the program."""
    if kernel not in needs and loop.last - kernel.last > _LARGEST:
        return False
    if not kernel.followers:
        return True
    late = [need for need in needs if need.depth >= kernel.depth and need is not kernel]
    return all(need.depth == kernel.depth and need in fitting and _may_merge(kernel, need) for need in late)


def _may_merge(kernel: Loop, other: Loop) -> bool:
    """Whether neither waits for the other."""
    if kernel.depth != other.depth and (kernel if kernel.depth < other.depth else other).followers:
        return False
    return kernel not in other.needs and other not in kernel.needs and _fits(kernel, other)
