"""A module and example inputs -> a Graph: the file that knows torch.export and torch.fx.

torch.export gives the program as an fx graph; every node is then run again on plain meta tensors, because that alone
gives exact strides and storage identity: attention returns the layout of the GPU's kernel, multi-output ops return
views, and a reloaded program gets its aliasing back.
"""

import contextlib
import functools
import math
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .cost import ALLOWS_TF32, CUBLAS, operator_name
from .errors import TraceError
from .graph import Arg, Graph, Op, Role, Span, Storage, Tensor, TensorRef
from .lifetimes import Lifetimes, lives_of, watched
from .meta import tracing
from .residence import Residence
from .scenario import Phase
from .sdpa import Attention, is_fused_somewhere, traced_output_stride
from .subgraphs import Sparsity, counted, sparsity

RESULT, CACHE = "result", "cache"
"""Keys under which a program may return its tensors, to say which of them are carried to the next step."""

NODE_LIMIT = 200_000
"""Nodes beyond which a graph is an unrolled loop rather than a model."""


def trace(
    module: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    phase: Phase | None = None,
    cache: Iterable[torch.Tensor] = (),
    prefix: str = "",
) -> Graph:
    """Trace a module on the meta device into the program that a GPU would run.

    Args:
        module: all of whose tensors are on meta; see `meta.on_meta`. Or a program that is already exported.
        args: example inputs on meta.
        kwargs: further example inputs by name.
        phase: what the graph is a phase of; a plain forward when not given.
        cache: those of the inputs that are carried from step to step.
        prefix: attribute under which the user's model hangs in `module`, left out of module names.

    Raises:
        TraceError: export failed; the message names the user's line.
    """
    program = module if isinstance(module, torch.export.ExportedProgram) else export(module, args, kwargs)
    return from_exported(program, args, kwargs, phase=phase, cache=cache, prefix=prefix)


