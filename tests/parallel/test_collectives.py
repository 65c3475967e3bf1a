"""Seconds and bytes of collectives, against messages passed one by one."""

from dataclasses import replace

import numpy as np
import pytest
from fxroof.analyzer.collectives import expected, least_seconds, one_shot, ring, summary
from fxroof.analyzer.cost import Cost, Exchange
from fxroof.hardware.catalog import load as load_gpu
from hypothesis import given
from hypothesis import strategies as st

H100 = load_gpu("h100_sxm").gpu
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
ITEM = 8

exchanges = st.builds(
    Exchange, kind=st.sampled_from(KINDS), nbytes=st.integers(1, 10**10), gpus=st.integers(2, 72)
)  # fmt: skip


class Wires:
    """Counts what each GPU sends; all that is sent in one step travels at once."""

    def __init__(self, gpus: int) -> None:
        self.sent = [0] * gpus
        self.steps = 0

    def step(self, messages: list[tuple[int, int, np.ndarray]]) -> dict[int, list[np.ndarray]]:
        self.steps += 1
        inbox: dict[int, list[np.ndarray]] = {}
        for source, target, data in messages:
            assert source != target
            self.sent[source] += data.nbytes
            inbox.setdefault(target, []).append(data.copy())
        return inbox


def parts_of(gpus: int, length: int) -> list[np.ndarray]:
    rng = np.random.default_rng(gpus)
    return [rng.integers(0, 9, (gpus, length)).astype(float) for _ in range(gpus)]


def ring_reduce_scatter(wires: Wires, held: list[np.ndarray]) -> None:
    gpus = len(held)
    for turn in range(gpus - 1):
        inbox = wires.step([(g, (g + 1) % gpus, held[g][(g - turn) % gpus]) for g in range(gpus)])
        for g, (data,) in inbox.items():
            held[g][(g - 1 - turn) % gpus] += data


def ring_all_gather(wires: Wires, held: list[np.ndarray], ahead: int) -> None:
    gpus = len(held)
    for turn in range(gpus - 1):
        inbox = wires.step([(g, (g + 1) % gpus, held[g][(g + ahead - turn) % gpus]) for g in range(gpus)])
        for g, (data,) in inbox.items():
            held[g][(g - 1 + ahead - turn) % gpus] = data


@pytest.mark.parametrize("gpus", [2, 3, 4, 8])
def test_a_ring_of_messages_adds_up_and_sends_what_the_formula_says(gpus: int) -> None:
    held = parts_of(gpus, 5)
    total, nbytes = sum(held), held[0].nbytes
    wires = Wires(gpus)
    ring_reduce_scatter(wires, held)
    scattered = Exchange(kind="reduce_scatter", nbytes=nbytes, gpus=gpus)
    assert (wires.steps, *set(wires.sent)) == ring(scattered)
    ring_all_gather(wires, held, ahead=1)
    assert all((part == total).all() for part in held)
    assert (wires.steps, *set(wires.sent)) == ring(replace(scattered, kind="all_reduce"))
    gathered = Wires(gpus)
    ring_all_gather(gathered, held, ahead=0)
    assert (gathered.steps, *set(gathered.sent)) == ring(replace(scattered, kind="all_gather"))


@pytest.mark.parametrize("gpus", [2, 3, 4, 8])
def test_messages_to_all_at_once(gpus: int) -> None:
    held = parts_of(gpus, 5)
    reduced = Exchange(kind="all_reduce", nbytes=held[0].nbytes, gpus=gpus)
    wires = Wires(gpus)
    everyone = [(a, b) for a in range(gpus) for b in range(gpus) if a != b]
    inbox = wires.step([(a, b, held[a]) for a, b in everyone])
    assert all((held[g] + sum(inbox[g]) == sum(held)).all() for g in range(gpus))
    assert (wires.steps, *set(wires.sent)) == one_shot(reduced)
    wires = Wires(gpus)
    wires.step([(a, b, held[a][b]) for a, b in everyone])
    assert (wires.steps, *set(wires.sent)) == one_shot(replace(reduced, kind="all_to_all"))
    wires = Wires(gpus)
    wires.step([(a, b, held[a][a]) for a, b in everyone])
    assert (wires.steps, *set(wires.sent)) == one_shot(replace(reduced, kind="all_gather"))


@given(exchanges)
def test_no_estimate_beats_the_bound(exchange: Exchange) -> None:
    least = least_seconds(exchange, H100)
    assert least is not None
    assert 0 < least < expected(exchange, H100).seconds


@given(exchanges)
def test_a_switch_that_adds_does_not_beat_the_bound(exchange: Exchange) -> None:
    # NVLink SHARP: every GPU sends its tensor to the switch once and gets the result once
    switched = replace(exchange, kind="all_reduce")
    assert least_seconds(switched, H100) == switched.nbytes / H100.link_bandwidth


@given(exchanges, st.integers(1, 100))
def test_more_bytes_take_longer_and_go_round_a_ring(exchange: Exchange, factor: int) -> None:
    more = expected(replace(exchange, nbytes=exchange.nbytes * factor), H100)
    assert more.seconds >= expected(exchange, H100).seconds


def test_short_messages_go_at_once_and_long_ones_round() -> None:
    short = Exchange(kind="all_reduce", nbytes=16384, gpus=8)
    assert expected(short, H100).algorithm == "one-shot"
    long = expected(replace(short, nbytes=2**30), H100)
    assert long.algorithm == "ring"
    # 370 GB/s of bus bandwidth on 8 H100 by a ring, says NVIDIA/nccl-tests#212
    assert long.sent_bytes / long.seconds == pytest.approx(370e9, rel=0.01)


def test_parts_without_links_and_groups_of_one() -> None:
    exchange = Exchange(kind="all_reduce", nbytes=1000, gpus=8)
    alone = replace(H100, link_bandwidth=None, host_bandwidth=None)
    assert least_seconds(exchange, alone) is None
    assert expected(exchange, alone).seconds == 0
    by_host = replace(H100, link_bandwidth=None)
    assert least_seconds(exchange, by_host) == 1000 / by_host.host_bandwidth
    assert least_seconds(replace(exchange, gpus=1), H100) == 0


def test_summary() -> None:
    reduce = Cost(exchange=Exchange(kind="all_reduce", nbytes=67_108_864, gpus=8))
    gather = Cost(exchange=Exchange(kind="all_gather", nbytes=256_512, gpus=8))
    assert summary([Cost(), reduce, gather, reduce]) == "2 all-reduces of 67.1 MB, 1 all-gather of 257 kB"
    assert summary([Cost()]) == ""
