"""Recurrent layers and cells.

Every weight matrix multiplies every row (batch x time step) once, whatever the layer, direction or
projection, so multiply-adds are rows x the elements of all matrices. Weights are charged once per call, not
per time step: cuDNN's persistent kernels keep them on chip, and a bound must hold for those too. cuDNN rounds
float32 to TF32 by default. Gate arithmetic is counted per hidden unit and row; a sigmoid is one
transcendental and 3 FLOPs, a tanh one.
"""

from collections.abc import Sequence

from ..cost import Call, Cost, formula
from ..graph import Tensor
from .arithmetic import item_bytes, multiply_adds, vector

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
    """One time step of one layer."""
    source = call.tensor("input")
    rows = source.numel // source.shape[-1] if source.numel else 0
    return _cost(call, _cell(call), source, rows, [call.tensor("w_ih"), call.tensor("w_hh")], 0)


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
    )
