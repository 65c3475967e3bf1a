"""A model -> what one GPU of several holds and runs of it: matrices cut, experts dealt out, collectives put in.

The module itself is cut before it is traced, so that the trace is the program of that GPU. Which matrices are cut, and
how, is what the model's own plan says (transformers' `_tp_plan` and `_ep_plan`, with the meaning that
`transformers/distributed/tensor_parallel.py` and `expert_parallel.py` of 5.23 give their words); without one, the rule
of Megatron-LM (Shoeybi et al. 2019, section 3): what goes into an attention or a feed-forward is cut by columns, what
comes out of it by rows, and an all-reduce follows. Real weights are cut as well as those on meta.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .errors import WorkloadError
from .packed import FourBitLinear, Fp8Linear, PackedExperts, PackedLinear, RowwiseLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """One GPU's share of a model.

    Attributes:
        notes: the plan: what is cut and how, what every GPU holds in full.
        cache_shards: GPUs over which the KV cache is cut; further ones hold copies.
        cut: names of the modules that hold less than the whole model's do.
    """

    notes: tuple[str, ...]
    cache_shards: int
    cut: frozenset[str]


@contextlib.contextmanager
def sharded(
    module: nn.Module, *, tp: int = 1, ep: int = 1, rank: int = 0, whole: frozenset[str] = frozenset()
) -> Iterator[Sharding]:
    """While it lasts the model is the share that one GPU has of it; then it is as it was.

    It is cut in place because a copy would not do for models whose functions hold on to their modules.

    Args:
        module: the whole model.
        tp: GPUs over which matrices are cut.
        ep: GPUs over which experts are dealt out whole: 1, or as many as `tp`, or `tp` is 1.
        rank: which of them; where a size does not divide the first has the most.
        whole: classes of modules that are not cut.

    Raises:
        WorkloadError: nothing can be cut, or not into so many parts.
    """
    if tp > 1 and ep > 1 and tp != ep:
        raise WorkloadError(
            f"--tp {tp} with --ep {ep}: the GPUs that share the experts must be those that share the matrices.",
            f"Use --tp {max(tp, ep)} --ep {max(tp, ep)}, or one of them alone.",
        )
    work = _Work(root=module, tp=tp, ep=ep, rank=rank, whole=whole)
    with _put_back(module):
        work.run()
        yield Sharding(notes=tuple(work.notes()), cache_shards=work.cache_shards, cut=frozenset(work.cut))


@contextlib.contextmanager
def _put_back(root: nn.Module) -> Iterator[None]:
    """Afterwards every module has the class, attributes and tensors that it had, and so has the model's config."""
    saved = [(m, type(m), dict(vars(m)), [dict(vars(m)[key]) for key in _STORES]) for m in root.modules()]
    config = _config(root)
    numbers = dict(vars(config)) if config is not None else {}
    try:
        yield
    finally:
        for module, kind, values, stores in saved:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(values)
            for key, store in zip(_STORES, stores, strict=True):
                values[key].clear()
                values[key].update(store)
        if config is not None:
            vars(config).update(numbers)


_STORES = ("_parameters", "_buffers", "_modules")


def _config(root: nn.Module) -> Any:
    """The object that a model keeps its sizes in, if it has one."""
    found = (getattr(root, key, None) for key in ("config", "params", "args"))
    return next((config for config in found if hasattr(config, "__dict__")), None)


