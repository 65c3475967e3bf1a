"""Every expert of a mixture computes every token, and most of the results are multiplied by zero.

**What it checks.** A `topk` that chooses k of E experts a token, and E experts of one structure that all compute all
tokens: in a loop, each result times a mask or weight that is zero where the expert was not chosen, or in batched
products over copies of the tokens. The choice must reach the sum by masks and weights made of it.

**Why it costs.** E / k times the arithmetic that the model asks for, and the weights of experts that nobody chose are
read: at a small batch, all E instead of some k.

**How it is estimated.** Tokens are sorted by expert, a grouped matrix product meets each row with its own expert's
weights, and results are put back and added: FLOPs fall by E / k, weights read to those of the experts that are likely
to be drawn, and the sorting and gathering is charged.

**Remedy.** Route the tokens.

    order = chosen.flatten().argsort()
    rows = x[order // k]
    ends = torch.histc(chosen.int(), bins=E, min=0, max=E - 1).cumsum(0, dtype=torch.int32)
    h = F.silu(torch._grouped_mm(rows, w1, offs=ends)) * torch._grouped_mm(rows, w3, offs=ends)
    y = torch._grouped_mm(h, w2, offs=ends) * weights.flatten()[order, None]
    out = torch.zeros_like(x).index_add_(0, order // k, y)

With transformers, for models that take it: `from_pretrained(..., experts_implementation="grouped_mm")`.

**When to ignore.** Very few tokens and experts, where one batched product is one launch; GPUs without a grouped kernel
(it needs 16-bit numbers, and compute capability 9.0 to be fast).

**References.** Shazeer et al., "Outrageously Large Neural Networks" (2017); Gale et al., "MegaBlocks" (2022); PyTorch
documentation of `torch.nn.functional.grouped_mm`; Hugging Face documentation, "Experts backends".
"""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from ..analyzer.finding import Confidence, Match, Remedy, Rewrite, Severity, Situation, rule
from ..analyzer.graph import Arg, Op, Role, TensorRef
from ..analyzer.rewrite import Draft
from ._experts import DenseMixture, Product, found

_REMEDY = Remedy(
    text="Sort tokens by expert and multiply each row with its own expert's weights alone, by a grouped product.",
    code="order = chosen.flatten().argsort()\n"
    "rows = x[order // k]\n"
    "ends = torch.histc(chosen.int(), bins=E, min=0, max=E - 1).cumsum(0, dtype=torch.int32)\n"
    "y = torch._grouped_mm(rows, weights_of_experts, offs=ends)",
)


@rule("MOE002", "dense-moe", severity=Severity.WARNING)
def check(situation: Situation) -> Iterator[Match]:
    """Every mixture of experts that computes all of them."""
    graph = situation.graph
    for mixture in situation.once(found):
        weights = [i for product in mixture.products.values() for i in product.weights]
        yield Match(
            op=mixture.last,
            message=f"all {mixture.experts} experts compute every token, which chose {mixture.chosen}",
            evidence={"expert_bytes": sum(graph.tensors[i].nbytes for i in weights), "mixtures": 1},
            remedy=_REMEDY,
            confidence=Confidence.HIGH if graph.tensors[weights[0]].dtype == "bfloat16" else Confidence.MEDIUM,
            rewrite=_routed(mixture),
        )


def _routed(mixture: DenseMixture) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if draft.claim(mixture.ops):
            _Writer(draft, mixture).write()

    return rewrite


