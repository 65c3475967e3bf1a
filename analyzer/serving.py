"""What a user of the model feels: time to first token, time per output token, and what batching does to them.

    TTFT = encoder + prefill                        (time to first token; a prompt in chunks: all of them)
    TPOT = decode step at the mean context          (time per output token)
    request = TTFT + (output tokens - 1) x TPOT
    tokens/s per user = 1 / TPOT,  tokens/s per GPU = batch / (TPOT x GPUs)

Definitions as in the serving literature (Databricks, "LLM inference performance engineering", 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

from .analysis import PhaseAnalysis, Times
from .scenario import Scenario


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """The phases put together for one scenario on one GPU, or on a group of them.

    Attributes:
        ttft: seconds to the first token.
        tpot: seconds per output token of each sequence.
        request: seconds from prompt to last token.
        tokens_per_second_per_user: output tokens a second of one sequence; no floor is above, no estimate is promised.
        tokens_per_second_per_gpu: output tokens a second of the batch, over the GPUs that share the model.
        weights_bound_batch: largest batch whose decode step reads more bytes of weights than of KV cache, and whose
            products take less time than that reading: beyond it more users cost more time. None without a decode phase.
        weights_bound_until: what takes over there: `kv_cache` or `compute`; empty where neither ever does.
    """

    ttft: Times | None
    tpot: Times | None
    request: Times | None
    tokens_per_second_per_user: Times | None
    tokens_per_second_per_gpu: Times | None
    weights_bound_batch: int | None
    weights_bound_until: str


def serving(phases: Sequence[PhaseAnalysis], scenario: Scenario) -> Serving | None:
    """The summary of a generating model's phases; None for a model that makes no tokens."""
    by_name = {phase.name: phase for phase in phases}
    prefill, decode = by_name.get("prefill"), by_name.get("decode")
    if prefill is None and decode is None:
        return None
    ttft = _summed([p for p in (by_name.get("encoder"), prefill) if p is not None]) if prefill else None
    tpot = decode.seconds if decode else None
    batch, until = _weights_bound(decode, scenario) if decode else (None, "")
    return Serving(
        ttft=ttft,
        tpot=tpot,
        request=_request(ttft, tpot, scenario.output_len) if ttft and tpot else None,
        tokens_per_second_per_user=_rate(tpot, 1.0) if tpot else None,
        tokens_per_second_per_gpu=_rate(tpot, scenario.batch_size / scenario.gpus) if tpot else None,
        weights_bound_batch=batch,
        weights_bound_until=until,
    )


def _summed(phases: Sequence[PhaseAnalysis]) -> Times:
    return Times(
        floor=sum(phase.turns * phase.seconds.floor for phase in phases),
        bound=sum(phase.turns * phase.seconds.bound for phase in phases),
        estimate=sum(phase.turns * phase.seconds.estimate for phase in phases),
    )


def _request(ttft: Times, tpot: Times, tokens: int) -> Times:
    steps = max(tokens - 1, 0)
    return Times(
        floor=ttft.floor + steps * tpot.floor,
        bound=ttft.bound + steps * tpot.bound,
        estimate=ttft.estimate + steps * tpot.estimate,
    )


def _rate(seconds: Times, tokens: float) -> Times:
    return Times(
        floor=tokens / seconds.floor if seconds.floor else 0.0,
        bound=tokens / seconds.bound if seconds.bound else 0.0,
        estimate=tokens / seconds.estimate if seconds.estimate else 0.0,
    )


def _weights_bound(decode: PhaseAnalysis, scenario: Scenario) -> tuple[int | None, str]:
    least = decode.floor
    bandwidth = (least.total_bytes / least.memory_seconds) if least.memory_seconds else 0.0
    cache = (least.cache_read_bytes + least.cache_written_bytes) / scenario.batch_size
    compute = least.compute_seconds / scenario.batch_size
    limits = {
        "kv_cache": least.weight_bytes / cache if cache else None,
        "compute": least.weight_bytes / bandwidth / compute if bandwidth and compute else None,
    }
    known = {name: limit for name, limit in limits.items() if limit is not None}
    if not known:
        return None, ""
    first = min(known, key=lambda name: known[name])
    return max(1, floor(known[first])), first
