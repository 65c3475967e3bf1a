"""What is asked of a model: how many sequences, how long, and the phases that follow from it."""

from dataclasses import dataclass

MOST_SEQUENCES = 1_000_000
MOST_TOKENS = 10_000_000
MOST_GPUS = 1024
MOST_SECONDS = 10_000_000
"""More than anybody means: what is beyond is a typing error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One way a model is run.

    Attributes:
        name: `encoder`, `prefill`, `decode` or `forward`.
        tokens: rows pushed through the model (batch x length); 0 for non-token models.
        new_tokens: tokens gained by it: all of the prompts, one a sequence in decode.
        cache_fill: share of a cache that the model owns which earlier tokens fill when the phase starts; 1 for caches
            passed in.
        turns: times it runs for one prompt: the chunks that the prompt is cut into.
        expert_ranks: GPUs that share the experts, each holding some of them whole; 1 where every GPU has a part of all.
    """

    name: str = "forward"
    tokens: int = 0
    new_tokens: int = 0
    cache_fill: float = 1.0
    turns: int = 1
    expert_ranks: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A serving situation.

    Attributes:
        batch_size: sequences in flight.
        input_len: prompt tokens of each.
        output_len: tokens generated for each.
        name: how reports call it.
        lengths_given: true when the user chose the lengths, which are then not shortened to the model's limit.
        source_len: positions that an encoder makes of its input, which the decoder attends to; 0 without an encoder.
        prefix_len: tokens of the prompt whose cache is there already, from another request.
        chunk: most prompt tokens of a sequence that go through the model at once; 0 for all.
        tp: GPUs over which matrices are cut; 1 where each is whole.
        ep: GPUs over which experts are dealt out whole; 1 where every GPU has all.
        step_len: tokens that a sequence pushes through the model in a decode step: 1, or more where drafted tokens are
            verified together with the one that is sure.
    """

    batch_size: int = 1
    input_len: int = 2048
    output_len: int = 256
    name: str = "default"
    lengths_given: bool = False
    source_len: int = 0
    prefix_len: int = 0
    chunk: int = 0
    tp: int = 1
    ep: int = 1
    step_len: int = 1

    @property
    def gpus(self) -> int:
        """GPUs that run the model together."""
        return max(self.tp, self.ep)

    @property
    def context_len(self) -> int:
        """Tokens already in the cache at the mean decode step."""
        return self.input_len + self.output_len // 2

    @property
    def prompt_turns(self) -> int:
        """Passes that a prompt takes."""
        return -(-(self.input_len - self.prefix_len) // self.chunk) if self.chunk else 1

    @property
    def prompt_len(self) -> int:
        """Prompt tokens of a sequence in the mean pass."""
        return max(1, round((self.input_len - self.prefix_len) / self.prompt_turns))

    @property
    def prompt_past(self) -> int:
        """Tokens in the cache before the mean pass: bytes and FLOPs of all passes are as many times its own."""
        return round(self.prefix_len + (self.input_len - self.prefix_len - self.prompt_len) / 2)

    def phase(self, name: str, *, length: int = 1, cache_fill: float = 1.0) -> Phase:
        """The phase of that name in which every sequence pushes `length` tokens through the model."""
        gained = {"prefill": length, "decode": 1}.get(name, 0)
        return Phase(
            name=name,
            tokens=self.batch_size * length,
            new_tokens=self.batch_size * gained,
            cache_fill=cache_fill,
            turns=self.prompt_turns if name == "prefill" else 1,
            expert_ranks=self.ep,
        )
