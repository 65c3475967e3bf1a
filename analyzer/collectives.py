"""What it costs GPUs that share a model to tell each other their parts, and one to copy from or to its host.

Pure arithmetic. All links between GPUs are taken to join every GPU with every other (NVSwitch, Infinity Fabric): what
a GPU sends, it sends at the bandwidth of all its links together.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..hardware.gpu import Gpu
from .cost import Cost, Exchange

ACHIEVED = 0.82
"""Share of the line rate that reaches its goal: 370 of 450 GB/s on H100, the rest is NVLink's protocol.

An NCCL maintainer in NVIDIA/nccl-tests#212; assumed of other links too.
"""

RING_START = 6.6e-6
"""Seconds of a ring however short, launch included: NCCL's own model (src/graph/tuning.cc, baseLat of Ring LL)."""

ONE_SHOT_START = 5e-6
"""The same of a kernel in which every GPU reads from every other: an assumption, near custom all-reduces of vLLM."""

STEP = 0.6e-6
"""Seconds from a GPU to the next over NVLink: NCCL's model (hwLat of Ring LL), assumed of other device links."""

HOST_STEP = 1.0e-6
"""The same over PCIe (hwLat of Ring LL)."""

HOST_COPIES = ("to_host", "to_device")
"""Kinds of exchange with the host, over the link to it."""

_NAMES = {
    "to_host": "device-to-host copy", "to_device": "host-to-device copy",
    "all_reduce": "all-reduce", "all_gather": "all-gather", "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Seconds of the faster algorithm, its name, and bytes that one GPU sends.

    Seconds are 0 and the name is empty where no link of the part is published.
    """

    seconds: float
    algorithm: str
    sent_bytes: float


def least_seconds(exchange: Exchange, gpu: Gpu) -> float | None:
    """Seconds that no algorithm beats on the part's links; None where no link is published.

    Of an all-reduce every GPU must get each element of the result at least once, even where switches add (NVLink
    SHARP). Otherwise it must send or get all but its own part.
    """
    if exchange.kind in HOST_COPIES:
        return exchange.nbytes / gpu.host_bandwidth if gpu.host_bandwidth else None
    bandwidth = gpu.link_bandwidth or gpu.host_bandwidth
    if bandwidth is None:
        return None
    if exchange.gpus < 2:
        return 0.0
    share = 1.0 if exchange.kind == "all_reduce" else (exchange.gpus - 1) / exchange.gpus
    return exchange.nbytes * share / bandwidth


def expected(exchange: Exchange, gpu: Gpu) -> Expected:
    """The faster of ring and one-shot: latency of its start and steps, then what is sent at the achieved bandwidth.

    A copy from or to the host is one step.
    """
    if exchange.kind in HOST_COPIES:
        seconds = HOST_STEP + exchange.nbytes / (ACHIEVED * gpu.host_bandwidth) if gpu.host_bandwidth else 0.0
        return Expected(seconds=seconds, algorithm="copy" if seconds else "", sent_bytes=float(exchange.nbytes))
    bandwidth = gpu.link_bandwidth or gpu.host_bandwidth
    if bandwidth is None or exchange.gpus < 2:
        return Expected(seconds=0.0, algorithm="", sent_bytes=0.0)
    step = STEP if gpu.link_bandwidth else HOST_STEP
    return min(
        (
            Expected(seconds=start + steps * step + sent / (ACHIEVED * bandwidth), algorithm=algorithm, sent_bytes=sent)
            for algorithm, start, (steps, sent) in (
                ("one-shot", ONE_SHOT_START, one_shot(exchange)),
                ("ring", RING_START, ring(exchange)),
            )
        ),
        key=lambda one: one.seconds,
    )


def ring(exchange: Exchange) -> tuple[int, float]:
    """Steps, and bytes that each GPU sends to its neighbour: parts of 1/N go round, twice for an all-reduce.

    An all-to-all has no ring: each GPU sends its parts to the others in turn.
    """
    others = exchange.gpus - 1
    rounds = 2 if exchange.kind == "all_reduce" else 1
    return rounds * others, rounds * others / exchange.gpus * exchange.nbytes


def one_shot(exchange: Exchange) -> tuple[int, float]:
    """Steps, and bytes that each GPU sends: at once to all others, of an all-reduce all that it has."""
    others = exchange.gpus - 1
    return 1, float(others * exchange.nbytes) if exchange.kind == "all_reduce" else (
        others / exchange.gpus * exchange.nbytes
    )


def summary(costs: Sequence[Cost]) -> str:
    """What a phase exchanges, in words: `65 all-reduces of 16.8 MB, 1 all-gather of 257 kB`; empty if nothing."""
    found = Counter(cost.exchange for cost in costs if cost.exchange is not None)
    return ", ".join(_worded(found.most_common()))


def _worded(found: Iterable[tuple[Exchange, int]]) -> Iterable[str]:
    for exchange, count in found:
        size, unit = next(
            ((exchange.nbytes / scale, unit) for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
             if exchange.nbytes >= scale),
            (float(exchange.nbytes), "B"),
        )  # fmt: skip
        name = _NAMES.get(exchange.kind, exchange.kind)
        several = f"{name[:-1]}ies" if name.endswith("y") else f"{name}s"
        yield f"{count} {several if count > 1 else name} of {size:.3g} {unit}"