def export(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> torch.export.ExportedProgram:
    """torch.export of the program as it runs: no export-only branches, autocast explicit, grad mode off."""
    residence = Residence()
    program = _exported(module, args, kwargs, residence)
    if left := residence.left:  # every step but the first begins with weights where the one before left them
        program = _exported(module, args, kwargs, Residence(left))
    return program


def _exported(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, residence: Residence
) -> torch.export.ExportedProgram:
    inputs = len(_flat((args, dict(kwargs or {}))))
    beginning = module.register_forward_pre_hook(lambda *_: residence.begin(module))
    try:
        with tracing(residence), watched(inputs), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(module, args, dict(kwargs or {}), strict=False)
    except Exception as error:
        raise explained(error) from error
    finally:
        beginning.remove()


def from_exported(
    program: torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    phase: Phase | None = None,
    cache: Iterable[torch.Tensor] = (),
    prefix: str = "",
) -> Graph:
    """The Graph of an exported program; arguments as for `trace`."""
    phase = phase or Phase()
    nodes = len(program.graph.nodes)
    if nodes > NODE_LIMIT:
        raise TraceError(
            f"The {phase.name} graph has {nodes:,} operations, more than {NODE_LIMIT:,}.",
            "A Python loop over tokens unrolls: analyse a shorter prompt with --input-len.",
        )
    leaves = pytree.tree_leaves((args, dict(kwargs or {})))
    builder = _Builder(program=program, leaves=leaves, cached={id(t) for t in cache}, prefix=prefix)
    return builder.build(phase)


@dataclass
class _Builder:
    """Runs an fx graph on meta tensors and writes down what happened."""

    program: torch.export.ExportedProgram
    leaves: Sequence[Any]
    cached: set[int]
    prefix: str
    storages: dict[int, int] = field(default_factory=dict)
    roles: list[tuple[int, Role, str]] = field(default_factory=list)
    tensors: dict[Tensor, int] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    alive: list[Any] = field(default_factory=list)  # a storage's address is its name only while it lives
    constants: dict[fx.Node, torch.Tensor] = field(default_factory=dict)  # those with values
    names: set[str] = field(default_factory=set)
    lifetimes: Lifetimes = field(default_factory=Lifetimes)
    site: "_Site" = field(default_factory=lambda: _Site())
    mapped: int = 0  # depth of torch.vmap

    def build(self, phase: Phase) -> Graph:
        env: dict[fx.Node, Any] = {}
        inputs = self._place_inputs(env)
        with torch.no_grad(), self._vmap_left():
            returned = self._run(self.program.graph_module, env)
        outputs = self._outputs(returned)
        carried = self._outputs(self._carried(returned))
        storages = self._finished(outputs, carried)
        return Graph(
            phase=phase.name,
            tokens=phase.tokens,
            new_tokens=phase.new_tokens,
            cache_fill=phase.cache_fill,
            turns=phase.turns,
            expert_ranks=phase.expert_ranks,
            storages=storages,
            tensors=tuple(self.tensors),
            ops=tuple(self.ops),
            inputs=tuple(inputs),
            outputs=outputs,
        )

    def _place_inputs(self, env: dict[fx.Node, Any]) -> list[int]:
        program = self.program
        placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
        given = iter(self.leaves)
        inputs: list[int] = []
        kinds = torch.export.graph_signature.InputKind
        for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
            if spec.kind == kinds.USER_INPUT:
                leaf = next(given, None)
                value = leaf if leaf is not None or node.meta.get("val") is None else node.meta["val"]
                env[node] = _as_meta(value)
                if isinstance(env[node], torch.Tensor):
                    role = Role.KV_CACHE if id(leaf) in self.cached else Role.INPUT
                    inputs.append(self._tensor(env[node], node.name, role))
                    self._watched(node, env[node])
            else:
                target = str(spec.target)
                value = program.state_dict.get(target, program.constants.get(target))
                if isinstance(value, torch.Tensor) and not value.is_meta:
                    self.constants[node] = value
                env[node] = _as_meta(value)
                if isinstance(env[node], torch.Tensor):
                    weight = spec.kind == kinds.PARAMETER or (spec.kind == kinds.BUFFER and bool(spec.persistent))
                    self._tensor(env[node], self._unprefixed(target), Role.WEIGHT if weight else Role.CONSTANT)
        return inputs

    def _run(self, graph_module: fx.GraphModule, env: dict[fx.Node, Any]) -> Any:
        for node in graph_module.graph.nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], lambda n: env[n])
            if node.op == "get_attr":
                env[node] = _as_meta(functools.reduce(getattr, node.target.split("."), graph_module))
            elif node.op == "call_function":
                args = fx.node.map_arg(node.args, lambda n: env[n])
                kwargs = fx.node.map_arg(node.kwargs, lambda n: env[n])
                try:
                    env[node] = result = self._call(node, args, kwargs)
                except GuardOnDataDependentSymNode as error:  # a shape that only data tell, as that of nonzero
                    raise self._unknown(node, error) from error
                if not self.mapped:
                    self._watched(node, result)
        return None

    def _unknown(self, node: fx.Node, error: Exception) -> TraceError:
        told = explained(error)
        span, user_span = _spans(node.meta.get("stack_trace") or "")
        place = user_span or span
        where = f" at {place}" if place else ""
        return TraceError(f"A shape depends on tensor values{where}: what {node.target} returns.", told.hint)

    def _watched(self, node: fx.Node, result: Any) -> None:
        if lives := lives_of(node):
            homes = [self.storages.get(t.untyped_storage()._cdata, -1) for t in _flat(result)]
            self.lifetimes.add(lives, homes, len(self.ops) - 1)

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        target = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            if self.mapped or str(target) == "flat_apply":  # which calls a Python function, such as an autograd one
                return self._call_below(node, target, args, kwargs)
            return self._higher_order(node, target, args, kwargs)
        if not isinstance(target, torch._ops.OpOverload):
            self.mapped += _VMAP_DEPTH.get(getattr(target, "__name__", ""), 0)
            return target(*args, **kwargs)  # type: ignore[operator]  # operator.getitem and integer arithmetic
        if self.mapped:
            return self._call_below(node, target, args, kwargs)
        result = self._evaluate(node, target, args, kwargs)
        self.alive.append(result)
        self._record(node, target, args, kwargs, result)
        return result

    def _evaluate(self, node: fx.Node, target: torch._ops.OpOverload, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten.scaled_dot_product_attention.default:
            return _attention(target, args, kwargs)
        try:
            return target(*args, **_meta_device(kwargs))
        except Exception:
            # no meta kernel outside export's own: take export's shapes, as fresh memory
            return pytree.tree_map(_fresh, node.meta.get("val"))

    def _call_below(self, node: fx.Node, target: Any, args: Any, kwargs: Any) -> Any:
        """Write down the ops that a call makes: under torch.vmap, those of the batching rule on whole batches."""
        builder = self

        class Below(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it so
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                builder.alive.append(result)
                builder._record(node, func, args, kwargs or {}, result)
                return result

        try:
            with Below():  # type: ignore[no-untyped-call]  # torch leaves it so
                return target(*args, **_meta_device(kwargs))
        except Exception as error:
            raise TraceError(
                f"{target} cannot be followed under torch.vmap: {type(error).__name__}: {error}",
                "Write the batched form of the function.",
            ) from error

    @contextlib.contextmanager
    def _vmap_left(self) -> Iterator[None]:
        try:
            yield
        finally:  # after an error in the middle, torch would stay in vmap
            for _ in range(self.mapped):
                torch._C._functorch._vmap_decrement_nesting()

    def _higher_order(self, node: fx.Node, target: Any, args: Any, kwargs: Any) -> Any:
        name = target.name()
        match name:
            case "cond":
                return self._cond(node, *args)
            case "while_loop":
                return self._while_loop(node, *args)
            case "scan":
                return self._scan(node, name, *args)
            case "map_impl":
                body, over, others = args
                return self._scan(node, name, body, (), over, others)
            case "associative_scan":
                return self._associative_scan(node, *args)
            case "flex_attention":
                return self._flex_attention(node, *args)
            case "triton_kernel_wrapper_functional" | "triton_kernel_wrapper_mutation":
                return self._triton(node, kwargs)
        bodies = [a for a in args if isinstance(a, fx.GraphModule)]
        if name in _WRAPPERS and len(bodies) == 1:
            (body,) = bodies
            given = [a for a in pytree.tree_leaves(args[args.index(body) + 1 :]) if not isinstance(a, str)]
            holes = sum(n.op == "placeholder" for n in body.graph.nodes)
            if len(given) >= holes:  # hints follow the operands
                with self._inside(node):
                    return self._body(body, given[:holes])
        return self._opaque(node, f"higher_order.{name}", {"args": _flat((args, kwargs))})

    def _opaque(self, node: fx.Node, target: str, args: Mapping[str, Any]) -> Any:
        result = pytree.tree_map(_fresh, node.meta.get("val"))
        self._join(node, target, args, result)
        return result

    def _cond(
        self, node: fx.Node, predicate: Any, true: fx.GraphModule, false: fx.GraphModule, operands: Sequence[Any] = ()
    ) -> Any:
        """Both branches are written down; pricing keeps the cheaper one."""
        name, results = self._name(node), []
        for number, body in enumerate((true, false)):
            with self._inside(node, branch=f"{name}:{number}"):
                results.append(self._body(body, operands))
        merged = pytree.tree_map(_fresh, results[0])
        given = {"pred": predicate, "true": _flat(results[0]), "false": _flat(results[1])}
        self._join(node, "higher_order.cond", given, merged, name)
        return merged

    def _while_loop(
        self,
        node: fx.Node,
        condition: fx.GraphModule,
        body: fx.GraphModule,
        carried: Sequence[Any],
        others: Sequence[Any] = (),
    ) -> Any:
        """A turn is written down with its trip count; one turn where that depends on data."""
        first: Any = node.args[2]
        rest: Any = node.args[3] if len(node.args) > 3 else ()
        loop = counted(condition, body, first, rest, self.constants)
        trips = 1 if loop is None else loop.trips
        name, operands = self._name(node), (*carried, *others)
        with self._inside(node, repeat=trips + 1):
            self._body(condition, operands)
        results = list(carried)
        if trips:
            with self._inside(node, repeat=trips):
                results = list(self._body(body, operands))
        for position, value in (loop.finals if loop else {}).items():
            if not isinstance(value, torch.Tensor):
                results[position] = value
        known = None if loop is None else trips
        self._join(node, "higher_order.while_loop", {"trips": known, "results": tuple(results)}, (), name)
        return results

    def _scan(
        self,
        node: fx.Node,
        kind: str,
        body: fx.GraphModule,
        init: Sequence[Any],
        over: Sequence[torch.Tensor],
        others: Sequence[Any] = (),
    ) -> Any:
        """A step is written down with their number, then the stacking of what each step returns."""
        name, length = self._name(node), over[0].shape[0]
        with self._inside(node, repeat=length):
            results = self._body(body, (*init, *(x.select(0, 0) for x in over), *others))
        carry, each = tuple(results[: len(init)]), tuple(results[len(init) :])
        stacked = tuple(y if y is None else y.new_empty((length, *y.shape)) for y in each)
        self._join(node, f"higher_order.{kind}", {"trips": length, "each": each}, stacked, name)
        return (*carry, *stacked)

    def _associative_scan(
        self, node: fx.Node, body: fx.GraphModule, over: Sequence[torch.Tensor], others: Sequence[Any] = ()
    ) -> Any:
        """One kernel, which combines at least length - 1 times."""
        name, length = self._name(node), over[0].shape[0]
        rows = [x.select(0, 0) for x in over]
        with self._inside(node, repeat=max(length - 1, 0), kernel=name):
            self._body(body, (*rows, *rows, *others))
        results = tuple(torch.empty_like(x) for x in over)
        given = {"trips": length, "xs": tuple(over), "others": tuple(others)}
        self._join(node, "higher_order.associative_scan", given, results, name)
        return results

    def _flex_attention(
        self,
        node: fx.Node,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        score: fx.GraphModule,
        block_mask: Sequence[Any],
        *rest: Any,
    ) -> Any:
        """One kernel; `score_mod` runs in it for every pair that the mask leaves."""
        name, length = self._name(node), (query.shape[-2], key.shape[-2])
        mask_nodes: Any = (*node.args[4][:-1], block_mask[-1])  # type: ignore[index, misc]  # one of many kinds of argument
        captured: Any = node.args[8] if len(node.args) > 8 else ()
        seen = sparsity(mask_nodes, captured, *length, self.constants)
        left = seen or Sparsity(1, 1)
        pairs = query.shape[0] * query.shape[1] * length[0] * length[1] * left.pairs // max(left.of, 1)
        holes = [n for n in score.graph.nodes if n.op == "placeholder"]
        score_others, mask_others = (*rest, (), ())[2:4]
        scalars = [_fresh(n.meta["val"]) for n in holes[:5]]
        with self._inside(node, repeat=pairs, kernel=name):
            self._body(score, (*scalars, *score_others))
        given = {
            "query": query, "key": key, "value": value, "pairs": pairs, "keys": left.keys,
            "evaluated": seen is not None, "others": (*score_others, *mask_others),
        }  # fmt: skip
        out, *statistics = pytree.tree_map(_fresh, node.meta["val"])
        self._join(node, "higher_order.flex_attention", given, out, name)
        return (out, *statistics)

    def _triton(self, node: fx.Node, kwargs: Mapping[str, Any]) -> Any:
        kernel: Any = torch._higher_order_ops.triton_kernel_wrap.kernel_side_table.get_kernel(kwargs["kernel_idx"])
        while hasattr(kernel, "fn"):  # autotuners and heuristics wrap the function
            kernel = kernel.fn
        return self._opaque(node, f"triton.{kernel.__name__}", kwargs["kwargs"])

    def _body(self, body: fx.GraphModule, operands: Sequence[Any]) -> Any:
        holes = [n for n in body.graph.nodes if n.op == "placeholder"]
        return self._run(body, dict(zip(holes, operands, strict=True)))

    @contextlib.contextmanager
    def _inside(self, node: fx.Node, *, repeat: int = 1, branch: str = "", kernel: str = "") -> Iterator[None]:
        outer, trace = self.site, node.meta.get("stack_trace") or ""
        self.site = _Site(
            stack=node.meta.get("nn_module_stack") or outer.stack,
            trace=trace if _spans(trace)[0] else outer.trace,
            repeat=outer.repeat * repeat,
            branch=(*outer.branch, branch) if branch else outer.branch,
            kernel=kernel or outer.kernel,
        )
        try:
            yield
        finally:
            self.site = outer

    def _join(self, node: fx.Node, target: str, args: Mapping[str, Any], result: Any, name: str = "") -> None:
        self.alive.append(result)
        self._add(node, target, {key: self._arg(value) for key, value in args.items()}, (), result, name)

    def _name(self, node: fx.Node) -> str:
        name = node.name
        if name in self.names:  # a node of a body, or one that stands for several ops
            name = f"{name}.{len(self.names)}"
        self.names.add(name)
        return name

    def _record(self, node: fx.Node, target: torch._ops.OpOverload, args: Any, kwargs: Any, result: Any) -> None:
        bound: dict[str, Arg] = {}
        writes: list[str] = []
        for position, parameter in enumerate(target._schema.arguments):
            if position < len(args) and not parameter.kwarg_only:
                value = args[position]
            elif parameter.name in kwargs:
                value = kwargs[parameter.name]
            elif parameter.has_default_value():
                value = parameter.default_value
            else:
                continue
            bound[parameter.name] = self._arg(value)
            if parameter.alias_info is not None and parameter.alias_info.is_write and value is not None:
                writes.append(parameter.name)
        if operator_name(str(target)) in CUBLAS and _allows_tf32():
            bound[ALLOWS_TF32] = True
        self._add(node, str(target), bound, tuple(writes), result)

    def _add(
        self,
        node: fx.Node,
        target: str,
        args: Mapping[str, Arg],
        mutates: tuple[str, ...],
        result: Any,
        name: str = "",
    ) -> None:
        stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or self.site.stack
        path, kind = next(reversed(list(stack.values())), ("", ""))
        span, user_span = _spans(node.meta.get("stack_trace") or "")
        if span is None:
            span, user_span = _spans(self.site.trace)
        self.ops.append(
            Op(
                name=name or self._name(node),
                target=target,
                module=self._unprefixed(path),
                module_type=(kind if isinstance(kind, str) else kind.__name__).rsplit(".", 1)[-1],
                args=args,
                outputs=tuple(
                    self._tensor(t, node.name) for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)
                ),
                mutates=mutates,
                span=span,
                user_span=user_span,
                repeat=self.site.repeat,
                branch=self.site.branch,
                kernel=self.site.kernel,
                number=str(result) if isinstance(result, torch.SymInt | torch.SymFloat) else "",
            )
        )

    def _arg(self, value: Any) -> Arg:
        if isinstance(value, torch.Tensor):
            return self._ref(value)
        if isinstance(value, list | tuple):
            return tuple(v for v in map(self._arg, value) if not isinstance(v, tuple))
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)  # JSON has no infinity
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, complex):
            return str(value)
        return str(value).removeprefix("torch.")

    def _ref(self, tensor: torch.Tensor) -> TensorRef:
        return TensorRef(tensor=self._tensor(tensor, "literal", Role.CONSTANT))

    def _tensor(self, value: torch.Tensor, name: str, role: Role = Role.ACTIVATION) -> int:
        memory = value.untyped_storage()
        home = self.storages.get(memory._cdata)
        if home is None:
            home = self.storages[memory._cdata] = len(self.roles)
            self.roles.append((memory.nbytes(), role, name))
            self.alive.append(value)
        tensor = _described(value, home)
        return self.tensors.setdefault(tensor, len(self.tensors))

    def _outputs(self, returned: Any) -> tuple[int, ...]:
        return tuple(self._tensor(t, "output") for t in pytree.tree_leaves(returned) if isinstance(t, torch.Tensor))

    def _carried(self, returned: Any) -> Any:
        spec = self.program.call_spec.out_spec
        whole = pytree.tree_unflatten(pytree.tree_leaves(returned), spec) if spec is not None else None
        return whole[CACHE] if isinstance(whole, dict) and set(whole) == {RESULT, CACHE} else ()

    def _finished(self, outputs: tuple[int, ...], carried: tuple[int, ...]) -> tuple[Storage, ...]:
        """Roles that only the whole graph can tell: state is what is written to, outputs are what is returned."""
        tensors = tuple(self.tensors)
        graph = Graph(phase="", tensors=tensors)
        written = {tensors[i].storage for op in self.ops for i in graph.mutated(op)}
        returned = {tensors[i].storage for i in outputs}
        kept = {tensors[i].storage for i in carried}
        floating = {t.storage for t in tensors if t.dtype.startswith(("float", "bfloat")) and len(t.shape) > 1}
        ends = self._ends(tensors)
        storages = []
        for index, (nbytes, role, name) in enumerate(self.roles):
            final = role
            if role in (Role.WEIGHT, Role.CONSTANT) and index in written:
                final = Role.KV_CACHE if index in floating else Role.ACTIVATION
            elif role is Role.ACTIVATION and index in returned:
                final = Role.KV_CACHE if index in kept else Role.OUTPUT
            ends_with = ends.get(index) if role in (Role.ACTIVATION, Role.KV_CACHE) else None
            storages.append(Storage(nbytes=nbytes, role=final, name=name, ends_with=ends_with))
        return tuple(storages)

    def _ends(self, tensors: Sequence[Tensor]) -> dict[int, str]:
        """The op with which each storage that was watched is gone, never before its last use; empty for the end."""
        ends = self.lifetimes.ends(len(self.ops))
        for index, op in enumerate(self.ops):
            for storage in {tensors[i].storage for i in op.inputs} & ends.keys():
                ends[storage] = max(ends[storage], index)
        names = [*(op.name for op in self.ops), ""]
        return {storage: names[max(index, 0)] for storage, index in ends.items()}

    def _unprefixed(self, path: str) -> str:
        if path == self.prefix:
            return ""
        return path.removeprefix(f"{self.prefix}.") if self.prefix else path


