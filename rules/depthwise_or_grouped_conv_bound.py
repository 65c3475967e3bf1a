"""A depthwise convolution waits for memory, and a batch norm of its own passes over its result once more.

**What it checks.** Convolutions with one input channel a group whose intensity is less than a quarter of what keeps
the arithmetic units busy, and whose result goes into a batch norm in inference mode and nowhere else.

**Why it costs.** A depthwise filter does some ten to a hundred FLOPs for each element that it reads and writes, so it
takes as long as memory takes, whatever the arithmetic. A pointwise pass behind it moves as many bytes again.

**How it is estimated.** The scale and shift of the batch norm go into the filter and its bias, which PyTorch's
depthwise kernels add themselves; the pass of the batch norm goes. Grouped convolutions of several channels run in
cuDNN, with a pass of its own for the bias: folding moves that pass and saves nothing, so they are left alone, and so
are depthwise convolutions without a batch norm.

**Remedy.** Fold the batch norm before inference.

    from torch.nn.utils.fusion import fuse_conv_bn_eval
    conv = fuse_conv_bn_eval(conv.eval(), bn.eval())

Others, which change the model or leave PyTorch's kernels: channels-last memory; an engine that puts the activation into
the convolution, such as TensorRT; fewer groups, as in EfficientNetV2's fused blocks.

**When to ignore.** In training, where statistics change; when `torch.compile` fuses the batch norm with the activation
behind it, whose pass stays.

**References.** Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference" (2018), section 3.2; Tan and Le, "EfficientNetV2" (2021); PyTorch documentation of
`torch.nn.utils.fusion.fuse_conv_bn_eval`.
"""

from collections.abc import Iterator
from dataclasses import replace

from ..analyzer.cost import operator_name
from ..analyzer.finding import Match, Remedy, Rewrite, Severity, Situation, rule
from ..analyzer.graph import Op, Role, TensorRef
from ..analyzer.rewrite import Draft

_REMEDY = Remedy(
    text="Fold the batch norm into the convolution before inference.",
    code="from torch.nn.utils.fusion import fuse_conv_bn_eval\nconv = fuse_conv_bn_eval(conv.eval(), bn.eval())",
)
_FAR_UNDER = 0.25
"""Share of the ridge below which only memory counts."""
_CONVOLUTIONS = ("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution", "aten._convolution")


@rule("SHP003", "depthwise-or-grouped-conv-bound", severity=Severity.INFO)
def check(situation: Situation) -> Iterator[Match]:
    """Every depthwise convolution that a batch norm follows."""
    graph = situation.graph
    for index, op in enumerate(graph.ops):
        if operator_name(op.target) not in _CONVOLUTIONS or not _is_depthwise(situation, op):
            continue
        found = situation.analysis.ops[index]
        norm = situation.flow.only_user(op.outputs[0])
        if found.ridge is None or found.intensity > _FAR_UNDER * found.ridge or norm is None:
            continue
        if not _is_fixed_norm(situation, graph.ops[norm]):
            continue
        yield Match(
            op=index,
            message="a depthwise convolution waits for memory, and its batch norm is a pass of its own",
            evidence={
                "bytes": found.bytes_read + found.bytes_written,
                "norm_bytes": situation.analysis.ops[norm].bytes_read + situation.analysis.ops[norm].bytes_written,
            },
            remedy=_REMEDY,
            rewrite=_folded(index, norm),
        )


def _is_depthwise(situation: Situation, op: Op) -> bool:
    weight, groups = op.args.get("weight"), op.args.get("groups")
    if not isinstance(weight, TensorRef) or not isinstance(groups, int) or op.args.get("transposed"):
        return False
    return groups > 1 and situation.graph.tensors[weight.tensor].shape[1] == 1


def _is_fixed_norm(situation: Situation, op: Op) -> bool:
    """A batch norm whose statistics are those of the checkpoint."""
    if operator_name(op.target) != "aten.batch_norm" or op.args.get("training"):
        return False
    graph = situation.graph
    given = [op.args.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    fixed = [v for v in given if isinstance(v, TensorRef) and graph.role(v.tensor) in (Role.WEIGHT, Role.CONSTANT)]
    return len(fixed) == len([v for v in given if v is not None]) and isinstance(given[-1], TensorRef)


def _folded(index: int, norm: int) -> Rewrite:
    def rewrite(draft: Draft) -> None:
        if not draft.claim((index, norm)):
            return
        op = draft.graph.ops[index]
        bias = op.args.get("bias")
        if bias is None:
            filters = draft.tensors[op.inputs[1]]
            name = f"{draft.storages[filters.storage].name}.bias"
            bias = TensorRef(tensor=draft.tensor((filters.shape[0],), filters.dtype, role=Role.WEIGHT, name=name))
        draft.replace(index, replace(op, args={**op.args, "bias": bias}))
        draft.substitute(draft.graph.ops[norm].outputs[0], op.outputs[0])

    return rewrite