@dataclass(frozen=True, slots=True)
class _Rule:
    """How a module or a parameter is cut: a word of transformers' plans, and widths that lie side by side in it."""

    style: str
    sections: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Place:
    """Which GPU of how many."""

    rank: int
    gpus: int

    def bounds(self, size: int, ways: int) -> tuple[int, int]:
        """Where this GPU's part of a dimension cut in so many ways begins, and how long it is, as torch.chunk cuts."""
        step = -(-size // ways)
        start = min(self.rank * ways // self.gpus * step, size)
        return start, min(step, size - start)


@dataclass(frozen=True, slots=True)
class _Heads:
    """An attention's heads: those of queries, those that keys and values share, and the width of one."""

    queries: int
    shared: int
    width: int

    def on(self, gpus: int) -> "_Heads":
        """Those of one GPU."""
        return _Heads(self.queries // gpus, max(self.shared // gpus, 1), self.width)


@dataclass
class _Work:
    """A model that is being cut, and what was done to it so far."""

    root: nn.Module
    tp: int
    ep: int
    rank: int
    whole: frozenset[str]
    plan: dict[str, _Rule] = field(default_factory=dict)
    named: bool = False  # the plan follows from the names of layers
    heads: dict[str, _Heads] = field(default_factory=dict)  # by the name of the attention
    made: dict[tuple[int, Any], nn.Parameter] = field(default_factory=dict)  # by what was cut, so that ties stay
    old: list[nn.Parameter] = field(default_factory=list)  # so that an id is not used twice
    limits: list[tuple[str, str, int]] = field(default_factory=list)  # what each number of GPUs must divide
    done: Counter[str] = field(default_factory=Counter)
    cut: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)
    cache_shards: int = 1
    configured: bool = False

    def run(self) -> None:
        """Cut everything that the plan names, and put collectives where it says."""
        self._make_plan()
        modules = dict(self.root.named_modules())
        self.heads = {name: found for name, module in modules.items() if (found := self._heads_of(name, module))}
        tasks = [
            (name, module, key, parameter, rule)
            for name, module in modules.items()
            for key, parameter in module._parameters.items()
            if parameter is not None and (rule := self.plan.get(_joined(name, key), self.plan.get(name)))
        ]
        for name, module, key, parameter, rule in tasks:
            self._cut(name, module, key, parameter, rule)
        self._refuse()
        for name, rule in self.plan.items():
            if name in modules:
                self._dress(modules[name], rule)
        for name, heads in self.heads.items():
            self._adapt(modules[name], heads)

    def notes(self) -> Iterable[str]:
        """What was done, in sentences."""
        dealt = {what: count for what, count in self.done.items() if what.endswith("dealt out")}
        if self.tp > 1:
            source = "by the names of its layers" if self.named else "by the model's own plan"
            yield f"tensor parallel over {self.tp} GPUs {source}: {_listed(self.done - Counter(dealt))}"
        if self.ep > 1:
            yield (
                f"expert parallel over {self.ep} GPUs: {_listed(dealt)}; every GPU has all tokens, computes those that "
                "meet its own experts, and an all-reduce sums the results (transformers' AllReduceEP)"
            )
        copies = sorted({h.shared for h in self.heads.values() if self.tp % h.shared == 0 and h.shared < self.tp})
        if copies:
            yield f"KV heads ({copies[0]}) are fewer than the GPUs: {self.tp // copies[0]} GPUs hold copies of each"
        if self.whole:
            yield f"left whole, because their forwards do not run on a share: {', '.join(sorted(self.whole))}"
        if self.unknown:
            yield f"words of the plan that are not known, their layers left whole: {', '.join(sorted(self.unknown))}"
        yield self._replicated()

    def _make_plan(self) -> None:
        if self.tp > 1:
            self.plan = self._expanded("_tp_plan")
            self.named = all(_leaf(name) in _EDGES for name in self.plan)
            if self.named:
                self.plan = _by_names(self.root) | self.plan
        dealt = self._expanded("_ep_plan") if self.ep > 1 else {}
        if self.ep > 1 and not dealt:
            raise WorkloadError(
                f"--ep {self.ep}: {type(self.root).__name__} brings no plan to deal out its experts, or has none.",
                "Use --tp, which cuts matrices.",
            )
        left = tuple(f"{name}." for name, m in self.root.named_modules() if type(m).__name__ in self.whole)
        rules = {n: r for n, r in self.plan.items() if n not in dealt} | dealt
        self.plan = {n: r for n, r in rules.items() if not f"{n}.".startswith(left)}
        if not self.plan and self.whole:
            raise WorkloadError(
                f"--tp {self.tp}: the forward of {' and '.join(sorted(self.whole))} does not run on a share.",
                "Write sizes of views in it as -1, or take them from the tensors: heads are fewer on each GPU.",
            )
        if not self.plan:
            raise WorkloadError(
                f"--tp {self.tp}: {type(self.root).__name__} brings no plan, and none of its layers has a name from "
                "which one follows.",
                "Names that are known: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, w1, w2, w3, fc1, "
                "fc2 and the like.",
            )

    def _expanded(self, attribute: str) -> dict[str, _Rule]:
        """A plan of transformers by name of module or parameter; in the plan itself layer numbers are `*`."""
        patterns: Mapping[str, str] = getattr(self.root, attribute, None) or {}
        found: dict[str, _Rule] = {}
        for name, module in self.root.named_modules():
            for own in (name, *(_joined(name, key) for key in module._parameters)):
                style = patterns.get(_pattern(own)) or patterns.get(_pattern(_PACKED.sub("", own)))
                if style in _AXES:
                    found[own] = _Rule(style)
                elif style is not None and style not in _WITHOUT_EFFECT:
                    self.unknown.add(style)
        return found

    def _heads_of(self, name: str, owner: nn.Module) -> _Heads | None:
        """The heads of an attention whose projections are cut; None where it is none, or does not say."""
        rules = {key: self.plan[own] for key, _ in owner.named_children() if (own := _joined(name, key)) in self.plan}
        widths = {
            key: _features(owner.get_submodule(key), "out") for key, rule in rules.items() if rule.style == "colwise"
        }
        query = next((key for key in widths if key in _QUERIES), None)
        fused = next((key for key in widths if key in _FUSED), None)
        if query is not None:
            queries = widths[query]
            shared = next((width for key, width in widths.items() if key in _KEYS), queries)
        elif fused is not None:
            queries, shared, *_ = rules[fused].sections or (widths[fused] // 3,) * 3
        else:
            return None
        width = next((n for key in _HEAD_WIDTHS if (n := _integer(owner, key)) and queries % n == 0), 0)
        count = next((n for key in _HEADS if (n := _integer(owner, key)) and queries % n == 0), 0)
        width = width or (queries // count if count else 0)
        return _Heads(queries // width, shared // width, width) if width and shared % width == 0 else None

    def _cut(self, name: str, module: nn.Module, key: str, old: nn.Parameter, rule: _Rule) -> None:
        axis = _AXES[rule.style]
        if axis == "expert":
            self.limits.append((name, "experts", old.shape[0]))
            self._replace(module, key, old, 0, ((old.shape[0], self.ep),))
            self.cut.add(name)
            return
        dimension = _dimension(module, key, old, axis)
        if dimension is not None:
            self._replace(module, key, old, dimension, self._sections(name, module, old.shape[dimension], rule))
            self.cut.add(name)
        elif key.endswith("_bias") and self.rank:
            added_by_the_first = torch.zeros_like(old)
            module._parameters[key] = nn.Parameter(added_by_the_first, requires_grad=False)

    def _sections(self, name: str, module: nn.Module, size: int, rule: _Rule) -> tuple[tuple[int, int], ...]:
        """Stretches of a dimension, each with the number of parts that it is cut into."""
        if rule.style in _UNEVEN:
            return ((size, self.tp),)
        features = _features(module, _AXES[rule.style]) or size
        widths = rule.sections or (features,)
        if rule.style.startswith("packed"):
            widths = (features // 2, features // 2)
        blocks_are_whole = size >= features or features % size == 0
        stretches = []
        for width, parts in zip(widths, self._ways(name, rule, len(widths)), strict=True):
            stretch, rest = divmod(width * size, features)
            what = "features" if size >= features else f"blocks of {-(-features // size)} features"
            if parts == self.tp:
                self.limits.append((name, what, stretch if blocks_are_whole and not rest else 1))
            stretches.append((stretch, parts))
        return tuple(stretches)

    def _ways(self, name: str, rule: _Rule, count: int) -> list[int]:
        """Into how many parts each width is cut: as many as there are GPUs, or KV heads where those are fewer."""
        heads = self.heads.get(name.rpartition(".")[0])
        ways = [self.tp] * count
        if heads is None or rule.style != "colwise":
            return ways
        few = heads.shared < self.tp and self.tp % heads.shared == 0
        kept = heads.shared if few else self.tp
        self.limits.append((name, "heads", heads.queries))
        if not few:
            self.limits.append((name, "KV heads", heads.shared))
        if _leaf(name) in _KEYS:
            ways = [kept]
        elif count > 1:
            ways = [self.tp, kept, kept]
        self.cache_shards = kept
        return ways

    def _refuse(self) -> None:
        gpus = {"experts": self.ep}
        name, what, count = next(((n, w, c) for n, w, c in self.limits if c % gpus.get(w, self.tp)), ("", "", 0))
        if not what:
            return
        option, asked = ("--ep", self.ep) if what == "experts" else ("--tp", self.tp)
        fit = [str(n) for n in range(2, asked) if all(c % n == 0 for _, _, c in self.limits)]
        hint = f"{option} {' or '.join(fit[-4:])} would do." if fit else "No fewer GPUs can share it either."
        counts = [weight.shape[0] for weight in self.root.get_submodule(name).parameters()]  # each has a row an expert
        if _leaf(name) == "experts" and self.ep == 1 and all(each % asked == 0 for each in counts):
            hint = f"{option} {asked} --ep {asked} deals out its experts whole. {hint}"
        raise WorkloadError(
            f"{option} {asked}: {_pattern(name)} has {count} {what}, which {asked} GPUs cannot share evenly.", hint
        )

    def _replace(
        self, module: nn.Module, key: str, old: nn.Parameter, dimension: int, sections: tuple[tuple[int, int], ...]
    ) -> None:
        label = (id(old), (dimension, sections))
        if label not in self.made:
            place, parts, start = self._place, [], 0
            for size, ways in sections:
                first, length = place.bounds(size, ways)
                parts.append(old.detach().narrow(dimension, start + first, length))
                start += size
            new = torch.cat(parts, dimension) if len(parts) > 1 else parts[0].clone()
            self.old.append(old)
            self.made[label] = nn.Parameter(new.contiguous(), requires_grad=False)
        module._parameters[key] = self.made[label]

    @property
    def _place(self) -> _Place:
        return _Place(self.rank, max(self.tp, self.ep))

    def _dress(self, module: nn.Module, rule: _Rule) -> None:
        """Give a module the widths of its share, and the forward with its collective."""
        if rule.style in _WORDS:
            self.done[f"{_kind(module)} {_WORDS[rule.style]}"] += 1
        if isinstance(module, nn.Embedding):
            full = module.num_embeddings if rule.style == "embedding_rowwise" else module.embedding_dim
        else:
            full = _features(module, "out")
        _resize(module, _AXES[rule.style], self.tp)
        if rule.style == "ep_dispatch_experts":
            vars(module)["num_experts"] = vars(module)["num_experts"] // self.ep
            vars(module)["_is_expert_parallel"] = True
        forward = _FORWARDS.get(rule.style)
        if forward is not None:
            module.__class__ = type(type(module).__name__, (forward, type(module)), {})
            vars(module)["fxroof_place"] = self._place
            vars(module)["fxroof_width"] = full

    def _adapt(self, owner: nn.Module, heads: _Heads) -> None:
        """Numbers of heads that an attention keeps become those of its share."""
        local = heads.on(self.tp)
        self._renumber(vars(owner), heads, local)
        config = _config(self.root)
        if self.named and hasattr(self.root, "setup_caches") and config is not None and not self.configured:
            self._renumber(vars(config), heads, local)  # caches are set up by it, as gpt-fast's tp.py says
            self.configured = True
        for key, parameter in list(owner._parameters.items()):
            if self.named and parameter is not None and parameter.shape == (heads.queries,):  # attention sinks
                self._replace(owner, key, parameter, 0, ((heads.queries, self.tp),))
        for key, buffer in list(owner.named_buffers()):
            at = next((d for d in (1, 2) if buffer.dim() == 4 and buffer.shape[d] == heads.shared), None)
            if at is not None and buffer.shape[-1] == heads.width:
                holder, _, short = key.rpartition(".")
                start, length = self._place.bounds(heads.shared, min(heads.shared, self.tp))
                owner.get_submodule(holder)._buffers[short] = buffer.narrow(at, start, length).clone()

    def _renumber(self, values: dict[str, Any], heads: _Heads, local: _Heads) -> None:
        counts = {heads.queries: local.queries, heads.shared: local.shared}
        widths = {n * heads.width: m * heads.width for n, m in counts.items()}
        for key, value in values.items():
            if key in _GROUPS and value == heads.queries // heads.shared:
                values[key] = max(local.queries // local.shared, 1)
            elif self.named and key in _HEADS:
                values[key] = counts.get(value, value)
            elif self.named and key in _WIDTHS:
                values[key] = widths.get(value, value)

    def _replicated(self) -> str:
        cut = {id(p) for p in self.made.values()}
        left: Counter[str] = Counter()
        for name, parameter in self.root.named_parameters():
            if id(parameter) not in cut:
                left[_pattern(name.rpartition(".")[0])] += parameter.numel() * parameter.element_size()
        names = ", ".join(name for name, _ in left.most_common(4))
        more = f" and {len(left) - 4} more" if len(left) > 4 else ""
        size = sum(left.values())
        shown = f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
        return f"held in full by every GPU: {shown} of weights ({names}{more})"


# forwards with collectives


class _Share(nn.Module):
    """A module of which this GPU has a share."""

    fxroof_place: _Place
    fxroof_width: int

    def _summed(self, x: torch.Tensor) -> torch.Tensor:
        _OPS.all_reduce(x, self.fxroof_place.gpus)
        return x

    def _gathered(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _OPS.all_gather(x, self.fxroof_width, self.fxroof_place.gpus)
        return out

    def _own(self, size: int) -> tuple[int, int]:
        return self.fxroof_place.bounds(size, self.fxroof_place.gpus)


class _Gathered(_Share):
    """Columns of a matrix, or of an embedding; every GPU gets the whole result."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._gathered(super().forward(*args, **kwargs))


class _Summed(_Share):
    """A part of every expert, or of whatever else results are summed of."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._summed(super().forward(*args, **kwargs))


class _Rows(_Share):
    """Rows of a matrix: results are summed, then the bias is added once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held: dict[str, Any] = self._parameters
        bias = held.get("bias")
        if bias is None:
            return self._summed(super().forward(x))
        held["bias"] = None if hasattr(self, "in_features") else torch.zeros_like(bias)  # Conv1D does not do without
        try:
            out = self._summed(super().forward(x))
        finally:
            held["bias"] = bias
        return out + bias  # type: ignore[no-any-return]  # a parameter


class _SplitRows(_Rows):
    """Rows of a matrix whose input every GPU has in full."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.narrow(-1, *self._own(x.shape[-1])))


class _Vocabulary(_Share):
    """A stretch of an embedding's rows: tokens of other stretches give zeros, and results are summed."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        start, length = self._own(self.fxroof_width)
        elsewhere = (tokens < start) | (tokens >= start + length)
        out = super().forward((tokens - start).masked_fill(elsewhere, 0))
        return self._summed(out.masked_fill_(elsewhere.unsqueeze(-1), 0.0))


class _OwnExperts(_Share):
    """Some of the experts: what is routed to others has weight 0 and an index beyond the last."""

    num_experts: int

    def forward(self, rows: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        held = self.num_experts
        elsewhere = (experts // held) != self.fxroof_place.rank
        own = torch.where(elsewhere, held, experts % held)
        out = super().forward(rows, own, weights.masked_fill(elsewhere, 0.0))
        return self._summed(out).to(rows.dtype)


class _Divided(_Share):
    """An expert that is the identity, on every GPU: a part of its input, since results are summed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = super().forward(x / self.fxroof_place.gpus)
        return out


# torch.ops.fxroof.all_reduce and all_gather: nothing to compute, but shapes


_LIBRARY: Any = torch.library.Library("fxroof", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch's own
_LIBRARY.impl(_LIBRARY.define("all_reduce(Tensor(a!) x, int gpus) -> ()"), lambda *_: None, "Meta")
_LIBRARY.impl(
    _LIBRARY.define("all_gather(Tensor x, int width, int gpus) -> Tensor"),
    lambda x, width, _: x.new_empty((*x.shape[:-1], width)),
    "Meta",
)
_OPS: Any = torch.ops.fxroof


# words of transformers' plans

_AXES = {
    "colwise": "out", "colwise_gather_output": "out", "colwise_rep": "out", "packed_colwise": "out",
    "rowwise": "in", "rowwise_split_input": "in", "rowwise_rep": "in", "packed_rowwise": "in",
    "embedding_rowwise": "rows", "embedding_colwise": "columns", "grouped_gemm": "expert",
    "moe_tp_experts": "", "ep_dispatch_experts": "", "all_reduce": "", "moe_identity_expert": "",
}  # fmt: skip
"""What is cut by each style: results, inputs, an embedding's rows or columns, experts; nothing by those that only run
otherwise."""
_WITHOUT_EFFECT = frozenset({"replicated_with_grad_allreduce", "mla_kv_a_proj", "local_params", "replicate"})
"""Styles that matter to gradients, or to the type of a parameter."""
_UNEVEN = ("colwise_gather_output", "colwise_rep", "embedding_rowwise", "embedding_colwise")
_FORWARDS: Mapping[str, type[_Share]] = {
    "colwise_gather_output": _Gathered, "colwise_rep": _Gathered, "embedding_colwise": _Gathered,
    "rowwise": _Rows, "rowwise_split_input": _SplitRows, "rowwise_rep": _SplitRows,
    "embedding_rowwise": _Vocabulary, "moe_tp_experts": _Summed, "all_reduce": _Summed,
    "ep_dispatch_experts": _OwnExperts, "moe_identity_expert": _Divided,
}  # fmt: skip
_WORDS = {
    "colwise": "column-wise", "colwise_gather_output": "column-wise and gathered",
    "colwise_rep": "column-wise and gathered", "packed_colwise": "column-wise",
    "rowwise": "row-wise and all-reduced", "rowwise_split_input": "row-wise and all-reduced",
    "rowwise_rep": "row-wise and all-reduced", "packed_rowwise": "row-wise",
    "embedding_rowwise": "by rows and all-reduced", "embedding_colwise": "by columns and gathered",
    "moe_tp_experts": "cut in every expert and all-reduced", "ep_dispatch_experts": "dealt out",
    "all_reduce": "all-reduced", "moe_identity_expert": "divided",
}  # fmt: skip


# names of layers, and of the numbers that attentions keep

_QUERIES = frozenset({"q_proj", "wq", "query", "q", "to_q", "q_lin", "query_proj", "Wq"})
_KEYS = frozenset(
    {
        "k_proj",
        "v_proj",
        "wk",
        "wv",
        "key",
        "value",
        "k",
        "v",
        "to_k",
        "to_v",
        "k_lin",
        "v_lin",
        "key_proj",
        "value_proj",
    }
)
_FUSED = frozenset({"c_attn", "qkv", "wqkv", "Wqkv", "qkv_proj", "query_key_value", "attn_qkv", "in_proj"})
_INNER = frozenset(
    {
        "gate_proj", "up_proj", "w1", "w3", "fc1", "wi", "wi_0", "wi_1", "c_fc", "lin1", "linear1", "dense_h_to_4h",
        "fc_in", "intermediate", "gate_up_proj", "w12", "fc", "up",
    }
)  # fmt: skip
_ROWS = frozenset(
    {
        "o_proj", "wo", "out_proj", "o", "c_proj", "to_out", "out_lin", "proj", "down_proj", "w2", "fc2", "lin2",
        "linear2", "dense_4h_to_h", "fc_out", "dense", "attn_out", "down",
    }
)  # fmt: skip
_EDGES = frozenset({"lm_head", "output", "head", "embed_out", "embed_tokens", "out_proj", "decoder", "classifier"})
"""Layers at the ends of a model: a plan that names no others says nothing of its inside."""
_ENDS = ("lm_head", "output", "head", "embed_out")
_HEADS = (
    "num_heads", "n_heads", "n_head", "num_attention_heads", "heads", "nhead", "n_local_heads", "num_key_value_heads",
    "n_kv_heads", "n_kv_head", "num_kv_heads", "kv_heads", "n_local_kv_heads",
)  # fmt: skip
_HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_size", "dim_head", "key_value_proj_dim", "d_head")
_WIDTHS = frozenset(
    {
        "dim", "embed_dim", "hidden_size", "n_embd", "d_model", "inner_dim", "all_head_size", "split_size", "q_size",
        "kv_size", "kv_dim",
    }
)  # fmt: skip
_GROUPS = frozenset({"num_key_value_groups", "n_rep", "num_kv_groups", "kv_groups", "num_queries_per_kv"})
_PACKED = re.compile(r"(_scale_inv|_qweight|_scales|_qzeros)$")


def _by_names(root: nn.Module) -> dict[str, _Rule]:
    """What goes into an attention or a feed-forward by columns, what comes out by rows; experts and head likewise."""
    plan: dict[str, _Rule] = {}
    groups: dict[str, dict[str, nn.Module]] = {}
    for name, module in root.named_modules():
        if _is_linear(module):
            groups.setdefault(_block(name), {})[name] = module
        stacks = {key: p for key, p in module._parameters.items() if p is not None and p.dim() == 3}
        if len(stacks) > 1 and all(_role(key) for key in stacks):
            with_biases = [key for key in module._parameters if key.removesuffix("_bias") in stacks]
            plan |= {_joined(name, key): _stack_rule(module, key) for key in with_biases}
            plan[name] = _Rule("moe_tp_experts")
    for layers in groups.values():
        plan |= _paired(layers)
    return (plan | _ends(root)) if plan else {}


def _paired(layers: Mapping[str, nn.Module]) -> dict[str, _Rule]:
    """The layers of one block: each that comes out of it with those whose results it takes."""
    plan: dict[str, _Rule] = {}
    for name, module in layers.items():
        if _leaf(name) not in _ROWS:
            continue
        taken = _features(module, "in")
        for other, source in layers.items():
            leaf, made = _leaf(other), _features(source, "out")
            if other == name or other in plan:
                continue
            if (leaf in _QUERIES or _is_inner(other)) and made == taken:
                plan[other] = _Rule("colwise")
            elif _is_inner(other) and made == 2 * taken:
                plan[other] = _Rule("colwise", (taken, taken))
            elif leaf in _FUSED and made > taken and (made - taken) % 2 == 0:
                by_head = leaf == "query_key_value"
                shared = (made - taken) // 2
                plan[other] = _Rule("colwise", () if by_head else (taken, shared, shared))
            else:
                continue
            plan[name] = _Rule("rowwise")
        if any(_leaf(other) in _QUERIES for other in plan):
            plan |= {other: _Rule("colwise") for other in layers if _leaf(other) in _KEYS}
    return plan


def _ends(root: nn.Module) -> dict[str, _Rule]:
    """The matrix that makes logits, and the embedding where the two are one."""
    embeddings = {name: m for name, m in root.named_modules() if isinstance(m, nn.Embedding)}
    for name, module in root.named_modules():
        if "." in name or _leaf(name) not in _ENDS or not _is_linear(module):
            continue
        if any(m.num_embeddings == _features(module, "out") for m in embeddings.values()):
            tied = {n for n, m in embeddings.items() if m.weight is module._parameters.get("weight")}
            return {name: _Rule("colwise_gather_output"), **dict.fromkeys(tied, _Rule("embedding_rowwise"))}
    return {}


def _block(name: str) -> str:
    """What a layer belongs to: its module, or a further one out where layers lie in modules of their own."""
    *path, leaf = name.split(".")
    nested = (leaf == "dense" and path[-1:] in (["output"], ["intermediate"])) or (
        leaf in _QUERIES | _KEYS and path[-1:] in (["self"], ["attention"]) and path[-2:-1] == ["attention"]
    )
    return ".".join(path[:-1] if nested else path)


def _is_inner(name: str) -> bool:
    return _leaf(name) in _INNER or name.endswith("intermediate.dense")


def _role(key: str) -> str:
    plain = _PACKED.sub("", key.removesuffix("_bias"))
    return "out" if plain in _INNER else "in" if plain in _ROWS else ""


def _stack_rule(module: nn.Module, key: str) -> _Rule:
    """The word for a stack of experts' matrices; transposed ones have their columns where others have rows."""
    role, transposed = _role(key), bool(getattr(module, "is_transposed", False))
    packed = "gate_up" in key and getattr(module, "is_concatenated", True)
    word = "colwise" if (role == "out") != transposed else "rowwise"
    return _Rule(f"packed_{word}" if packed else word)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Fp8Linear | RowwiseLinear | PackedLinear | FourBitLinear) or (
        type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    )


def _features(module: nn.Module, axis: str) -> int:
    """Width of what a linear layer makes or takes; 0 for others."""
    names = {"out": ("out_features", "nf"), "in": ("in_features", "nx")}.get(axis, ())
    return next((value for name in names if (value := _integer(module, name))), 0)


def _resize(module: nn.Module, axis: str, gpus: int) -> None:
    """The widths that a module keeps as numbers, by the tensors that it now has."""
    values, weight = vars(module), module._parameters.get("weight")
    if isinstance(module, nn.Embedding):
        values["padding_idx"] = None  # matters to gradients alone; the vocabulary stays as large as it is
    elif isinstance(module, PackedLinear):
        values["out_features"] = module._parameters["scales"].shape[-1]  # type: ignore[union-attr]  # it has scales
        values["in_features"] //= gpus if axis == "in" else 1
    elif isinstance(module, FourBitLinear):
        key = "in_features" if axis == "in" else "out_features"
        values[key] //= gpus
    elif weight is not None and _features(module, "out"):
        if "nf" in values:
            values["nx"], values["nf"] = weight.shape
        else:
            whole_rows = values.get("group") == values["in_features"]
            values["out_features"], values["in_features"] = weight.shape
            if whole_rows:
                values["group"] = weight.shape[1]


def _dimension(module: nn.Module, key: str, tensor: torch.Tensor, axis: str) -> int | None:
    """The dimension of a parameter that is cut along an axis of its matrix; None where it has none of its own."""
    if axis in ("rows", "columns"):
        return ("rows", "columns").index(axis)
    if not axis or tensor.numel() == 1:
        return None
    if any(p is not None and p.dim() == 3 for p in module._parameters.values()):
        if getattr(module, "is_transposed", False):
            axis = {"out": "in", "in": "out"}[axis]
        if tensor.dim() < 3:
            return tensor.dim() - 1 if axis == "out" else None
        return {"out": 2, "in": 1}[axis] if _stored_transposed(module, key, tensor) else {"out": 1, "in": 2}[axis]
    if isinstance(module, FourBitLinear) and key != "bias":
        return 0
    if tensor.dim() == 1:
        return 0 if (axis == "out") != (key == "g_idx") else None
    transposed = isinstance(module, PackedLinear) or hasattr(module, "nf")
    dimension = 0 if (axis == "out") != transposed else 1
    return dimension if tensor.shape[dimension] > 1 else None


def _stored_transposed(module: nn.Module, key: str, tensor: torch.Tensor) -> bool:
    if isinstance(module, PackedExperts):
        return key.endswith(("_qweight", "_scales", "_qzeros"))
    return bool(getattr(module, "is_transposed", False)) and tensor.element_size() > 1


def _kind(module: nn.Module) -> str:
    if _is_linear(module):
        return "linears"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    return "expert stacks" if any(p is not None and p.dim() == 3 for p in module._parameters.values()) else "modules"


def _integer(module: nn.Module, name: str) -> int:
    value = vars(module).get(name, 0)
    return value if isinstance(value, int) else 0


def _listed(counts: Mapping[str, int]) -> str:
    """`1 embedding by rows, 160 linears column-wise`."""
    return ", ".join(f"{n} {what.replace('s ', ' ', 1) if n == 1 else what}" for what, n in counts.items())


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _pattern(name: str) -> str:
    """A name with `*` for numbers of layers, as plans have it."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)
