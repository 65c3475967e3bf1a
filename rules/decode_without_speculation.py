"""One token a step: verifying a few drafted tokens would read the same weights once.

**What it checks.** A decode step of a small batch that waits for memory, where a step over five tokens a sequence
takes less than half as long again.

**Why it costs.** A step of one token reads all weights and the cache, and multiplies each weight once a sequence. The
same read serves several tokens; a cheap drafter guesses them and the model verifies them together, which changes
nothing in what it would have said.

**How it is estimated.** The model is traced again with five tokens in a step: four drafts and the one that is sure.
With each draft accepted with probability a, a step yields 1 + a + a^2 + a^3 + a^4 tokens, so the saving on a token is
its time, less the longer step over that number. It is given for several a, the first 0.7, and never exceeds the number
of tokens that a step yields. What the drafter itself costs is left out: prompt lookup costs next to nothing, a draft
model its own weights. With experts, five tokens read more of them than one; the trace counts that.

**Remedy.** Draft by prompt lookup, by extra heads, or with a small model of the same tokenizer.

    model.generate(**inputs, prompt_lookup_num_tokens=4)

**When to ignore.** Large batches, whose steps have no arithmetic to spare; text that no drafter guesses.

**References.** Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (ICML 2023); Chen et al.,
"Accelerating Large Language Model Decoding with Speculative Sampling" (2023).
"""

from collections.abc import Iterator
from dataclasses import replace

from ..analyzer.finding import Confidence, Match, Remedy, Severity, Situation, Stated, rule
from ..analyzer.graph import Role
from ..analyzer.roofline import Bound
from ..analyzer.savings import Seconds, timed

_DRAFTS = 4
_ACCEPTANCES = (0.7, 0.5, 0.6, 0.8, 0.9)
"""Shares of drafts that are accepted: that of the finding, then those of the alternatives."""
_AT_MOST = 1.5
"""How much longer a step that verifies may take than one that does not."""
_LARGEST_BATCH = 8
"""Sequences a step, up to which its arithmetic is sure to leave room for drafts."""

_REMEDY = Remedy(
    text="Draft a few tokens by prompt lookup, extra heads or a small model, and verify them in one step.",
    code=f"model.generate(**inputs, prompt_lookup_num_tokens={_DRAFTS})",
)


@rule("WGT004", "decode-without-speculation", severity=Severity.INFO)
def check(situation: Situation) -> Iterator[Match]:
    """The decode step as a whole."""
    phase, scenario, graph = situation.analysis, situation.scenario, situation.graph
    if phase.name != "decode" or scenario.step_len > 1 or scenario.batch_size > _LARGEST_BATCH:
        return
    one_a_sequence = phase.tokens == scenario.batch_size
    if phase.bound is not Bound.MEMORY or not one_a_sequence or not _keeps_a_cache(situation):
        return
    longer = situation.retraced(replace(scenario, step_len=1 + _DRAFTS), "decode")
    if longer is None or longer.tokens != (1 + _DRAFTS) * graph.tokens:
        return
    verified = timed(longer, situation.gpu, phase.execution)
    now = Seconds(phase.seconds.bound, phase.seconds.estimate)
    sees_the_past = verified.bound >= now.bound  # `is_causal` over several queries hides the cache from them
    if verified.estimate > _AT_MOST * now.estimate or not sees_the_past:
        return
    savings = {f"acceptance {a}": _saved(now, verified, a) for a in _ACCEPTANCES}
    first = next(iter(savings.values()))
    yield Match(
        op=None,
        message="each step reads its weights to make one token a sequence",
        evidence={
            "drafts": _DRAFTS,
            "acceptance": _ACCEPTANCES[0],
            "tokens_per_step": round(tokens_gained(_ACCEPTANCES[0], _DRAFTS), 2),
            "seconds_per_step": now.estimate,
            "seconds_per_longer_step": verified.estimate,
        },
        remedy=_REMEDY,
        confidence=Confidence.MEDIUM,
        saving=first,
        alternatives=dict(list(savings.items())[1:]),
        per_token=True,
    )


def tokens_gained(acceptance: float, drafts: int) -> float:
    """Tokens that a verified step yields on average, each draft being accepted if all before it were.

    Formula 1 of Leviathan et al. (2023).
    """
    return sum(acceptance**n for n in range(drafts + 1))


def _keeps_a_cache(situation: Situation) -> bool:
    return any(storage.role is Role.KV_CACHE for storage in situation.graph.storages)


def _saved(now: Seconds, verified: Seconds, acceptance: float) -> Stated:
    gained = tokens_gained(acceptance, _DRAFTS)
    return now.bound - verified.bound / gained, now.estimate - verified.estimate / gained
