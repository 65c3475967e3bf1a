"""Finds elementwise work that a fusing compiler would do in one kernel, and puts one op in its place.

Kernels are planned as `docs/fusion.md` says, on the program as it is run: what a compiler would compute again in
several kernels is computed once here, since the ops around a chain stay what they are.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import takewhile

from ..analyzer.cost import Access, Cost, Status, bytes_by_role
from ..analyzer.finding import Remedy, Rewrite, Situation
from ..analyzer.fusion import compiled_kernels
from ..analyzer.fusion_kinds import Kind, kind_of, trait
from ..analyzer.graph import Arg, Graph, Op, Role, Tensor, TensorRef, is_assertion
from ..analyzer.kernels import Kernel
from ..analyzer.rewrite import Draft


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Ops that one kernel could do.

    Attributes:
        ops: indices, ascending.
        kernels: what the kernel costs; several where one op needs more passes over its input than one.
        anchor: the last elementwise op among them that computes, rather than casts or copies.
        bytes: moved by the ops as they are.
        fused_bytes: moved by the kernel.
        place: the op before which the kernel runs, or in whose place.
        given: tensors that it writes to in memory that was there before.
        views: ops that look at what the kernel takes, and do so only after its place: they come before it too.
    """

    ops: tuple[int, ...]
    kernels: tuple[Cost, ...]
    anchor: int
    bytes: int
    fused_bytes: int
    place: int
    given: frozenset[int]
    views: tuple[Op, ...]


def chains(situation: Situation, own: Set[int]) -> tuple[Chain, ...]:
    """Every chain whose intermediate results go through memory and need not.

    Args:
        situation: the phase.
        own: ops that stay kernels of their own: nothing is fused with them.
    """
    graph, costs = situation.graph, situation.costs
    barred = _barred(graph, costs, own)
    return tuple(_Planner(situation).chains(_kernels(barred, costs)))


def joined(situation: Situation, groups: Iterable[tuple[int, ...]]) -> tuple[Chain, ...]:
    """A chain for each of some groups of ops that one kernel could do, where that saves anything."""
    planner = _Planner(situation)
    found = (planner.joined(group) for group in groups)
    return tuple(chain for chain in found if chain is not None)


def fused(chain: Chain) -> Rewrite:
    """One op in the place of a chain, priced as the kernel that a compiler makes of it."""

    def rewrite(draft: Draft) -> None:
        if not draft.claim(chain.ops):
            return
        draft.remove(chain.ops)
        for op in (*chain.views, *_ops(draft, chain)):
            draft.insert(chain.place, op)

    return rewrite


def compiled(graph: Graph, chain: Chain) -> Remedy:
    """To compile the innermost module whose forward runs all of a chain, or the model."""
    paths = {tuple(graph.ops[index].module.split(".")) for index in chain.ops}
    shared = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))]
    types = {op.module: op.module_type for op in graph.ops[chain.ops[0] : chain.ops[-1] + 1]}
    holder = types.get(".".join(shared), "") if any(shared) else ""
    return Remedy(
        text="Compile the function or the module that holds these lines: the chain becomes one kernel.",
        code=f"{holder}.forward = torch.compile({holder}.forward)" if holder else "model = torch.compile(model)",
    )


_BARRED = "fxroof.kernel_of_its_own"


def _barred(graph: Graph, costs: Sequence[Cost], own: Set[int]) -> Graph:
    """The graph with ops that no compiler knows how to fuse in the place of some."""
    return replace(
        graph,
        ops=tuple(
            replace(op, target=_BARRED) if index in own and costs[index].status is not Status.FREE else op
            for index, op in enumerate(graph.ops)
        ),
    )


def _kernels(graph: Graph, costs: Sequence[Cost]) -> tuple[Kernel, ...]:
    """Kernels of which no two compute the same op, but for what is made from nothing, such as a range of numbers."""
    kept: set[int] = set()
    while True:
        kernels = compiled_kernels(replace(graph, outputs=(*graph.outputs, *sorted(kept))), costs)
        shared = _shared(graph, costs, kernels) - kept
        if not shared:
            return kernels
        kept |= shared


