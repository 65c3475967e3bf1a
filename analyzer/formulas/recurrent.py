"""Recurrent layers and cells.

Every weight matrix multiplies every row (batch x time step) once, whatever the layer, direction or
projection, so multiply-adds are rows x the elements of all matrices. Weights are charged once per call, not
per time step: cuDNN's persistent kernels keep them on chip, and a bound must hold for those too. cuDNN rounds
float32 to TF32 by default. Gate arithmetic is counted per hidden unit and row; a sigmoid is one
transcendental and 3 FLOPs, a tanh one.
"""

from collections.abc import Sequence

from ..cost import Call, Cost, Gemm, formula
from ..graph import Tensor
from .arithmetic import item_bytes, multiply_adds, products, vector
from .parts import Buffer, Kernels

# per hidden unit: gates, further FLOPs, transcendentals
_CELLS = {
    "lstm": (4, 13, 5),  # 3 sigmoids, c = f * c + i * g, h = o * tanh(c)
    "gru": (3, 10, 3),  # 2 sigmoids, n = tanh(x + r * h), h = n + z * (h - n)
    "rnn_tanh": (1, 0, 1),
    "rnn_relu": (1, 1, 0),
}


@formula("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu")
def layers(call: Call) -> Cost:
    """Layers over a sequence, padded or packed; what passes between layers is written and read."""
    source = call.optional("input") or call.tensor("data")
    rows = source.numel // source.shape[-1] if source.numel else 0
    matrices = [t for t in call.tensors("params") if len(t.shape) == 2]
    stacked = call.integer("num_layers", 1) - 1
    between = rows * call.output.shape[-1] * stacked * item_bytes(source)
    return _cost(call, _cell(call), source, rows, matrices, between)


@formula("aten.lstm_cell", "aten.gru_cell", "aten.rnn_tanh_cell", "aten.rnn_relu_cell")
def cell(call: Call) -> Cost:
    """One time step of one layer: a product for each matrix, then gates in one kernel (RNN.cpp).

    Gates of LSTM and GRU take the biases; what their kernel writes for a backward pass is not counted. Plain cells add
    their two products, biases included, then apply the function.
    """
    source, matrices = call.tensor("input"), [call.tensor("w_ih"), call.tensor("w_hh")]
    rows = source.numel // source.shape[-1] if source.numel else 0
    whole = _cost(call, _cell(call), source, rows, matrices, 0)
    if call.gpu.vendor == "apple" or call.op.mutates:
        return whole
    run, out, name = Kernels(call, source.dtype), call.output, _cell(call)
    fused = name in ("lstm", "gru")
    state = run.others("input", "w_ih", "w_hh", "b_ih", "b_hh")
    made: list[Buffer] = []
    for matrix, bias, given in (("w_ih", "b_ih", (run.argument("input"),)), ("w_hh", "b_hh", state[:1])):
        columns, inner = call.tensor(matrix).shape
        reads = (*given, run.argument(matrix), *(() if fused else run.given(bias)))
        added = 0 if fused or not call.optional(bias) else rows * columns
        gemm = Gemm(batch=1, m=rows, n=columns, k=inner)
        kind = "addmm" if added else "mm"
        made.append(run.kernel(kind, reads, rows * columns * item_bytes(source), flops=added, product=gemm))
    if fused:
        further = [run.result(order=i) for i in range(1, len(call.op.outputs))]
        reads = (*made, *state[-1:], *run.given("b_ih", "b_hh"))
        run.kernel(
            f"_thnn_fused_{name}_cell", reads, run.result(), flops=whole.vector_flops, special=whole.special,
            also=further,
        )  # fmt: skip
        return run.cost()
    run.kernel("add_", made, made[0], flops=out.numel)
    function = name.removeprefix("rnn_")
    run.kernel(function, made[:1], run.result(), flops=out.numel * (function == "relu"), special=whole.special)
    return run.cost()


@formula("aten.mkldnn_rnn_layer")
def cpu_layer(call: Call) -> Cost:
    """One layer in one direction, as the CPU runs an LSTM in inference."""
    source = call.tensor("input")
    rows = source.numel // source.shape[-1] if source.numel else 0
    matrices = [call.tensor("weight0"), call.tensor("weight1")]
    return _cost(call, _MODES[call.integer("mode", 0)], source, rows, matrices, 0)


_MODES = ("rnn_relu", "rnn_tanh", "lstm", "gru")


def _cell(call: Call) -> str:
    return call.op.target.split(".")[1].removesuffix("_cell")


def _cost(call: Call, cell: str, source: Tensor, rows: int, matrices: Sequence[Tensor], between: int) -> Cost:
    gates, flops, special = _CELLS[cell]
    biased = call.flag("has_biases") or call.optional("b_ih") is not None
    hidden = (call.tensors("hx") or call.tensors("hx_"))[-1].shape[-1]
    # two matrices a layer and direction have a row per gate and hidden unit; an LSTM's projection has not
    gated = sum(m.shape[0] == gates * hidden for m in matrices)
    units = rows * hidden * gated / 2
    return call.cost(
        matmul=multiply_adds(source.dtype, rows * sum(m.numel for m in matrices)),
        vector=vector(source.dtype, units * (gates * (3 if biased else 1) + flops)),
        special=units * special,
        scratch_read=between,
        scratch_written=between,
        tf32=source.dtype == "float32",
        gemms=_gemms(call, source, rows, matrices, gates * hidden),
    )


def _gemms(call: Call, source: Tensor, rows: int, matrices: Sequence[Tensor], gated: int) -> tuple[Gemm, ...]:
    # inputs of all time steps at once, then a product for each step: what is carried from one to the next
    unpacked = len(source.shape) > _MATRIX
    steps = max(source.shape[1 if call.flag("batch_first") else 0], 1) if unpacked else 1
    a_layer = 2 + any(m.shape[0] != gated for m in matrices)
    gemms: list[Gemm] = []
    for order, matrix in enumerate(matrices):
        columns, inner = matrix.shape
        times = steps if order % a_layer else 1
        gemms += products(rows // times, columns, inner, times)
    return tuple(gemms)


_MATRIX = 2
