"""Every step reads all weights for a few sequences, and there is memory for more of them.

**What it checks.** A decode step whose time is reading weights, at a batch at most half of what fits in memory and of
the batch at which something else takes over: reading the KV cache, or arithmetic.

**Why it costs.** Weights are read once a step, whatever the batch. Until the KV cache of all sequences is as large as
they are, or the products become compute-bound (the ridge), a further sequence costs little more than its own cache.

**How it is estimated.** The model is traced again with the larger batch: a power of two, at most the largest that
fits and the first at which weights no longer set the pace. The saving is for the tokens that a step makes now: its
time, less the larger step's time in proportion to tokens. What a user waits for each token is in the evidence.

**Remedy.** Serve more sequences in one step (continuous batching), where there are that many.

    fxroof analyze MODEL --gpu NAME --batch-size 16

**When to ignore.** One user at a time; a latency that leaves no room. Several GPUs, or a smaller one, may then be the
better buy.

**References.** Pope et al., "Efficiently Scaling Transformer Inference" (2022); Yu et al., "Orca: A Distributed Serving
System for Transformer-Based Generative Models" (OSDI 2022).
"""

from collections.abc import Iterator
from dataclasses import replace

from ..analyzer.finding import Match, Remedy, Severity, Situation, rule
from ..analyzer.roofline import Bound
from ..analyzer.savings import Seconds, timed
from ..analyzer.serving import serving


@rule("WGT003", "batch-below-ridge", severity=Severity.INFO)
def check(situation: Situation) -> Iterator[Match]:
    """The decode step as a whole."""
    phase, scenario = situation.analysis, situation.scenario
    batch = scenario.batch_size
    wanted, limit = wider_batch(situation)
    if wanted < 2 * batch:
        return
    graph = situation.retraced(replace(scenario, batch_size=wanted), "decode")
    if graph is None or graph.new_tokens != wanted:
        return
    wide = timed(graph, situation.gpu, phase.execution)
    share = batch / wanted
    times = phase.seconds
    yield Match(
        op=None,
        message=f"weights are read for {_sequences(batch)} a step; up to {wanted:,} could share them",
        evidence={
            "batch": batch,
            "batch_wanted": wanted,
            "limit": limit,
            "tokens_per_second": batch / times.estimate,
            "tokens_per_second_wanted": wanted / wide.estimate,
            "seconds_per_step": times.estimate,
            "seconds_per_step_wanted": wide.estimate,
        },
        remedy=Remedy(
            text=f"Serve {wanted:,} sequences in a step, where there are that many.",
            code=f"fxroof analyze ... --batch-size {wanted}",
        ),
        saving=_saved(Seconds(times.bound, times.estimate), wide, share),
        per_token=True,
    )


def wider_batch(situation: Situation) -> tuple[int, str]:
    """A batch that reads weights for more sequences, and what keeps it from being larger; 0 where there is none."""
    phase, memory = situation.analysis, situation.memory
    if phase.name != "decode" or phase.bound is not Bound.MEMORY:
        return 0, ""
    if memory is None or not memory.fits or not memory.max_batch_size:
        return 0, ""
    known = serving([phase], situation.scenario)
    until = known.weights_bound_batch if known else None
    if until is None or known is None:
        return 0, ""
    most, limit = min((memory.max_batch_size, "memory"), (until, known.weights_bound_until))
    return 1 << (most.bit_length() - 1), limit


def _sequences(batch: int) -> str:
    return "one sequence" if batch == 1 else f"{batch:,} sequences"


def _saved(now: Seconds, wide: Seconds, share: float) -> tuple[float, float]:
    return now.bound - share * wide.bound, now.estimate - share * wide.estimate