def _shared(graph: Graph, costs: Sequence[Cost], kernels: Sequence[Kernel]) -> set[int]:
    """Results that several kernels compute, where no one kernel holds all that take them."""
    homes = _homes(kernels)
    several = {index for index, numbers in homes.items() if len(numbers) > 1}
    users = _paid_users(graph, costs, several) if several else {}
    return {
        tensor
        for index, takers in users.items()
        if takers and not frozenset.intersection(*(homes.get(user, frozenset()) for user in takers))
        for tensor in graph.ops[index].outputs or graph.mutated(graph.ops[index])
    }


def _homes(kernels: Sequence[Kernel]) -> dict[int, frozenset[int]]:
    """By op, the numbers of the kernels that compute it."""
    homes: dict[int, set[int]] = {}
    for number, kernel in enumerate(kernels):
        for index in kernel.ops:
            homes.setdefault(index, set()).add(number)
    return {index: frozenset(numbers) for index, numbers in homes.items()}


def _paid_users(graph: Graph, costs: Sequence[Cost], ops: Set[int]) -> dict[int, set[int]]:
    """The ops that take what some ops made, found through those that are free."""
    makers: dict[int, set[int]] = {}
    users: dict[int, set[int]] = {index: set() for index in ops}
    for index, op in enumerate(graph.ops):
        found = {maker for tensor in op.inputs for maker in makers.get(tensor, ())}
        if costs[index].status is Status.FREE:
            if found:
                makers.update(dict.fromkeys(op.outputs, found))
            continue
        for maker in found:
            users[maker].add(index)
        for tensor in (*op.outputs, *graph.mutated(op)):
            makers.pop(tensor, None)
            if index in ops:
                makers[tensor] = {index}
    return users