_VMAP_DEPTH = {"_vmap_increment_nesting": 1, "_vmap_decrement_nesting": -1}

_WRAPPERS = frozenset(
    {
        "wrap_with_set_grad_enabled", "wrap_with_autocast", "wrap", "wrap_activation_checkpoint",
        "tag_activation_checkpoint", "hints_wrapper", "strict_mode", "invoke_subgraph",
    }
)  # fmt: skip
"""Higher-order ops that call one function once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Site:
    """Where the ops being written down are: see `Op`; and whose source line is theirs, since bodies have none."""

    stack: Mapping[str, Any] = field(default_factory=dict)
    trace: str = ""
    repeat: int = 1
    branch: tuple[str, ...] = ()
    kernel: str = ""


def _attention(target: torch._ops.OpOverload, args: Any, kwargs: Any) -> torch.Tensor:
    """Attention with the output layout of the GPU's kernel; meta's own kernel returns another."""
    bound = dict(zip((a.name for a in target._schema.arguments), args, strict=False)) | kwargs
    plain: torch.Tensor = target(*args, **kwargs)
    mask = bound.get("attn_mask")
    attention = Attention(
        query=_described(bound["query"]),
        key=_described(bound["key"]),
        value=_described(bound["value"]),
        mask=None if mask is None else _described(mask),
        causal=bool(bound.get("is_causal")),
        gqa=bool(bound.get("enable_gqa")),
        dropout=float(bound.get("dropout_p") or 0.0),
    )
    if plain.dim() != 4 or not is_fused_somewhere(attention):
        return plain
    return torch.empty_strided(plain.shape, traced_output_stride(attention), dtype=plain.dtype, device="meta")


def _allows_tf32() -> bool:
    """Whether the program has let float32 products be rounded: `torch.set_float32_matmul_precision` and the like."""
    asked = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    return bool((getattr(torch.backends, "fp32_precision", "none") if asked == "none" else asked) == "tf32")


def _flat(values: Any) -> tuple[torch.Tensor, ...]:
    return tuple(leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor))


def _described(value: torch.Tensor, storage: int = 0) -> Tensor:
    return Tensor(
        storage=storage,
        dtype=str(value.dtype).removeprefix("torch."),
        shape=tuple(value.shape),
        stride=value.stride(),
        offset=int(value.storage_offset()),
    )


def _as_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and not value.is_meta:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value


def _fresh(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        shape, stride = tuple(map(int, value.shape)), tuple(map(int, value.stride()))
        return torch.empty_strided(shape, stride, dtype=value.dtype, device="meta")
    return value


def _meta_device(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: torch.device("meta") if key == "device" else value for key, value in kwargs.items()}


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent)
_STDLIB = sysconfig.get_paths()["stdlib"]


@functools.lru_cache(maxsize=65536)
def _spans(stack_trace: str) -> tuple[Span | None, Span | None]:
    """Innermost frame outside torch, and innermost frame in the user's project."""
    innermost = user = None
    for match in _FRAME.finditer(stack_trace):
        file = match["file"]
        if file.startswith((_TORCH, _OURS, "<")):
            continue
        shown, library = _shown_path(file)
        span = Span(file=shown, line=int(match["line"]), function=match["function"], library=library)
        innermost = span
        if not library:
            user = span
    return innermost, user


