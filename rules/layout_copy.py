"""A tensor is copied into another layout for ops that read any layout.

**What it checks.** `contiguous()` or `clone()` that really copies, where all that is done with the copy works on the
tensor as it was: products, attention, pointwise ops, `cat`, copies into a cache, reductions, and views that need no
layout of their own. What was copied is not written to afterwards, nor is the copy, and the phase does not return it.

**Why it costs.** The copy reads and writes the tensor once more, and launches a kernel. Kernels for products and
attention take strides; a `cat` or a copy into a cache reads strides while it copies anyway.

**How it is estimated.** The copy goes and its users read the tensor as it was. Layouts are followed: attention returns
the layout of its query, a `reshape` copies where it now has to, and a product copies an operand that it cannot take.
Where that makes a view impossible, or has two layouts meet in one pointwise op, the rule is silent.

**Remedy.** Leave out the copy.

    q = q.view(batch, length, heads, head_dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v)

**When to ignore.** When a kernel of your own takes contiguous tensors alone; when the model is compiled, which makes
most of these copies part of other kernels.

**References.** PyTorch documentation, "Tensor Views" and `torch.Tensor.contiguous`; NVIDIA, "cuBLAS Library", leading
dimensions and `cublasGemmStridedBatchedEx`.
"""

from collections.abc import Iterator
from dataclasses import replace

from ..analyzer.cost import Status, operator_name
from ..analyzer.finding import Match, Remedy, Rewrite, Severity, Situation, rule
from ..analyzer.graph import Op, Tensor, tensor_of
from ..analyzer.rewrite import Draft, RewriteError, attended_stride, is_elementwise, relaid
from ..analyzer.sdpa import dense_stride

_CONTIGUOUS = Remedy(
    text="Leave out the copy: all that reads it takes the tensor as it is.",
    code="q = q.view(batch, length, heads, head_dim).transpose(1, 2)",
)
_CLONE = Remedy(text="Leave out the copy: neither it nor what it copies is written to.", code="y = x")


_TORCHS_OWN = frozenset({"MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer"})
"""Modules that come with torch and copy inside: nobody can leave that out."""


@rule("FUS005", "layout-copy", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """Every copy that nobody needs."""
    graph = situation.graph
    for index in situation.once(found):
        op = graph.ops[index]
        name = operator_name(op.target)
        (source,), (copy,) = op.inputs, op.outputs
        same = graph.tensors[source].stride == graph.tensors[copy].stride
        yield Match(
            op=index,
            message=f"{name.removeprefix('aten.')} copies a tensor whose users read it as it is",
            evidence={"copied_bytes": op.repeat * graph.tensors[copy].nbytes},
            remedy=_CLONE if same else _CONTIGUOUS,
            rewrite=_uncopied(index, source, copy),
        )


def found(situation: Situation) -> tuple[int, ...]:
    """The ops that make these copies."""
    graph = situation.graph
    followed = _Followed(situation)
    return tuple(
        index
        for index, op in enumerate(graph.ops)
        if operator_name(op.target) in _COPIES
        and situation.costs[index].status is not Status.FREE
        and index not in graph.idle
        and op.module_type not in _TORCHS_OWN
        and followed.can_do_without(index, op.inputs[0], op.outputs[0])
    )


_COPIES = ("aten.contiguous", "aten.clone")


class _Followed:
    """Follows a tensor whose layout changes through all that is done with it."""

    def __init__(self, situation: Situation) -> None:
        self.graph, self.flow = situation.graph, situation.flow
        graph = situation.graph
        self.last_write = {
            graph.tensors[tensor].storage: index for index, op in enumerate(graph.ops) for tensor in graph.mutated(op)
        }
        self.returned = {graph.tensors[tensor].storage for tensor in graph.outputs}

    def can_do_without(self, index: int, source: int, copy: int) -> bool:
        """Whether users of a copy could read the source instead."""
        before, after = self.graph.tensors[source], self.graph.tensors[copy]
        if self.last_write.get(before.storage, -1) > index or after.storage in {*self.last_write, *self.returned}:
            return False
        if any(step == 0 and size > 1 for size, step in zip(before.shape, before.stride, strict=True)):
            return False  # the copy gives each place an element of its own
        return self._works(copy, before, set())

    def _works(self, tensor: int, now: Tensor, seen: set[int]) -> bool:
        """Whether all users of a tensor do with another layout of it."""
        old = self.graph.tensors[tensor]
        if (old.shape, old.stride) == (now.shape, now.stride) or tensor in seen:
            return True
        seen.add(tensor)
        if old.storage in self.returned or old.storage in self.last_write:
            return False
        return all(self._takes(self.graph.ops[user], tensor, now, seen) for user in self.flow.users(tensor))

    def _takes(self, op: Op, tensor: int, now: Tensor, seen: set[int]) -> bool:
        name = operator_name(op.target)
        if op.branch or op.kernel:
            return False
        if name in _ANY_LAYOUT:
            return tensor not in self.graph.mutated(op)
        if name == "aten.scaled_dot_product_attention":
            return self._attends(op, tensor, now, seen)
        if not op.outputs or op.mutates:
            return False
        old, made = self.graph.tensors[tensor], self.graph.tensors[op.outputs[0]]
        if name in _COPIES and op.outputs[0] != tensor and made.storage != old.storage:
            return True  # which makes its own layout; a clone that keeps the source's is a candidate itself
        if is_elementwise(op) and len(op.outputs) == 1 and made.storage != old.storage:
            return self._computes(op, tensor, now, seen)
        return self._is_seen(op, tensor, now, seen)

    def _computes(self, op: Op, tensor: int, now: Tensor, seen: set[int]) -> bool:
        """A pointwise op whose other operands are small: it reads in the order of this one, and writes so."""
        made = self.graph.tensors[op.outputs[0]]
        if made.shape != now.shape or op.inputs[0] != tensor:
            return False
        others = [self.graph.tensors[i] for i in op.inputs if i != tensor]
        if any(other.numel == now.numel for other in others):
            return False
        return self._works(op.outputs[0], replace(made, stride=dense_stride(now.shape, now.stride)), seen)

    def _attends(self, op: Op, tensor: int, now: Tensor, seen: set[int]) -> bool:
        if now.stride[-1] != 1 or tensor_of(op.args.get("attn_mask")) == tensor:
            return False
        stride = attended_stride(op, {i: self.graph.tensors[i] for i in op.inputs} | {tensor: now})
        made = self.graph.tensors[op.outputs[0]]
        return stride is None or self._works(op.outputs[0], replace(made, stride=stride), seen)

    def _is_seen(self, op: Op, tensor: int, now: Tensor, seen: set[int]) -> bool:
        """A view that is possible still."""
        if op.inputs[0] != tensor:
            return False
        for result in op.outputs:
            made = self.graph.tensors[result]
            try:
                layout = relaid(op, now, self.graph.tensors[tensor], made)
            except RewriteError:
                return False
            if layout is None:
                return False
            if not self._works(result, replace(made, shape=layout[0], stride=layout[1]), seen):
                return False
        return True


_ANY_LAYOUT = frozenset(
    f"aten.{name}"
    for name in (
        "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "cat", "concat", "stack", "copy_", "index_put_",
        "index_copy_", "slice_scatter", "sum", "mean", "amax", "amin", "argmax", "index", "index_select", "gather",
    )
)  # fmt: skip
"""Ops that read strides, and whose result has a layout of its own."""


def _uncopied(index: int, source: int, copy: int) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if draft.claim((index,)):
            draft.substitute(copy, draft.standing_for(source))

    return rewrite