class _Planner:
    """Makes chains of kernels: what they are given, what they hand on, and where in the program they can run."""

    def __init__(self, situation: Situation) -> None:
        self.situation = situation
        self.graph = situation.graph
        self.costs = situation.costs
        self.home = [tensor.storage for tensor in self.graph.tensors]
        self.results = {self.home[t] for t in self.graph.outputs}
        self.takers: dict[int, list[int]] = {}  # by storage, the ops that take what is in it
        self.writers: dict[int, list[int]] = {}  # by storage, the ops that write to it
        for index, op in enumerate(self.graph.ops):
            if self.graph.is_view(op) or is_assertion(op):
                continue
            for storage in {self.home[t] for t in op.inputs}:
                self.takers.setdefault(storage, []).append(index)
            for storage in self._written(op):
                self.writers.setdefault(storage, []).append(index)
        self.moved: dict[int, int] = {}  # ops of the chains that were found, and where those run

    def chains(self, kernels: Sequence[Kernel]) -> Iterator[Chain]:
        """A chain of two elementwise ops or more for every kernel, if one of its ops takes what another made.

        Kernels that share the passes of one op, such as those of a group norm, are one chain together.
        """
        homes = _homes(kernels)
        nothing = self._made_of_nothing()
        seen: set[int] = set()
        for index in sorted(homes):
            if homes[index] & seen or (index in nothing and len(homes[index]) > 1):
                continue
            numbers, ops = self._together(homes, kernels, nothing, homes[index])
            seen |= numbers
            ordered = [kernels[number] for number in sorted(numbers)]
            chain = self._chain(tuple(sorted(ops)), ordered) if len(ops) >= _FEWEST else None
            if chain is not None:
                self.moved.update(dict.fromkeys(chain.ops, chain.place))
                yield chain

    def joined(self, ops: tuple[int, ...]) -> Chain | None:
        """A chain of just these ops, in one kernel."""
        made = {storage for index in ops for storage in self._written(self.graph.ops[index])}
        read: dict[int, Access] = {}
        written: dict[int, Access] = {}
        for access in (access for index in ops for access in self.costs[index].traffic):
            known = read.get(access.tensor)
            if access.read and self.home[access.tensor] not in made and (known is None or known.read < access.read):
                read[access.tensor] = Access(tensor=access.tensor, read=access.read)
            if access.written:
                most = min(access.written, self.graph.tensors[access.tensor].touched_bytes)
                written[self.home[access.tensor]] = Access(tensor=access.tensor, written=most)
        vector: dict[str, float] = {}
        for cost in map(self.costs.__getitem__, ops):
            for dtype, flops in cost.vector.items():
                vector[dtype] = vector.get(dtype, 0.0) + flops
        cost = Cost(
            vector=vector,
            special=sum(self.costs[index].special for index in ops),
            traffic=(*self._apart(read.values()), *written.values()),
        )
        kernel = Kernel(name="", ops=ops, cost=cost, repeat=self.graph.ops[ops[0]].repeat)
        return self._chain(ops, [kernel])

    def _apart(self, reads: Iterable[Access]) -> list[Access]:
        """Reads without those of a part of what is read anyway."""
        kept: list[Access] = []
        for access in sorted(reads, key=lambda access: -access.read):
            tensor = self.graph.tensors[access.tensor]
            if not any(whole.read > access.read and _spans(self.graph.tensors[whole.tensor], tensor) for whole in kept):
                kept.append(access)
        return kept

    def _together(
        self, homes: Mapping[int, frozenset[int]], kernels: Sequence[Kernel], nothing: Set[int], first: frozenset[int]
    ) -> tuple[set[int], set[int]]:
        """Kernels that compute an op in common, and their ops."""
        numbers: set[int] = set()
        ops: set[int] = set()
        waiting = set(first)
        while waiting:
            number = waiting.pop()
            numbers.add(number)
            for index in kernels[number].ops:
                if index not in nothing or homes[index] == {number}:
                    ops.add(index)
                    waiting |= homes[index] - numbers
        return numbers, ops

    def _made_of_nothing(self) -> set[int]:
        """Elementwise ops that read no memory, such as a range of numbers: kernels repeat them for free."""
        found: set[int] = set()
        known: set[int] = set()  # tensors
        for index, op in enumerate(self.graph.ops):
            what = trait(op.target)
            if not op.mutates and known.issuperset(op.inputs) and kind_of(op, what) is Kind.POINTWISE:
                found.add(index)
                known.update(op.outputs)
        return found

    def _chain(self, ops: tuple[int, ...], kernels: Sequence[Kernel]) -> Chain | None:
        elementwise = [index for index in ops if self._is_elementwise(self.graph.ops[index])]
        if len(elementwise) < _FEWEST or not any(map(self._computes, elementwise)):
            return None
        made = {storage for index in ops for storage in self._written(self.graph.ops[index])}
        inside = self._inside(ops, made)
        gone = {*ops, *inside}
        made |= {self.home[t] for index in inside for t in self.graph.ops[index].outputs}
        if not self._hands_over(gone):
            return None
        wanted = {s for s in made if self._is_wanted(s, gone)}
        parts = self._parts(kernels, wanted)
        traffic = [access for part in parts for access in part.traffic]
        if not wanted <= {self.home[a.tensor] for a in traffic if a.written}:
            return None
        place = self._place(ops, gone, traffic)
        if place is None:
            return None
        given = frozenset(a.tensor for a in traffic if a.written and not self._is_fresh(a.tensor, gone))
        sizes = [found.bytes_read + found.bytes_written for found in map(self.situation.analysis.ops.__getitem__, ops)]
        fused_bytes = sum(sum(map(sum, bytes_by_role(self.graph, part).values())) for part in parts)
        chain = Chain(
            ops=ops,
            kernels=parts,
            anchor=next(i for i in reversed(elementwise) if self._computes(i)),
            bytes=sum(sizes),
            fused_bytes=kernels[0].repeat * fused_bytes,
            place=place,
            given=given,
            views=tuple(self._late_views([*(a.tensor for a in traffic if a.read), *sorted(given)], place, gone)),
        )
        return chain if chain.fused_bytes < chain.bytes else None

    def _parts(self, kernels: Sequence[Kernel], wanted: set[int]) -> tuple[Cost, ...]:
        """What kernels cost where only what others need leaves them."""
        read = [{self.home[a.tensor] for a in kernel.cost.traffic if a.read} for kernel in kernels]
        parts: list[Cost] = []
        for number, kernel in enumerate(kernels):
            needed = wanted.union(*read[:number], *read[number + 1 :])
            traffic = tuple([a for a in kernel.cost.traffic if a.read or self.home[a.tensor] in needed])
            parts.append(replace(kernel.cost, traffic=traffic))
        return tuple(parts)

    def _computes(self, index: int) -> bool:
        return bool(self.costs[index].vector or self.costs[index].special)

    def _is_elementwise(self, op: Op) -> bool:
        return bool(op.inputs) and kind_of(op, trait(op.target)) is Kind.POINTWISE

    def _written(self, op: Op) -> set[int]:
        """Storages that an op writes to; those that it only looks at differently are not among them."""
        written = {self.home[t] for t in op.outputs} - {self.home[t] for t in op.inputs}
        return written | {self.home[t] for t in self.graph.mutated(op)}

    def _inside(self, ops: tuple[int, ...], made: Set[int]) -> tuple[int, ...]:
        """Free ops that only the chain needs, such as views and dropout at inference."""
        graph, flow = self.graph, self.situation.flow
        known: set[int] = set(made)
        found: list[int] = []
        for index in range(ops[0] + 1, ops[-1]):
            op = graph.ops[index]
            if self.costs[index].status is not Status.FREE or not op.inputs:
                continue
            taken, returned = ({self.home[t] for t in tensors} for tensors in (op.inputs, op.outputs))
            if taken <= known or (returned and returned <= known):
                found.append(index)
                known |= returned
        members = set(ops)
        for index in reversed(found):
            outputs = graph.ops[index].outputs
            new = set(outputs).difference(graph.ops[index].inputs)
            if flow.results.isdisjoint(new) and members.issuperset(u for t in new for u in flow.users(t)):
                members.add(index)
        return tuple(sorted(members.difference(ops)))

    def _hands_over(self, gone: Set[int]) -> bool:
        """Whether an op takes what another one made."""
        writer: dict[int, int] = {}
        for index in sorted(gone):
            op = self.graph.ops[index]
            if any(self.home[t] in writer for t in op.inputs) and self.costs[index].status is not Status.FREE:
                return True
            writer.update(dict.fromkeys(self._written(op), index))
        return False

    def _is_wanted(self, storage: int, gone: Set[int]) -> bool:
        """Whether what the chain writes there is needed outside of it."""
        if storage in self.results or self.graph.storages[storage].role in _GIVEN:
            return True
        return any(index not in gone for index in self.takers.get(storage, ()))

    def _is_fresh(self, tensor: int, gone: Set[int]) -> bool:
        """Whether the chain makes the memory that a tensor lies in, and not what came before it."""
        storage, ops = self.home[tensor], self.graph.ops
        return any(
            storage in {self.home[t] for t in ops[index].outputs}
            and storage not in {self.home[t] for t in ops[index].inputs}
            for index in gone
        )

    def _late_views(self, tensors: Sequence[int], place: int, gone: Set[int]) -> Iterator[Op]:
        """Views that lead to tensors from memory that is there at a place, and come after it."""
        seen: set[int] = set()
        for tensor in tensors:
            way: list[int] = []
            index = self.situation.flow.maker(tensor)
            while index is not None and index >= place and index not in gone and index not in seen:
                way.append(index)
                index = self.situation.flow.maker(self.graph.ops[index].inputs[0])
            seen.update(way)
            yield from (self.graph.ops[index] for index in reversed(way))

    def _place(self, ops: tuple[int, ...], gone: Set[int], traffic: Sequence[Access]) -> int | None:
        """Where all that the kernel takes is made and nothing that it makes is taken yet; None where there is none."""
        between = range(ops[0] + 1, ops[-1])
        earliest, latest = ops[0], ops[-1]
        for access in traffic:
            storage = self.home[access.tensor]
            writers = [index for index in self.writers.get(storage, ()) if index not in gone]
            takers = [index for index in self.takers.get(storage, ()) if index not in gone]
            if access.written:
                inside = [index for index in (*takers, *writers) if index in between]
                if inside and not self._is_fresh(access.tensor, gone):
                    return None
                latest = min([latest, *inside])
                continue
            if len(writers) > 1 and any(index in between for index in writers):
                return None
            before = [index for index in writers if index < ops[-1]]
            earliest = max([earliest, *(1 + max(index, self.moved.get(index, index)) for index in before)])
        return latest if earliest <= latest else None


