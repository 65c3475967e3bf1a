"""Convolutions.

Multiply-adds are result positions x filter size x input channels of a group, zeros of the padding included;
for a transposed convolution every input position meets every filter element instead. This is the count of
torch.utils.flop_counter. A complex convolution is three real ones. A bias is one vector FLOP per result
element, in a kernel of its own where cuDNN convolves. cuDNN rounds float32 operands to TF32 by default
(torch.backends.cudnn.allow_tf32).
"""

from math import prod

from ..cost import Call, Cost, Gemm, formula
from ..graph import Tensor
from .arithmetic import is_complex, multiply_adds, products, reach, vector
from .parts import in_parts


@formula(
    "aten.conv1d",
    "aten.conv2d",
    "aten.conv3d",
    "aten.convolution",
    "aten._convolution",
    "aten._convolution_mode",
    "aten.convolution_overrideable",
    "aten.cudnn_convolution",
    "aten.cudnn_convolution_relu",
    "aten.cudnn_convolution_add_relu",
    "aten._conv_depthwise2d",
    "aten.conv_depthwise3d",
)
def convolution(call: Call) -> Cost:
    """A convolution, transposed if the arguments say so; what a large stride skips is not read."""
    if call.flag("transposed"):
        return conv_transpose(call)
    source, weight, out = _source(call), call.tensor("weight"), call.output
    relu = out.numel * sum(word in call.op.target for word in ("_relu", "_add_relu"))
    cost = call.cost(
        matmul=_products(source, out.numel * prod(weight.shape[1:])),
        vector=vector(out.dtype, (out.numel if call.optional("bias") else 0) + relu),
        reads={_source_name(call): reach(call, source, _elements_met(source, weight, out))},
        tf32=source.dtype == "float32",
        gemms=_as_gemms(call, weight, out),
    )
    return in_parts(call, cost, {}, bias="bias") if _adds_bias_apart(call, weight) else cost


@formula(
    "aten.conv_transpose1d",
    "aten.conv_transpose2d",
    "aten.conv_transpose3d",
    "aten.cudnn_convolution_transpose",
)
def conv_transpose(call: Call) -> Cost:
    """A transposed convolution: input elements x filter size x output channels of a group."""
    source, weight, out = _source(call), call.tensor("weight"), call.output
    return call.cost(
        matmul=_products(source, source.numel * prod(weight.shape[1:])),
        vector=vector(out.dtype, out.numel if call.optional("bias") else 0),
        tf32=source.dtype == "float32",
        gemms=_transposed_gemms(call, source, weight),
    )


@formula("aten.conv_tbc")
def conv_tbc(call: Call) -> Cost:
    """A 1-d convolution over (time, batch, channels) with a (width, in, out) filter."""
    source, out = call.tensor("self"), call.output
    width, channels, _ = call.tensor("weight").shape
    return call.cost(
        matmul=_products(source, out.numel * width * channels),
        vector=vector(out.dtype, out.numel),
        tf32=source.dtype == "float32",
        gemms=products(out.numel // max(out.shape[-1], 1), out.shape[-1], width * channels),
    )


def _adds_bias_apart(call: Call, weight: Tensor) -> bool:
    # aten/src/ATen/native/Convolution.cpp: after cudnn_convolution, output.add_(bias); depthwise kernels take it
    depthwise = weight.shape[1] == 1 and call.integer("groups", 1) > 1
    return call.gpu.vendor == "nvidia" and call.optional("bias") is not None and not depthwise


def _as_gemms(call: Call, weight: Tensor, out: Tensor) -> tuple[Gemm, ...]:
    # implicit GEMM: output positions x output channels of a group, over the filter
    groups, channels = call.integer("groups", 1), weight.shape[0]
    if not out.numel or not weight.numel or is_complex(out.dtype):
        return ()
    positions = out.numel // channels
    return (Gemm(batch=groups, m=positions, n=channels // groups, k=prod(weight.shape[1:])),)


def _transposed_gemms(call: Call, source: Tensor, weight: Tensor) -> tuple[Gemm, ...]:
    # input positions x output channels of a group and filter, over input channels of a group
    if is_complex(source.dtype):
        return ()
    groups, channels = call.integer("groups", 1), weight.shape[0]
    return products(source.numel // max(channels, 1), prod(weight.shape[1:]), channels // groups, groups)


def _products(source: Tensor, count: int) -> dict[str, float]:
    return multiply_adds(source.dtype, count * 3 / 4 if is_complex(source.dtype) else count)


def _source_name(call: Call) -> str:
    return "input" if "input" in call.op.args else "self"


def _source(call: Call) -> Tensor:
    return call.tensor(_source_name(call))


def _elements_met(source: Tensor, weight: Tensor, out: Tensor) -> int:
    spatial = len(weight.shape) - 2
    sizes = zip(source.shape[-spatial:], out.shape[-spatial:], weight.shape[2:], strict=True)
    met = prod(min(size, results * width) for size, results, width in sizes)
    return prod(source.shape[:-spatial]) * met
