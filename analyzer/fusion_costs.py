"""What a finished loop costs as a kernel: its work, and the traffic that merging left."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from .cost import Access, Cost, Part
from .fusion_loops import Loop
from .fusion_names import kernel_name
from .graph import Graph, Tensor
from .kernels import Kernel


def written_once(graph: Graph, cost: Cost) -> Cost:
    """The cost of an op as one loop, which writes a result once where the kernels of eager mode write it repeatedly."""
    if not cost.parts:
        return cost
    traffic = [replace(a, written=min(a.written, graph.tensors[a.tensor].touched_bytes)) for a in cost.traffic]
    return replace(cost, traffic=tuple(traffic))


def kernels_of(graph: Graph, costs: Sequence[Cost], loop: Loop) -> list[Kernel]:
    """The kernel of a finished loop; several where its one op launches several."""
    ops = tuple(sorted(loop.ops))
    repeat = graph.ops[ops[-1]].repeat
    if loop.cost is not None:
        if loop.cost.parts:
            return [Kernel(name=part.name, ops=ops, cost=part.cost, repeat=repeat) for part in _parts(graph, loop.cost)]
        return [Kernel(name=kernel_name(graph, ops, loop.cost), ops=ops, cost=loop.cost, repeat=repeat)]
    traffic: dict[int, Access] = {}
    scratch_read = scratch_written = 0
    for read in loop.reads:
        access, buffer = read.access, read.buffer
        if buffer.writer is loop and not buffer.in_place:
            continue
        if buffer.storage is None:
            scratch_read += access.read
            continue
        known = traffic.get(access.tensor)
        if known is not None:
            most = max(known.read, access.read, graph.tensors[access.tensor].touched_bytes)
            access = replace(access, read=min(known.read + access.read, most))
        traffic[access.tensor] = replace(access, written=0) if access.written else access
    accesses = _distinct(graph, [traffic[tensor] for tensor in sorted(traffic)])
    for buffer in loop.writes:
        if not buffer.kept and all(reader is loop for reader in buffer.readers):
            continue
        if buffer.write is None:
            scratch_written += buffer.nbytes
        elif buffer.write.written:
            accesses.append(Access(tensor=buffer.write.tensor, written=buffer.write.written))
    cost = _merged([costs[i] for i in ops], tuple(accesses), scratch_read, scratch_written)
    return [Kernel(name=kernel_name(graph, ops, cost), ops=ops, cost=cost, repeat=repeat)]


def _parts(graph: Graph, cost: Cost) -> Iterator[Part]:
    """The kernels of an op that stands alone, with what is computed between its products in one: at least so much.

    Layers and attention that are one operator stay as they are, as do copies.
    """
    for multiplies, group in groupby(cost.parts, key=lambda part: bool(part.cost.matmul)):
        parts = list(group)
        costs = [part.cost for part in parts]
        if multiplies or cost.backend or len(parts) == 1 or not any(c.vector or c.special for c in costs):
            yield from parts
            continue
        made: set[int] = set()
        reads: dict[int, int] = {}
        writes: dict[int, int] = {}
        for access in (access for one in costs for access in one.traffic):
            if access.read and access.tensor not in made:
                reads[access.tensor] = max(reads.get(access.tensor, 0), access.read)
            if access.written:
                made.add(access.tensor)
                most = graph.tensors[access.tensor].touched_bytes
                writes[access.tensor] = min(writes.get(access.tensor, 0) + access.written, most)
        traffic = (
            *(Access(tensor=tensor, read=nbytes) for tensor, nbytes in reads.items()),
            *(Access(tensor=tensor, written=nbytes) for tensor, nbytes in writes.items()),
        )
        merged = _merged(costs, traffic, costs[0].scratch_read, costs[-1].scratch_written)
        yield Part(name=f"{parts[0].name.split(' for ')[0]} to {parts[-1].name}", cost=merged)


def _distinct(graph: Graph, accesses: list[Access]) -> list[Access]:
    """Reads without those of a part of what is read anyway."""
    by_storage: dict[int, list[Access]] = {}
    for access in accesses:
        by_storage.setdefault(graph.tensors[access.tensor].storage, []).append(access)
    if len(by_storage) == len(accesses):
        return accesses
    covered: set[int] = set()
    for same in by_storage.values():
        for part in same:
            for whole in same:
                if whole.read > part.read and _lies_in(graph.tensors[part.tensor], graph.tensors[whole.tensor]):
                    covered.add(part.tensor)
    return [access for access in accesses if access.tensor not in covered]


def _lies_in(part: Tensor, whole: Tensor) -> bool:
    if part.stride != whole.stride:
        return False
    left = part.offset - whole.offset
    for step, (size, most) in sorted(zip(whole.stride, zip(part.shape, whole.shape, strict=True), strict=True))[::-1]:
        start = left // step if step else 0
        left -= start * step
        if start < 0 or start + size > most:
            return False
    return left == 0


def _merged(costs: Sequence[Cost], traffic: tuple[Access, ...], scratch_read: int, scratch_written: int) -> Cost:
    vector: dict[str, float] = {}
    special = 0.0
    for cost in costs:
        for dtype, flops in cost.vector.items():
            vector[dtype] = vector.get(dtype, 0.0) + flops
        special += cost.special
    return replace(
        costs[-1],
        vector=vector,
        special=special,
        traffic=traffic,
        scratch_read=scratch_read,
        scratch_written=scratch_written,
        note="; ".join(dict.fromkeys(c.note for c in costs if c.note)),
        parts=(),
    )
