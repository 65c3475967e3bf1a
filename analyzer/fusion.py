"""Graph -> kernels as a fusing compiler makes them, in the manner of PyTorch's Inductor in its default mode.

Two steps, as there. Lowering walks the program: elementwise work stays an expression that is inlined where it is used,
until something makes it worth a buffer (a reduction, a matrix product, the caller, many users of many reads). Every
buffer is written by a loop, and loops over the same elements that share memory are merged. What a kernel neither takes
from outside nor hands on costs nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

from .cost import Access, Cost, Status
from .fusion_costs import kernels_of, written_once
from .fusion_kinds import Kind, Trait, kind_of, trait
from .fusion_layout import is_in_order, keeps_order, moves_in_rows, reduced_dims, rows_of
from .fusion_loops import Buffer, Loop, Read, Schedule, splits
from .graph import ITEM_BITS, Graph, Op, Role, Tensor, is_read_back
from .kernels import Kernel

_REUSED_READS = 4
"""Reads of an expression with several users above which it is computed once: Inductor's realize_reads_threshold."""

_MOST_READS = 8
"""Reads above which any expression is cut: Inductor's realize_acc_reads_threshold on GPUs."""

_MOST_INSTRUCTIONS = 30
"""Instructions above which any expression is cut: Inductor's realize_opcount_threshold on GPUs."""

_UNROLLED = 8
"""Reductions of fewer elements become pointwise code: Inductor's unroll_reductions_threshold."""

_STATISTIC_BYTES = 4
_FREE, _UNPRICED, _EXTERN, _POINTWISE = Status.FREE, Status.UNPRICED, Kind.EXTERN, Kind.POINTWISE  # looked up often


def compiled_kernels(graph: Graph, costs: Sequence[Cost]) -> tuple[Kernel, ...]:
    """The kernels that Inductor would make of a graph, in execution order.

    A kernel's traffic is what it takes from memory and leaves there, in bytes; work that several kernels repeat is
    counted in each of them. Ops without a formula stand alone. Ops that are free or that nobody needs are in no kernel.
    A value that the host reads back ends what is compiled as one: nothing is fused across it.
    """
    kernels: list[Kernel] = []
    for start, part in _between_reads(graph, costs):
        charged = costs[start : start + len(part.ops)]
        lowering = _Lowering(part, [written_once(part, cost) for cost in charged])
        lowering.run()
        for loop in lowering.schedule.in_order():
            made = kernels_of(part, charged, loop)
            kernels += [replace(k, ops=tuple([start + i for i in k.ops])) for k in made] if start else made
    return tuple(kernels)


def _between_reads(graph: Graph, costs: Sequence[Cost]) -> Iterator[tuple[int, Graph]]:
    """Each stretch of a graph that ends with a value for the host: where it starts, and what it hands on as outputs."""
    ends = [index + 1 for index, op in enumerate(graph.ops) if is_read_back(op) and costs[index].waits]
    if not ends:
        yield 0, graph
        return
    for start, end in pairwise([0, *ends, len(graph.ops)]):
        ops = graph.ops[start:end]
        made = {graph.tensors[i].storage for op in ops for i in (*op.outputs, *graph.mutated(op))}
        later = (i for index in range(end, len(graph.ops)) if index not in graph.idle for i in graph.ops[index].inputs)
        wanted = dict.fromkeys(i for i in later if graph.tensors[i].storage in made)
        yield start, replace(graph, ops=ops, outputs=tuple(dict.fromkeys((*graph.outputs, *wanted))))


@dataclass(slots=True, eq=False)
class _Expression:
    """Elementwise work that has no buffer yet.

    Attributes:
        reads: what it reads.
        ops: indices of the ops in it.
        count: loads, which unrolled reductions multiply.
        instructions: length of its code without the loads.
        numel: result elements.
        written: its result as an op writes it.
        place: loops and branches around it.
    """

    reads: frozenset[Read]
    ops: frozenset[int]
    count: int
    instructions: int
    numel: int
    written: tuple[Access, ...]
    place: object


@dataclass(slots=True, eq=False)
class _Call:
    """An op to be lowered, and what becomes of its result."""

    index: int
    op: Op
    cost: Cost
    trait: Trait
    kind: Kind
    users: int
    wanted: bool  # by a kernel of its own
    returned: bool  # to the caller


