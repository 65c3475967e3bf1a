"""A graph as the model would run it were it cast to a narrower type: weights, inputs and all that follows from them.

What the program asks for in the wide type stays wide. A trace of a wide model does not tell `x.float()` from
`x.to(y.dtype)`: both leave x as it is. So a cast of what is narrow now is taken for one to the wide type, and a cast of
what is wide for the way back; but a cast was none where nothing is computed with what it made, or where a product would
meet operands of both types.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..analyzer.cost import operator_name
from ..analyzer.finding import Rewrite
from ..analyzer.graph import ITEM_BITS, Arg, Graph, Op, Role, Span, Tensor, TensorRef, tensors_of
from ..analyzer.rewrite import Draft, attended_stride, on
from ..analyzer.sdpa import dense_stride


def cast_throughout(wide: str, narrow: str) -> Rewrite:
    """The rewrite of whatever graph comes of all remedies, once however often it is asked for."""

    def rewrite(draft: Draft) -> None:
        if draft.shared.setdefault(("numbers", 0, wide), 0) == 0:
            draft.shared["numbers", 0, wide] = 1
            draft.afterwards(lambda graph: retyped(graph, wide, narrow))

    return rewrite


def retyped(graph: Graph, wide: str, narrow: str) -> Graph:
    """The graph with its numbers of one type in another.

    Raises:
        RewriteError: a view of a changed tensor cannot be followed.
    """
    known = _Known()
    while True:
        before = known.size
        run = _Run(graph, wide, narrow, known)
        changed = run.graph_after()
        if known.size == before:
            return changed


_Line = tuple[Span | None, str, tuple[int, ...]]
"""A cast wherever its line is run: the line, the operator, and the shape of what is cast."""


@dataclass(slots=True)
class _Known:
    """What one pass over the graph found out for the next.

    Attributes:
        no_casts: lines whose casts leave a narrow tensor as it is.
        narrow_made: ops that make a tensor from nothing in the type of the model, not in the wide one.
        wide_cache: inputs of the phase, parts of a cache, that the program keeps in the wide type.
    """

    no_casts: set[_Line] = field(default_factory=set)
    narrow_made: set[int] = field(default_factory=set)
    wide_cache: set[int] = field(default_factory=set)

    @property
    def size(self) -> int:
        """It only grows."""
        return len(self.no_casts) + len(self.narrow_made) + len(self.wide_cache)


@dataclass(frozen=True, slots=True)
class _Open:
    """A cast to the wide type that the rest of its module reads: the trace has one tensor for before and after."""

    copy: int
    module: str


class _Run:
    """One pass over a graph, op by op. `moved` says which tensor took the place of another so far."""

    def __init__(self, graph: Graph, wide: str, narrow: str, known: _Known) -> None:
        self.graph, self.wide, self.narrow, self.known = graph, wide, narrow, known
        self.draft = Draft(graph)
        self.as_wide = ITEM_BITS[wide] == ITEM_BITS[narrow]
        """True where one type simply stands for the other."""
        self.moved: dict[int, int] = {}
        self.open: dict[int, _Open] = {}
        self.yielding: set[int] = set()
        """Wide tensors that follow from no narrow one: positions, masks. They do not make others wide."""
        self.caster: dict[int, int] = {}
        """The cast that a wide tensor comes from, or the op that made it from nothing."""
        self.bare: set[int] = set()
        """Wide tensors that were only cast, viewed and copied so far."""
        self.fixed: set[int] = set()
        """Weights, buffers, and what is no more than picked from them, cast or not."""
        self.copies: dict[int, _Line] = {}
        """What casts to the wide type made, and where."""
        self.ops: list[Op] = []
        self._begin()

    def graph_after(self) -> Graph:
        """The changed graph."""
        before = self.known.size
        for index, op in enumerate(self.graph.ops):
            self._step(index, op)
        outputs = tuple([self.open[t].copy if t in self.open else self.moved.get(t, t) for t in self.graph.outputs])
        self._look_for_idle_casts(outputs)
        self._keep_roles(outputs)
        if self.known.size == before:  # types are settled
            self._compare_caches(outputs)
        return replace(
            self.graph,
            ops=tuple(self.ops),
            tensors=tuple(self.draft.tensors),
            storages=tuple(self.draft.storages),
            inputs=tuple([self.moved.get(tensor, tensor) for tensor in self.graph.inputs]),
            outputs=outputs,
        )

    def _begin(self) -> None:
        graph, draft = self.graph, self.draft
        first: dict[int, str] = {}
        for tensor in graph.tensors:
            first.setdefault(tensor.storage, tensor.dtype)
        for index, tensor in enumerate(graph.tensors):
            if tensor.dtype == self.wide:
                draft.tensors[index] = replace(tensor, dtype=self.narrow)
        for home, dtype in first.items():
            if dtype == self.wide:
                storage = graph.storages[home]
                nbytes = storage.nbytes * ITEM_BITS[self.narrow] // ITEM_BITS[self.wide]
                draft.storages[home] = replace(storage, nbytes=nbytes)
        made = {tensor for op in graph.ops for tensor in op.outputs if tensor not in op.inputs}
        given = {tensor for op in graph.ops for tensor in op.inputs} - made
        for index in sorted(given):
            tensor = graph.tensors[index]
            if graph.role(index) in (Role.WEIGHT, Role.CONSTANT):
                self.fixed.add(index)
            if tensor.dtype != self.wide or self.as_wide:
                continue
            literal = graph.storages[tensor.storage].role is Role.ACTIVATION or not tensor.shape
            if literal or index in self.known.wide_cache:
                self.moved[index] = self._new(index, tensor.stride, self.wide)
                if literal:
                    self.yielding.add(self.moved[index])

    def _step(self, index: int, op: Op) -> None:
        seen = {tensor: self._seen(tensor, op.module) for tensor in op.inputs}
        name = operator_name(op.target)
        if op.mutates:
            self._write(op, seen)
        elif name in _CASTS and len(op.outputs) == 1:
            self._cast(index, op, seen)
        elif op.outputs and self.graph.is_view(op):
            self._view(op, seen)
        elif op.outputs:
            self._compute(index, op, name, seen)
        else:
            self._emit(op, seen, ())

    def _seen(self, tensor: int, module: str) -> int:
        """The tensor that an op of a module finds in the place of another."""
        cast = self.open.get(tensor)
        if cast is not None and cast.module == module:
            return cast.copy
        return self.moved.get(tensor, tensor)

    def _define(self, old: int, new: int) -> None:
        self.open.pop(old, None)
        if new == old:
            self.moved.pop(old, None)
        else:
            self.moved[old] = new

    def _emit(self, op: Op, seen: Mapping[int, int], outputs: tuple[int, ...]) -> None:
        args = {name: on(value, seen) for name, value in op.args.items()}
        self.ops.append(replace(op, args=args, outputs=outputs))

    # kinds of ops

    def _write(self, op: Op, seen: Mapping[int, int]) -> None:
        for target in self.graph.mutated(op):
            others = [self.draft.tensors[new].dtype for old, new in seen.items() if old != target]
            if seen.get(target) in self.yielding and self.narrow in others:
                self._yield(seen[target])
        homes = {self.graph.tensors[old].storage: new for old, new in seen.items()}
        made: list[int] = []
        for old in op.outputs:
            new = seen.get(old, homes.get(self.graph.tensors[old].storage, old))
            made.append(new)
            if old not in seen:
                self._define(old, new)
        self._emit(op, seen, tuple(made))

    def _cast(self, index: int, op: Op, seen: dict[int, int]) -> None:
        (old,) = op.outputs
        source = op.inputs[0]
        given = self.draft.tensors[seen[source]]
        for tensor in op.inputs[1:]:  # as it was before a cast: no program asks for a type to be what it is already
            seen[tensor] = self.moved.get(tensor, tensor)
        wanted = self._wanted(index, op, seen, given)
        if wanted == given.dtype and not op.args.get("copy"):
            self._emit(op, seen, (seen[source],))
            if old != source:
                self._define(old, seen[source])
            return
        copied = self.graph.tensors[old].storage == self.graph.tensors[source].storage
        role = Role.ACTIVATION if copied else None
        new = self._new(old, dense_stride(given.shape, given.stride), wanted, role)
        self._emit(replace(op, args={**op.args, **({"dtype": wanted} if "dtype" in op.args else {})}), seen, (new,))
        if wanted == self.wide:
            self.caster[new] = index
            if given.dtype == self.narrow:
                self.bare.add(new)
                if seen[source] in self.fixed:
                    self.fixed.add(new)
                self.copies[new] = self._line(op)
            if given.dtype != self.narrow and (seen[source] in self.yielding or not _is_float(given.dtype)):
                self.yielding.add(new)
        if old == source and given.dtype == self.narrow and wanted == self.wide:
            self.open[old] = _Open(new, op.module)
            return
        if given.dtype == self.wide and wanted == self.narrow:
            self.open = {t: cast for t, cast in self.open.items() if cast.module != op.module}
        self._define(old, new)

    def _wanted(self, index: int, op: Op, seen: Mapping[int, int], given: Tensor) -> str:
        """The type that a cast asks for."""
        other = op.args.get("other")
        if isinstance(other, TensorRef):
            return self.draft.tensors[seen[other.tensor]].dtype
        asked = op.args.get("dtype")
        if not isinstance(asked, str):
            return given.dtype
        if asked != self.wide:
            return asked
        if self.as_wide:
            return self.narrow
        was = self.graph.tensors[op.inputs[0]].dtype
        if was != self.wide:
            return self.narrow if index in self.known.narrow_made else self.wide
        if given.dtype == self.narrow:
            return self.narrow if self._line(op) in self.known.no_casts else self.wide
        if seen[op.inputs[0]] in self.yielding:
            if index in self.known.narrow_made:
                return self.narrow
            self.caster[seen[op.inputs[0]]] = index
            return self.wide
        if seen[op.inputs[0]] in self.bare:  # nothing was computed in the wide type: that cast was none, this is one
            before = self.graph.ops[self.caster[seen[op.inputs[0]]]]
            self.known.no_casts.add(self._line(before))
        return self.narrow

    def _line(self, cast: Op) -> _Line:
        return cast.span, cast.target, self.graph.tensors[cast.inputs[0]].shape

    def _view(self, op: Op, seen: Mapping[int, int]) -> None:
        graph, draft = self.graph, self.draft
        base = next(t for t in op.inputs if graph.tensors[t].storage == graph.tensors[op.outputs[0]].storage)
        new_base, was = draft.tensors[seen[base]], graph.tensors[base]
        same_layout = (new_base.shape, new_base.stride) == (was.shape, was.stride)
        if seen[base] == base:
            outputs = op.outputs
        elif same_layout:
            outputs = tuple([self._same_view(old, was, seen[base]) for old in op.outputs])
        else:
            outputs = draft.results(op, {base: seen[base], op.inputs[0]: seen[op.inputs[0]]})
        typed = tuple([self._typed(old, new, base) for old, new in zip(op.outputs, outputs, strict=True)])
        for old, new in zip(op.outputs, typed, strict=True):
            if seen[base] in self.yielding and draft.tensors[new].dtype == self.wide:
                self.yielding.add(new)
            if seen[base] in self.caster:
                self.caster[new] = self.caster[seen[base]]
            if seen[base] in self.bare:
                self.bare.add(new)
            if seen[base] in self.fixed:
                self.fixed.add(new)
            if old != base:
                self._define(old, new)
            elif new != seen[base]:
                self.moved[old] = new
        self._emit(op, seen, typed)

    def _same_view(self, old: int, was: Tensor, base: int) -> int:
        made, given = self.graph.tensors[old], self.draft.tensors[base]
        bits = ITEM_BITS[made.dtype] / ITEM_BITS[was.dtype]
        offset = made.offset - int(was.offset / bits) + int(given.offset / bits)
        dtype = given.dtype if made.dtype == was.dtype else made.dtype
        self.draft.tensors.append(replace(made, storage=given.storage, offset=offset, dtype=dtype))
        return len(self.draft.tensors) - 1

    def _typed(self, old: int, new: int, base: int) -> int:
        """A view in the type that its base has now, or in its own where it is another, such as that of pairs."""
        if self.graph.tensors[old].dtype == self.graph.tensors[base].dtype or new != old:
            return new
        if self.graph.tensors[old].dtype != self.wide:
            return new
        self.draft.tensors.append(self.graph.tensors[old])
        return len(self.draft.tensors) - 1

    def _compute(self, index: int, op: Op, name: str, seen: dict[int, int]) -> None:
        if name in _PRODUCTS:
            self._join(op, seen)
        if name in _MOVES:
            self._unite(seen)
        wide, yields = self._is_wide(index, op, name, seen)
        changed = {old: new for old, new in seen.items() if old != new}
        outputs = self._attention(op, seen) if name == _SDPA else self._laid_out(op, changed)
        made: list[int] = []
        for old, new in zip(op.outputs, outputs, strict=True):
            result = new
            if self.graph.tensors[old].dtype == self.wide and wide:
                result = self._new(old, self.draft.tensors[new].stride, self.wide)
                if yields:
                    self.yielding.add(result)
                    if op.args.get("dtype") == self.wide:
                        self.caster[result] = index
                else:
                    casts = [self.caster[t] for t in seen.values() if t in self.caster and t not in self.yielding]
                    if casts:
                        self.caster[result] = max(casts)
                    if name in _MOVES and self.bare.issuperset(self._asked_wide(seen)):
                        self.bare.add(result)
            if name in _MOVES and self.fixed.issuperset(t for t in seen.values() if self._is_number(t)):
                self.fixed.add(result)
            made.append(result)
            self._define(old, result)
        asked = {"dtype": self.narrow} if op.args.get("dtype") == self.wide and not wide else {}
        self._emit(replace(op, args={**op.args, **asked}), seen, tuple(made))

    def _is_number(self, tensor: int) -> bool:
        return _is_float(self.draft.tensors[tensor].dtype)

    def _asked_wide(self, seen: Mapping[int, int]) -> set[int]:
        return {t for t in seen.values() if self.draft.tensors[t].dtype == self.wide} - self.yielding

    def _unite(self, seen: Mapping[int, int]) -> None:
        """What is only put together is of one type: a cast of a part to another was none."""
        if any(self.draft.tensors[t].dtype == self.narrow for t in seen.values()):
            for tensor in self.bare.intersection(seen.values()):
                before = self.graph.ops[self.caster[tensor]]
                self.known.no_casts.add(self._line(before))

    def _laid_out(self, op: Op, changed: Mapping[int, int]) -> tuple[int, ...]:
        if not op.inputs or op.inputs[0] not in changed:
            return op.outputs
        return self.draft.results(op, changed)

    def _attention(self, op: Op, seen: Mapping[int, int]) -> tuple[int, ...]:
        (old,) = op.outputs
        stride = attended_stride(replace(op, args={n: on(v, seen) for n, v in op.args.items()}), self.draft.tensors)
        if stride in (None, self.graph.tensors[old].stride):
            return (old,)
        return (self._new(old, stride, self.draft.tensors[seen[op.inputs[0]]].dtype),)

    # types

    def _is_wide(self, index: int, op: Op, name: str, seen: Mapping[int, int]) -> tuple[bool, bool]:
        """Whether what an op returns stays wide, and whether it would yield to what is narrow."""
        if self.as_wide:
            return False, False
        asked = op.args.get("dtype")
        floats = [t for t in seen.values() if _is_float(self.draft.tensors[t].dtype)]
        floats = [t for t in floats if self.draft.tensors[t].shape] or floats
        if not floats or (asked == self.wide and name not in _ACCUMULATING):
            return index not in self.known.narrow_made, True
        wide = [t for t in floats if self.draft.tensors[t].dtype == self.wide]
        if len(wide) < len(floats):
            for tensor in self.bare.intersection(wide) & self.fixed:  # a weight or a table is cast to what it meets
                before = self.graph.ops[self.caster[tensor]]
                self.known.no_casts.add(self._line(before))
        if asked == self.wide:
            return True, not (len(wide) < len(floats) or set(wide) - self.yielding)
        if set(wide) - self.yielding:
            return True, False
        others = [t for t in floats if t not in wide]
        if any(self.draft.tensors[t].dtype not in (self.narrow, *_EIGHT_BITS) for t in others):
            return True, False
        if wide and others:
            for tensor in wide:
                self._yield(tensor)
        return not others, True

    def _yield(self, tensor: int) -> None:
        maker = self.caster.get(tensor)
        if maker is not None:
            self.known.narrow_made.add(maker)

    def _join(self, op: Op, seen: dict[int, int]) -> None:
        """Operands of a product have one type; where they would not, one is cast, as the program would have to."""
        operands = [t for name, value in op.args.items() if name != "attn_mask" for t in tensors_of(value)]
        types = {self.draft.tensors[seen[t]].dtype for t in operands}
        if self.narrow not in types or self.wide not in types:
            return
        for operand in operands:
            new = seen[operand]
            if self.draft.tensors[new].dtype != self.wide:
                continue
            maker = self.caster.get(new)
            if maker is not None:
                if new in self.yielding:
                    self.known.narrow_made.add(maker)
                else:
                    caster = self.graph.ops[maker]
                    self.known.no_casts.add(self._line(caster))
            given = self.draft.tensors[new]
            cast = self.draft.tensor(given.shape, self.narrow, stride=dense_stride(given.shape, given.stride))
            args: dict[str, Arg] = {"self": TensorRef(tensor=new), "dtype": self.narrow, "copy": False}
            name = f"{op.name}_operand_{new}"
            self.ops.append(replace(op, name=name, target="aten.to.dtype", args=args, outputs=(cast,), mutates=()))
            seen[operand] = cast

    # tensors

    def _new(self, like: int, stride: tuple[int, ...], dtype: str, role: Role | None = None) -> int:
        """A tensor in the place of another, in memory of its own, which is for the same unless a role is given."""
        made = self.graph.tensors[like]
        kept = self.graph.storages[made.storage]
        return self.draft.tensor(made.shape, dtype, stride=stride, role=role or kept.role, name=kept.name)

    def _keep_roles(self, outputs: tuple[int, ...]) -> None:
        tensors, storages = self.draft.tensors, self.draft.storages
        returned = {tensors[t].storage for t in outputs}
        for before, after in zip(self.graph.outputs, outputs, strict=True):
            old, new = self.graph.tensors[before].storage, tensors[after].storage
            if old != new and storages[new].role is Role.ACTIVATION:
                storages[new] = replace(storages[new], role=self.graph.storages[old].role)
        for home, storage in enumerate(storages):
            if storage.role is Role.OUTPUT and home not in returned:
                storages[home] = replace(storage, role=Role.ACTIVATION)

    def _look_for_idle_casts(self, outputs: tuple[int, ...]) -> None:
        """A cast whose result nobody reads, wherever its line is run, was none."""
        read = {tensor for op in self.ops for tensor in op.inputs} | set(outputs)
        busy = {line for copy, line in self.copies.items() if copy in read}
        self.known.no_casts |= set(self.copies.values()) - busy

    def _compare_caches(self, outputs: tuple[int, ...]) -> None:
        """A cache comes in as the step before returned it."""
        given = [t for t in self.graph.inputs if self.graph.role(t) is Role.KV_CACHE]
        kept = [new for old, new in zip(self.graph.outputs, outputs, strict=True) if self._is_cache(old)]
        if len(given) != len(kept):
            return
        for before, after in zip(given, kept, strict=True):
            if self.graph.tensors[before].dtype == self.wide == self.draft.tensors[after].dtype:
                self.known.wide_cache.add(before)

    def _is_cache(self, tensor: int) -> bool:
        return self.graph.role(tensor) is Role.KV_CACHE


_SDPA = "aten.scaled_dot_product_attention"
_CASTS = frozenset({"aten.to", "aten._to_copy", "aten.type_as", "aten.float", "aten.type"})
_PRODUCTS = frozenset(
    f"aten.{name}"
    for name in (
        "linear", "matmul", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "addbmm", "einsum", "conv1d", "conv2d",
        "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "tensordot", "_grouped_mm",
        "scaled_dot_product_attention",
    )
)  # fmt: skip
_MOVES = frozenset(
    f"aten.{name}"
    for name in (
        "cat",
        "concat",
        "stack",
        "clone",
        "contiguous",
        "pad",
        "repeat",
        "repeat_interleave",
        "index_select",
        "gather",
        "index",
    )
)
_ACCUMULATING = frozenset(
    f"aten.{name}"
    for name in ("softmax", "_softmax", "log_softmax", "sum", "mean", "cumsum", "prod", "cumprod", "nansum", "norm")
)
"""Ops that are told the type to compute in; others are told the type of what they make from nothing."""
_EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))