class _Writer:
    """Writes the ops of a routed mixture before the last op of a dense one; R = N * k rows."""

    def __init__(self, draft: Draft, mixture: DenseMixture) -> None:
        self.draft, self.mixture = draft, mixture
        self.last = draft.graph.ops[mixture.last]
        self.rows = draft.graph.tensors[mixture.indices].numel
        self.count = 0

    def write(self) -> None:
        """The whole: sort, gather, multiply, scale, put back and add."""
        draft, mixture = self.draft, self.mixture
        rows, source = self.rows, draft.tensors[mixture.source]
        width, dtype = source.shape[-1], source.dtype
        chosen = draft.view(mixture.indices, (rows,), (1,))
        gates = draft.tensors[mixture.gates]
        self.experts, order = (draft.tensor((rows,), "int64") for _ in range(2))
        self.op("aten.sort.default", {"self": _ref(chosen), "dim": -1}, self.experts, order)
        tokens = self.made(
            "aten.floor_divide.default", {"self": _ref(order), "other": mixture.chosen}, (rows,), "int64"
        )
        flat = draft.view(mixture.source, (prod(source.shape[:-1]), width), (source.stride[-2], source.stride[-1]))
        taken = self.made("aten.index.Tensor", {"self": _ref(flat), "indices": (_ref(tokens),)}, (rows, width), dtype)
        scales = self.made(
            "aten.index.Tensor",
            {"self": _ref(draft.view(mixture.gates, (rows,), (1,))), "indices": (_ref(order),)},
            (rows,),
            gates.dtype,
        )
        short = self.made("aten.to.dtype", {"self": _ref(self.experts), "dtype": "int32"}, (rows,), "int32")
        counts = self.made(
            "aten.histc.default",
            {"self": _ref(short), "bins": mixture.experts, "min": 0, "max": mixture.experts - 1},
            (mixture.experts,),
            "int32",
        )
        self.ends = self.made(
            "aten.cumsum.default", {"self": _ref(counts), "dim": 0, "dtype": "int32"}, (mixture.experts,), "int32"
        )
        if mixture.scaled_before:
            taken = self.scaled(taken, scales)
        result = self.body(taken)
        if not mixture.scaled_before:
            result = self.scaled(result, scales)
        self.put_back(result, order)

    def scaled(self, tensor: int, scales: int) -> int:
        """Rows times their gates."""
        one, other = (self.draft.tensors[i] for i in (tensor, scales))
        dtype = "float32" if "float32" in (one.dtype, other.dtype) else one.dtype
        column = self.draft.view(scales, (self.rows, 1), (1, 1))
        return self.made("aten.mul.Tensor", {"self": _ref(tensor), "other": _ref(column)}, one.shape, dtype)

    def body(self, taken: int) -> int:
        """The body of one expert on rows of all of them."""
        graph, mixture = self.draft.graph, self.mixture
        stands = {mixture.entry: taken}
        for index in mixture.body:
            op = graph.ops[index]
            if index in mixture.products:
                width = graph.tensors[op.outputs[0]].shape[-1]
                stands[op.outputs[0]] = self.product(mixture.products[index], stands[op.inputs[0]], width)
            elif graph.is_view(op):
                old = graph.tensors[op.inputs[0]]
                base = stands[op.inputs[0]]
                step = self.draft.tensors[base].stride[-2]
                for tensor in op.outputs:
                    made = graph.tensors[tensor]
                    shape = (self.rows, made.shape[-1])
                    stands[tensor] = self.draft.view(base, shape, (step, 1), made.offset - old.offset)
            else:
                made = graph.tensors[op.outputs[0]]
                new = self.draft.tensor((self.rows, made.shape[-1]), made.dtype)
                args = {
                    name: TensorRef(tensor=stands.get(value.tensor, value.tensor))
                    if isinstance(value, TensorRef)
                    else value
                    for name, value in op.args.items()
                }
                self.insert(replace(op, args=args, outputs=(new,)))
                stands[op.outputs[0]] = new
        return stands[mixture.result]

    def product(self, product: Product, rows: int, width: int) -> int:
        """A grouped product with the weights of all experts, and their biases."""
        draft, experts = self.draft, self.mixture.experts
        given = draft.tensors[rows]
        inner = given.shape[-1]
        if product.transposed:
            name = draft.storages[draft.tensors[product.weights[0]].storage].name
            dtype = draft.tensors[product.weights[0]].dtype
            stacked = draft.tensor((experts, width, inner), dtype, role=Role.WEIGHT, name=name)
            matrix = draft.view(stacked, (experts, inner, width), (inner * width, 1, inner))
        else:
            (matrix,) = product.weights
        args: dict[str, Arg] = {"self": _ref(rows), "mat2": _ref(matrix), "offs": _ref(self.ends)}
        made = self.made("aten._grouped_mm.default", args, (self.rows, width), given.dtype)
        if not product.biases:
            return made
        table = draft.tensor((experts, width), given.dtype, role=Role.WEIGHT, name="biases of experts")
        added = self.made(
            "aten.index.Tensor",
            {"self": _ref(table), "indices": (_ref(self.experts),)},
            (self.rows, width),
            given.dtype,
        )
        return self.made(
            "aten.add.Tensor", {"self": _ref(made), "other": _ref(added), "alpha": 1}, (self.rows, width), given.dtype
        )

    def put_back(self, result: int, order: int) -> None:
        """Rows in the order of tokens, and the sum over the experts of each."""
        draft, mixture, rows = self.draft, self.mixture, self.rows
        wide = draft.tensors[result]
        inverse = self.made("aten.empty_like.default", {"self": _ref(order)}, (rows,), "int64")
        ahead = self.made("aten.arange.default", {"end": rows}, (rows,), "int64")
        self.insert(
            replace(
                self.op_of(
                    "aten.index_put_.default", {"self": _ref(inverse), "indices": (_ref(order),), "values": _ref(ahead)}
                ),
                outputs=(inverse,),
                mutates=("self",),
            )
        )
        sorted_back = self.made(
            "aten.index.Tensor", {"self": _ref(result), "indices": (_ref(inverse),)}, wide.shape, wide.dtype
        )
        tokens, width = rows // mixture.chosen, wide.shape[-1]
        by_token = draft.view(sorted_back, (tokens, mixture.chosen, width), (mixture.chosen * width, width, 1))
        total: dict[str, Arg] = {"self": _ref(by_token), "dim": (1,), "keepdim": False, "dtype": None}
        wanted = draft.tensors[self.last.outputs[0]].dtype
        draft.remove(i for i in mixture.sums if i != mixture.last)
        if wide.dtype == wanted:
            final = self.op_of("aten.sum.dim_IntList", total)
        else:
            narrow = self.made("aten.sum.dim_IntList", total, (tokens, width), wide.dtype)
            final = self.op_of("aten.to.dtype", {"self": _ref(narrow), "dtype": wanted})
        draft.replace(mixture.last, replace(final, outputs=self.last.outputs, mutates=()))

    def made(self, target: str, args: dict[str, Arg], shape: tuple[int, ...], dtype: str) -> int:
        """The result of a new op."""
        tensor = self.draft.tensor(shape, dtype)
        self.op(target, args, tensor)
        return tensor

    def op(self, target: str, args: dict[str, Arg], *outputs: int) -> None:
        """A new op with these results."""
        self.insert(replace(self.op_of(target, args), outputs=outputs))

    def op_of(self, target: str, args: dict[str, Arg]) -> Op:
        """A new op at the line of the last."""
        self.count += 1
        return replace(
            self.last,
            name=f"{self.last.name}_routed_{self.count}",
            target=target,
            args=args,
            outputs=(),
            mutates=(),
        )

    def insert(self, op: Op) -> None:
        """Put an op before the last."""
        self.draft.insert(self.mixture.last, op)


def _ref(tensor: int) -> TensorRef:
    return TensorRef(tensor=tensor)