class _Lowering:
    def __init__(self, graph: Graph, costs: Sequence[Cost]) -> None:
        self.graph = graph
        self.costs = costs
        self.schedule = Schedule()
        self.opaque: set[int] = set()  # free ops whose results are other memory
        self.where = self._homes()
        self.expressions: dict[int, _Expression] = {}
        self.buffers: dict[int, Buffer] = {}
        self.overwritten: set[int] = set()
        self.watching: dict[int, set[int]] = {}  # expressions that read what will be overwritten
        self.instructions: dict[int, int] = {}

    def run(self) -> None:
        """Give every op that matters its loops."""
        calls = self._calls()
        for call in calls:
            if call.op.mutates:
                self.overwritten.update(self.where[t] for t in self.graph.mutated(call.op))
        for call in calls:
            if call.kind is _EXTERN or not call.cost.traffic:
                self._extern(call)
            elif call.op.mutates and self._writes_a_part(call.op):
                self._store(call)
            else:
                self._lower(call)
        kept = {self.where[t] for t in self.graph.outputs}
        kept.update(s for s, storage in enumerate(self.graph.storages) if storage.role is Role.KV_CACHE)
        for storage in [s for s in self.expressions if s in kept]:
            self._realise(storage, len(self.graph.ops))
        for storage in kept & self.buffers.keys():
            self.buffers[storage].kept = True

    def _homes(self) -> list[int]:
        """The storage of every tensor; what a free op such as dropout returns lives with its input."""
        tensors = self.graph.tensors
        home = list(range(len(self.graph.storages)))
        for index, (op, cost) in enumerate(zip(self.graph.ops, self.costs, strict=True)):
            if cost.status is _FREE and op.outputs and not op.mutates:
                result, inputs = tensors[op.outputs[0]], op.inputs
                if all(tensors[i].storage != result.storage for i in inputs):
                    if inputs and len(op.outputs) == 1 and tensors[inputs[0]].shape == result.shape:
                        home[result.storage] = home[tensors[inputs[0]].storage]
                    else:
                        self.opaque.add(index)
        return [home[t.storage] for t in tensors]

    def _calls(self) -> list[_Call]:
        """Ops that matter, found backwards from what the caller gets."""
        graph, where = self.graph, self.where
        storages = graph.storages
        needed = {where[t] for t in graph.outputs}
        uses: dict[int, int] = dict.fromkeys(needed, 1)
        wanted: set[int] = set()
        returned = set(needed)
        calls: list[_Call] = []
        for index in range(len(graph.ops) - 1, -1, -1):
            op, cost = graph.ops[index], self.costs[index]
            if cost.status is _FREE:
                if index in self.opaque and any(where[o] in needed for o in op.outputs):
                    needed.update(where[t] for t in op.inputs)
                continue
            written = [where[o] for o in op.outputs]
            if op.mutates:
                written += [where[t] for t in graph.mutated(op)]
            for storage in written:
                if storage in needed or (op.mutates and storages[storage].role in _GIVEN):
                    break
            else:
                if written:
                    continue
            users, for_kernel, for_caller = 0, False, False
            for storage in written:
                users += uses.pop(storage, 0)
                if storage in wanted:
                    wanted.discard(storage)
                    for_kernel = True
                if storage in returned:
                    returned.discard(storage)
                    for_caller = True
            what = trait(op.target)
            kind = _EXTERN if cost.status is _UNPRICED else kind_of(op, what)
            times, realised = what.uses, kind is _EXTERN or (what.window and kind is _POINTWISE)
            for tensor in op.inputs:
                storage = where[tensor]
                needed.add(storage)
                uses[storage] = uses.get(storage, 0) + times
                times = 1
                if realised:
                    wanted.add(storage)
            calls.append(_Call(index, op, cost, what, kind, users, for_kernel, for_caller))
        calls.reverse()
        return calls

    def _lower(self, call: _Call) -> None:
        """Make the op's result an expression, after the loops that it needs before; or a loop, if it reduces."""
        index, op, what = call.index, call.op, call.trait
        place = (op.repeat, op.branch)
        reads, ops, count, instructions = self._inlined(call, place)
        written = tuple([a for a in call.cost.traffic if a.written]) or (Access(tensor=op.outputs[0]),)
        result = self.graph.tensors[written[0].tensor]
        loop = _Template(index, ops, place)
        if call.kind is Kind.REDUCTION:
            numel, reduced, trailing, inner = self._reduction(op, result, len(written))
            if reduced >= _UNROLLED or len(written) > 1:
                self._reduce(loop, reads, (numel, reduced), (trailing, inner), self._results(written), what.passes)
                return
            count *= max(reduced, 1)
            instructions += self._unroll(index, reduced)
        elif call.kind is not _POINTWISE:
            source = self.graph.tensors[op.inputs[0]]
            rows, trailing = rows_of(op, source.shape)
            reduced = source.numel // max(rows, 1)
            if reduced >= _UNROLLED:
                reads = self._normalized(call, loop, reads, (rows, reduced), trailing)
                count += 2
                if call.kind is Kind.LOSS:
                    reads = self._labelled(op, reads, rows, source)
                    self._reduce(loop, reads, (1, rows), (True, True), self._results(written), 1)
                    return
            else:
                count += reduced
                instructions += self._unroll(index, reduced)
        storage = self.where[written[0].tensor]
        self.buffers.pop(storage, None)
        if self.overwritten:
            for read in reads:
                if read.buffer.storage in self.overwritten:
                    self.watching.setdefault(read.buffer.storage, set()).add(storage)
        self.expressions[storage] = _Expression(reads, ops, count, instructions, result.numel, written, place)
        if _is_worth_a_buffer(count, instructions + count, call):
            self._realise(storage, index)

    def _reduction(self, op: Op, result: Tensor, results: int) -> tuple[int, int, bool, bool]:
        """Results, elements in each, whether the innermost dimensions are reduced, whether the innermost one is."""
        tensors = self.graph.tensors
        source = tensors[op.inputs[0]] if op.inputs else result
        elements = max((tensors[t].numel for t in op.inputs), default=0)
        numel, dim = result.numel, op.args.get("dim")
        if elements == numel and results == 1 and isinstance(dim, int) and source.shape:  # a running sum
            numel //= max(source.shape[dim], 1)
        return numel, elements // max(numel, 1), *reduced_dims(op, source.shape)

    def _normalized(
        self, call: _Call, loop: "_Template", reads: frozenset[Read], size: tuple[int, int], trailing: bool
    ) -> frozenset[Read]:
        """What the elementwise part of a normalization reads, its statistics included."""
        source = self._of(reads, call.op.inputs[0])
        statistics = _scratch(2 * size[0])
        self._reduce(loop, source, size, (trailing, trailing), [statistics], call.trait.passes)
        if call.kind is not Kind.GROUP_NORM:
            return reads | {_whole(statistics)}
        channels = prod(self.graph.tensors[call.op.inputs[0]].shape[:2])
        scale = _scratch(2 * channels)
        self._add(loop, (reads - source) | {_whole(statistics)}, channels, 0, True, [scale])
        return source | {_whole(scale)}

    def _labelled(self, op: Op, reads: frozenset[Read], rows: int, source: Tensor) -> frozenset[Read]:
        """What the sum of a loss reads: of every row the element that its label names, unless labels are shares."""
        if any(self.graph.tensors[t].shape == source.shape for t in op.inputs[1:]):
            return reads
        rowed = self._of(reads, op.inputs[0])
        return (reads - rowed) | {_shifted(read, 0, rows / source.numel) for read in rowed}

    def _of(self, reads: frozenset[Read], tensor: int) -> frozenset[Read]:
        """Those of the reads that are made for one tensor."""
        storage = self.where[tensor]
        expression, buffer = self.expressions.get(storage), self.buffers.get(storage)
        return frozenset(r for r in reads if (r in expression.reads if expression else r.buffer is buffer))

    def _unroll(self, index: int, reduced: int) -> int:
        """Instructions that a short reduction adds as pointwise code."""
        self.instructions[index] += 4 * reduced
        return 4 * reduced

    def _inlined(self, call: _Call, place: object) -> tuple[frozenset[Read], frozenset[int], int, int]:
        """What an op reads once the expressions it uses are inlined: reads, ops, loads, instructions."""
        op, what = call.op, call.trait
        tensors, known = self.graph.tensors, self.instructions
        result = tensors[(op.outputs or op.inputs)[0]]
        reads: set[Read] = set()
        ops = {call.index}
        count, instructions = 0, what.length(op)
        moved = what.moved and call.kind is _POINTWISE
        windowed = what.window and call.kind is _POINTWISE
        known[call.index] = instructions
        for access in call.cost.traffic:
            if access.written and not access.read:
                continue
            tensor = tensors[access.tensor]
            storage = self.where[access.tensor]
            expression = self.expressions.get(storage)
            if expression is not None and (expression.place != place or (windowed and expression.count > 1)):
                self._realise(storage, call.index)
                expression = None
            if expression is None:
                read = self._read(storage, access, tensor, result, moved)
                if read not in reads:
                    reads.add(read)
                    count += 1
                continue
            if access.tensor == expression.written[0].tensor and not moved:
                through = expression.reads
            else:
                through = self._through(expression, tensor, op, moved=moved)
            count += len(through - reads) + expression.count - len(expression.reads)
            reads |= through
            for other in expression.ops - ops:
                instructions += known[other]
            ops |= expression.ops
        return frozenset(reads), frozenset(ops), count, instructions

    def _read(self, storage: int, access: Access, tensor: Tensor, result: Tensor, moved: bool) -> Read:
        buffer = self._buffer(storage)
        write = buffer.write
        straight = not moved and (
            (write is not None and write.tensor == access.tensor)
            or (tensor.stride == result.stride and tensor.shape == result.shape)
            or is_in_order(tensor.shape, tensor.stride, result.shape, result.stride)
        )
        key = (tensor.offset, access.read, straight)
        read = buffer.reads.get(key)
        if read is None:
            whole = straight and (write is None or access.read >= write.written)
            read = Read(buffer, access, whole, access.read * 8 // ITEM_BITS[tensor.dtype])
            buffer.reads[key] = read
        return read

    def _buffer(self, storage: int) -> Buffer:
        buffer = self.buffers.get(storage)
        if buffer is None:
            buffer = self.buffers[storage] = Buffer(storage, self.graph.storages[storage].nbytes)
        return buffer

    def _through(self, expression: _Expression, view: Tensor, op: Op, *, moved: bool) -> frozenset[Read]:
        """What an expression reads when it is asked for through a view or by an op that moves elements."""
        made = self.graph.tensors[expression.written[0].tensor]
        numel, taken = expression.numel, view.touched_bytes * 8 // ITEM_BITS[view.dtype]
        rows_stay = view.stride[-1:] == (1,) and (not moved or moves_in_rows(op, len(view.shape)))
        if taken < numel:
            rows_stay = rows_stay and view.shape[-1:] != made.shape[-1:]
        elif not moved and keeps_order(view.shape, view.stride, made.shape, made.stride):
            return expression.reads
        share = min(taken / numel, 1.0) if numel else 1.0
        reads: set[Read] = set()
        for read in expression.reads:
            whole = read.elements >= numel
            reads.add(_shifted(read, view.offset, share if whole else 1.0) if whole or not rows_stay else read)
        return frozenset(reads)

    def _extern(self, call: _Call) -> None:
        inputs = [self.where[t] for t in call.op.inputs]
        for storage in inputs:
            if storage in self.expressions:
                self._realise(storage, call.index)
        reads = frozenset(_whole(self._buffer(storage)) for storage in inputs)
        mutated = self.graph.mutated(call.op)
        for tensor in mutated:
            self._settle(self.where[tensor], call.index)
        place = (call.op.repeat, call.op.branch)
        results = self._results([Access(tensor=t) for t in (*call.op.outputs, *mutated)])
        self._add(_Template(call.index, frozenset((call.index,)), place), reads, 0, 0, True, results, call.cost)

    def _store(self, call: _Call) -> None:
        """A write into a part of memory that exists."""
        for tensor in self.graph.mutated(call.op):
            self._settle(self.where[tensor], call.index)
        place = (call.op.repeat, call.op.branch)
        reads, ops, _, _ = self._inlined(call, place)
        written = [a for a in call.cost.traffic if a.written]
        bits = ITEM_BITS[self.graph.tensors[written[0].tensor].dtype] if written else 8
        numel = sum(a.written for a in written[:1]) * 8 // bits
        self._add(_Template(call.index, ops, place), reads, numel, 0, True, self._results(written, in_place=True))

    def _settle(self, storage: int, index: int) -> None:
        """Give buffers to what is about to be overwritten in place and to expressions that read it."""
        if storage in self.expressions:
            self._realise(storage, index)
        for other in sorted(self.watching.pop(storage, ())):
            if other in self.expressions:
                self._realise(other, index)

    def _writes_a_part(self, op: Op) -> bool:
        graph = self.graph
        return trait(op.target).moved or any(
            graph.role(t) in _GIVEN or graph.tensors[t].touched_bytes < graph.storages[graph.tensors[t].storage].nbytes
            for t in graph.mutated(op)
        )

    def _realise(self, storage: int, index: int) -> None:
        made = self.expressions.pop(storage)
        loop = _Template(min(index, max(made.ops)), made.ops, made.place)
        self._add(loop, made.reads, made.numel, 0, True, self._results(made.written))

    def _results(self, written: Iterable[Access], *, in_place: bool = False) -> list[Buffer]:
        """Buffers for what a loop writes; the loop runs after those that use what was there before."""
        results: list[Buffer] = []
        for access in written:
            storage = self.where[access.tensor]
            buffer = Buffer(storage, self.graph.storages[storage].nbytes, access, kept=in_place, in_place=in_place)
            if storage in self.overwritten and storage in self.buffers:
                buffer.before = self.buffers[storage]
            self.buffers[storage] = buffer
            results.append(buffer)
        return results

    def _reduce(
        self,
        loop: "_Template",
        reads: frozenset[Read],
        size: tuple[int, int],
        dims: tuple[bool, bool],
        results: list[Buffer],
        passes: int,
    ) -> None:
        """Schedule a reduction. If it has few results, each of its passes over the input is split into two steps."""
        (numel, reduced), (trailing, inner) = size, dims
        parts = splits(numel, reduced, inner)
        if parts > 1:
            for left in reversed(range(passes)):
                partial = _scratch(numel * parts)
                self._add(loop, reads, numel * parts, -(-reduced // parts), trailing, [partial])
                if left:
                    statistics = _scratch(numel)
                    self._add(loop, frozenset((_whole(partial),)), numel, parts, True, [statistics])
                    reads |= {_whole(statistics)}
            reads, reduced, trailing = frozenset((_whole(partial),)), parts, True
        self._add(loop, reads, numel, reduced, trailing, results)

    def _add(
        self,
        loop: "_Template",
        reads: frozenset[Read],
        numel: int,
        reduced: int,
        trailing: bool,
        results: list[Buffer],
        cost: Cost | None = None,
    ) -> None:
        made = Loop(loop.ops, reads, numel, reduced, trailing, loop.place, loop.index, cost)
        self.schedule.add(made, results)


@dataclass(slots=True, eq=False)
class _Template:
    """What the loops of one op have in common."""

    index: int
    ops: frozenset[int]
    place: object


_GIVEN = frozenset({Role.INPUT, Role.KV_CACHE, Role.WEIGHT, Role.CONSTANT})


def _is_worth_a_buffer(count: int, length: int, call: _Call) -> bool:
    """Inductor's heuristic, by loads, instructions with loads, and how a result is used."""
    if count > _MOST_READS or length > _MOST_INSTRUCTIONS:
        return count > 1 or length > 100
    if call.users < 2:
        return False
    return (call.returned and count > 0) or (call.wanted and count > 1) or count > _REUSED_READS


def _scratch(numbers: int) -> Buffer:
    return Buffer(None, numbers * _STATISTIC_BYTES)


def _whole(buffer: Buffer) -> Read:
    read = buffer.reads.get(())
    if read is None:
        # by a kernel of its own, which states its traffic itself, or of statistics
        access = Access(tensor=-1, read=buffer.nbytes)
        read = buffer.reads[()] = Read(buffer, access, buffer.storage is None, buffer.nbytes // _STATISTIC_BYTES)
    return read


def _shifted(read: Read, offset: int, share: float) -> Read:
    key = (read, offset, share)
    found = read.buffer.reads.get(key)
    if found is None:
        access = Access(tensor=read.access.tensor, read=int(read.access.read * share))
        found = read.buffer.reads[key] = Read(read.buffer, access, False, int(read.elements * share))
    return found