@functools.lru_cache(maxsize=4096)
def _shown_path(file: str) -> tuple[str, bool]:
    path = Path(file)
    parts = path.parts
    for packages in ("site-packages", "dist-packages"):
        if packages in parts:
            return str(Path(*parts[len(parts) - parts[::-1].index(packages) :])), True
    if file.startswith(_STDLIB):
        return str(path.relative_to(_STDLIB)), True
    try:
        return str(path.resolve().relative_to(Path.cwd())), False
    except ValueError:
        return file, False


def explained(error: Exception) -> TraceError:
    """What could not be traced, where in the user's code, and why, in one message."""
    if isinstance(error, TraceError):
        return error
    where = _user_frame(error)
    reason = str(error).strip().split("\n", 1)[0][:300] or type(error).__name__
    place = f" at {where}" if where else ""
    kind = type(error).__name__
    if "overflow" in reason or "storage size" in reason.lower():
        return TraceError(
            f"A tensor of this scenario is too large to address{place}: {reason}",
            "Use a smaller batch or shorter lengths.",
        )
    if "DataDependent" in kind or "data-dependent" in str(error) or "meta tensor" in str(error).lower():
        return TraceError(
            f"The model's control flow depends on tensor values{place}: {reason}",
            "A value (.item(), .tolist(), `if tensor:`, nonzero) that follows from weights or activations is unknown "
            "without running the model. Ways out: write that line with tensor operations such as torch.where; "
            "for a loop over experts, --assume balanced-routing; or inputs that avoid the branch, by --input or "
            "a function example_inputs() in the file.",
        )
    return TraceError(
        f"torch.export could not trace the model{place}: {kind}: {reason}",
        "Run with --debug for the whole error.",
    )


def _user_frame(error: BaseException) -> str:
    innermost = ""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        step = cause.__traceback__
        while step is not None:
            file = step.tb_frame.f_code.co_filename
            if not file.startswith((_TORCH, _OURS, "<", sys.prefix + "/bin")) and not file.startswith(_STDLIB):
                innermost = f"{_shown_path(file)[0]}:{step.tb_lineno}"
            step = step.tb_next
        cause = cause.__cause__ or cause.__context__
    return innermost