def _spans(whole: Tensor, part: Tensor) -> bool:
    """Whether a tensor lies between the first and the last element of another."""
    if whole.storage != part.storage:
        return False
    ends = [
        t.offset + sum((size - 1) * step for size, step in zip(t.shape, t.stride, strict=True)) for t in (whole, part)
    ]
    return whole.offset <= part.offset and ends[1] <= ends[0]


_FEWEST = 2
_GIVEN = frozenset({Role.INPUT, Role.KV_CACHE, Role.WEIGHT, Role.CONSTANT})


def _ops(draft: Draft, chain: Chain) -> list[Op]:
    """The kernels of a chain as ops; each hands the statistics that it keeps in memory to the next."""
    ops: list[Op] = []
    link: int | None = None
    for number, cost in enumerate(chain.kernels):
        reads = [(a.tensor, a.read) for a in cost.traffic if a.read]
        given = [(a.tensor, a.written) for a in cost.traffic if a.written and a.tensor in chain.given]
        fresh = [(a.tensor, a.written) for a in cost.traffic if a.written and a.tensor not in chain.given]
        scratch_read, scratch_written = cost.scratch_read, cost.scratch_written
        if link is not None:
            reads.append((link, scratch_read))
            scratch_read = 0
        if number + 1 < len(chain.kernels):
            link = draft.tensor((scratch_written,), "uint8")
            fresh.append((link, scratch_written))
            scratch_written = 0
        args: dict[str, Arg] = {
            "reads": tuple(TensorRef(tensor=tensor) for tensor, _ in reads),
            "read_bytes": tuple(_stated(draft, tensor, nbytes) for tensor, nbytes in reads),
            "writes": tuple(TensorRef(tensor=tensor) for tensor, _ in given),
            "written_bytes": tuple(_stated(draft, tensor, nbytes) for tensor, nbytes in (*given, *fresh)),
            "dtypes": tuple(cost.vector),
            "flops": tuple(cost.vector.values()),
            "special": cost.special,
            "scratch_read": scratch_read,
            "scratch_written": scratch_written,
        }
        like = draft.graph.ops[chain.anchor]
        ops.append(
            replace(
                like,
                name=f"{like.name}_fused" + (f"_{number}" if number else ""),
                target="fxroof.fused.default",
                args=args,
                outputs=tuple(tensor for tensor, _ in fresh),
                mutates=("writes",) if given else (),
            )
        )
    return ops


def _stated(draft: Draft, tensor: int, nbytes: int) -> int | None:
    """Bytes, where they are not all that the tensor touches."""
    touched = draft.tensors[tensor]
    return None if nbytes == min(touched.touched_bytes, draft.storages[touched.storage].nbytes) else nbytes
