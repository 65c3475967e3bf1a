"""Convolutions and recurrent layers. Oracle: torch.utils.flop_counter on the same call, run on meta."""

from typing import Any

import pytest
import torch
from formulas.one_op import aten, cost_of, meta, traffic_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def counted(target: Any, *args: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        target(*args)
    return int(counter.get_total_flops())


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Any, list[Any]]:
    ndim, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    into, out = (groups * draw(st.integers(1, 3)) for _ in range(2))
    kernel, stride, dilation = (draw(st.lists(st.integers(1, 3), min_size=ndim, max_size=ndim)) for _ in range(3))
    sizes = draw(st.lists(st.integers(7, 10), min_size=ndim, max_size=ndim))
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    source, bias = meta(*batch, into, *sizes), draw(st.sampled_from([None, meta(out)]))
    if draw(st.booleans()):
        target = getattr(aten, f"conv_transpose{ndim}d")
        overload = getattr(target, "default" if ndim == 1 else "input")
        padding = [k // 2 for k in kernel]
        return overload, [
            source, meta(into, out // groups, *kernel), bias, stride, padding, [0] * ndim, groups, dilation
        ]  # fmt: skip
    weight = meta(out, into // groups, *kernel)
    if draw(st.booleans()):
        mode = draw(st.sampled_from(["same", "valid"]))
        ones = [1] * ndim
        return getattr(aten, f"conv{ndim}d").padding, [source, weight, bias, ones, mode, dilation, groups]
    padding = draw(st.lists(st.integers(0, 2), min_size=ndim, max_size=ndim))
    return getattr(aten, f"conv{ndim}d").default, [source, weight, bias, stride, padding, dilation, groups]


@given(convolutions())
def test_flops(drawn: tuple[Any, list[Any]]) -> None:
    target, args = drawn
    cost = cost_of(target, *args)
    assert cost.matmul_flops == counted(target, *args)
    assert cost.tf32
    assert cost.vector_flops == (0 if args[2] is None else target(*args).numel())


def test_the_general_operator() -> None:
    weight = meta(3, 4, 5, 5)
    for transposed, source in ((False, meta(2, 4, 9, 9)), (True, meta(2, 3, 9, 9))):
        args = (source, weight, None, [2, 2], [1, 1], [1, 1], transposed, [0, 0], 1)
        assert cost_of(aten.convolution.default, *args).matmul_flops == counted(aten.convolution.default, *args)


def test_a_stride_wider_than_the_filter_skips_input() -> None:
    weight = meta(8, 4, 1, 1)
    read, _ = traffic_of(aten.conv2d.default, meta(2, 4, 16, 16), weight, None, [2, 2])
    assert read == 4 * (2 * 4 * 8 * 8 + 8 * 4)
    read, _ = traffic_of(aten.conv2d.default, meta(2, 4, 16, 16), meta(8, 4, 4, 4), None, [4, 4])
    assert read == 4 * (2 * 4 * 16 * 16 + 8 * 4 * 16)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
def test_recurrent_layers(kind: str, layers: int, both: bool) -> None:
    module = getattr(nn, kind)(24, 16, num_layers=layers, bidirectional=both, batch_first=True, device="meta")
    directions = 2 if both else 1
    source, state = meta(2, 5, 24), meta(layers * directions, 2, 16)
    hx = [state, state] if kind == "LSTM" else state
    target = {"GRU": aten.gru.input, "LSTM": aten.lstm.input, "RNN": aten.rnn_tanh.input}[kind]
    args = (source, hx, module._flat_weights, True, layers, 0.0, False, both, True)
    cost = cost_of(target, *args)
    assert cost.matmul_flops == counted(target, *args)
    units = 2 * 5 * 16 * directions * layers
    assert cost.special == units * {"GRU": 3, "LSTM": 5, "RNN": 1}[kind]


def test_lstm_projection() -> None:
    module = nn.LSTM(24, 16, proj_size=6, device="meta")
    hx = [meta(1, 2, 6), meta(1, 2, 16)]
    args = (meta(5, 2, 24), hx, module._flat_weights, True, 1, 0.0, False, False, False)
    cost = cost_of(aten.lstm.input, *args)
    assert cost.matmul_flops == counted(aten.lstm.input, *args)
    assert cost.special == 5 * 5 * 2 * 16


def test_cells() -> None:
    weights = [meta(4 * 16, 24), meta(4 * 16, 16), meta(4 * 16), meta(4 * 16)]
    args = (meta(3, 24), [meta(3, 16), meta(3, 16)], *weights)
    cost = cost_of(aten.lstm_cell.default, *args)
    assert cost.matmul_flops == counted(aten.lstm_cell.default, *args)
    assert cost.special == 3 * 16 * 5


def test_a_complex_convolution_is_three_real_ones() -> None:
    args = (meta(2, 4, 9, dtype=torch.complex64), meta(6, 4, 3, dtype=torch.complex64))
    cost = cost_of(aten.conv1d.default, *args)
    assert cost.matmul == {"float32": counted(aten.conv1d.default, *args)}


def test_weights_of_a_sequence_are_read_once() -> None:
    module = nn.GRU(24, 16, batch_first=True, device="meta")
    rest = (meta(1, 1, 16), module._flat_weights, True, 1, 0.0, False, False, True)
    short, long = (traffic_of(aten.gru.input, meta(1, n, 24), *rest) for n in (1, 9))
    assert long[0] - short[0] == 8 * 24 * 4
