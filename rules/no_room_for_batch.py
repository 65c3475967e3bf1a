"""The model fits, but fewer sequences than are asked for.

**What it checks.** What the run needs exceeds the memory that programs can use, and a smaller batch of the same lengths
does not. Where not even one sequence fits, that is MEM001.

**Why it costs.** It does not run as asked. A server queues the sequences that it has no room for, so that throughput is
that of the smaller batch: the weights are read once for fewer tokens.

**How it is estimated.** Arithmetic on the memory lines of the report: weights and CUDA's own memory are there once,
cache (at the end of the generation) and activations are taken in proportion to the batch. Weights in 8 and 4 bits take
8 and 4 of the bits that they have now, with 16 bits of scale for each 128 of 4; a cache in 8 bits takes half of one in
16. The room that this leaves is divided by what a sequence takes.

**Remedy.** What is enough on its own, or fewer sequences at a time.

    for part in prompts.split(largest_batch):
        model.generate(part)

**When to ignore.** Where the server schedules what fits, and the batch asked for is only the most that may come.

**Example.**

    fxroof analyze meta-llama/Meta-Llama-3-8B --gpu l4 --batch-size 64 --input-len 8192

**References.** docs/method.md; Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention" (SOSP 2023).
"""

from collections import Counter
from collections.abc import Iterator, Mapping

from ..analyzer.finding import Match, Remedy, Severity, Situation, rule
from ..analyzer.graph import ITEM_BITS, Graph, Role
from ..analyzer.memory import Memory
from ..analyzer.scenario import Scenario


@rule("MEM002", "no-room-for-batch", severity=Severity.ERROR)
def check(situation: Situation) -> Iterator[Match]:
    """The run as a whole, said once: in the phase whose activations are the largest."""
    memory, scenario = situation.memory, situation.scenario
    if memory is None or memory.fits is not False or not memory.max_batch_size:
        return
    if situation.analysis.name != memory.activations_phase:
        return
    largest, asked = memory.max_batch_size, scenario.batch_size
    yield Match(
        op=None,
        message=f"there is room for {_sequences(largest)} of the {asked:,} asked for",
        evidence={
            "needed_bytes": memory.total_bytes,
            "usable_bytes": memory.usable_bytes or 0,
            "weights_bytes": memory.weights_bytes,
            "kv_cache_bytes_a_sequence": memory.kv_cache_bytes // asked,
            "activations_bytes_a_sequence": memory.activations_bytes // asked,
            "largest_batch": largest,
        },
        remedy=Remedy(
            text="; ".join(_options(memory, scenario, _rooms(situation, memory))) + ".",
            code=f"for part in prompts.split({largest}):\n    model.generate(part)",
        ),
        always=True,
    )


def _options(memory: Memory, scenario: Scenario, rooms: Mapping[str, int]) -> Iterator[str]:
    asked, largest = scenario.batch_size, memory.max_batch_size or 1
    yield f"Run {_sequences(largest)} at a time, in {-(-asked // largest):,} rounds"
    if rooms:
        yield "room with " + ", ".join(f"{name}: {'all' if n >= asked else f'{n:,}'}" for name, n in rooms.items())
    if memory.max_context_len:
        yield f"a context of {memory.max_context_len:,} tokens instead of {memory.context_len:,} has room for all"
    if memory.activations_phase == "prefill" and memory.activations_bytes > memory.kv_cache_bytes:
        yield "prompts in chunks (--chunk) need less for activations, the largest part here"
    if memory.min_gpus and memory.min_gpus > 1:
        yield f"{memory.min_gpus:,} of these GPUs hold it (--tp {memory.min_gpus})"


def _rooms(situation: Situation, memory: Memory) -> dict[str, int]:
    """The largest batch with narrower weights or cache, where that is larger."""
    batch = situation.scenario.batch_size
    weight_bits, cache_bits = (_bits(situation.graph, role) for role in (Role.WEIGHT, Role.KV_CACHE))
    cache = memory.kv_cache_bytes
    weights = {f"{bits}-bit weights": kept / weight_bits for bits, kept in _WIDTHS.items() if kept < weight_bits}
    shares = {name: (share, 1.0) for name, share in weights.items()}
    if cache_bits > _CACHE_BITS:
        narrow = _CACHE_BITS / cache_bits
        shares["an 8-bit cache"] = (1.0, narrow)
        if weights:
            name, share = min(weights.items(), key=lambda item: item[1])
            shares[f"{name} and an 8-bit cache"] = (share, narrow)
    rooms: dict[str, int] = {}
    for name, (of_weights, of_cache) in shares.items():
        left = (memory.usable_bytes or 0) - memory.overhead_bytes - of_weights * memory.weights_bytes
        each = (of_cache * cache + memory.activations_bytes) / batch
        if each > 0 and left // each > _WORTH_SAYING * (memory.max_batch_size or 0):
            rooms[name] = int(left // each)
    return rooms


_WIDTHS = {8: 8.0, 4: 4 + 16 / 128}
"""Bits a weight takes, those of its scale included; one scale a row of 8-bit weights is nothing beside them."""
_CACHE_BITS = 8
_WORTH_SAYING = 1.05
"""Batch with a remedy over the batch without it."""


def _bits(graph: Graph, role: Role) -> int:
    """Bits of the type that most bytes of a role have; 0 where there are none."""
    nbytes: Counter[int] = Counter()
    seen: set[int] = set()
    for tensor in graph.tensors:
        storage = graph.storages[tensor.storage]
        if storage.role is role and tensor.storage not in seen:
            seen.add(tensor.storage)
            nbytes[ITEM_BITS[tensor.dtype]] += storage.nbytes
    return max(nbytes, key=lambda bits: nbytes[bits], default=0)


def _sequences(count: int) -> str:
    return f"{count:,} sequence{'s' if count != 1 else ''}"
