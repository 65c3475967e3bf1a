"""What a user asks of the tracing side, as plain data that can cross to another process."""

from dataclasses import dataclass, field

from .scenario import Scenario


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A model to build and trace.

    Attributes:
        target: as on the command line.
        init: an expression in the target's namespace that builds the model; empty to find it.
        inputs: `name=2x3x224x224:bf16` for each input of forward given by hand.
        scenario: batch and lengths.
        phase: `prefill`, `decode`, `forward`, `encoder`, or `all` that the model has.
        dtype: `as-is`, `bf16`, `fp16` or `fp32`.
        attention: `sdpa` or `eager`, for transformers models.
        trust_remote_code: run code that a model repository brings.
        assume: data that may be assumed where tracing needs values, such as `balanced-routing`.
    """

    target: str
    init: str = ""
    inputs: tuple[str, ...] = ()
    scenario: Scenario = field(default_factory=Scenario)
    phase: str = "all"
    dtype: str = "as-is"
    attention: str = "sdpa"
    trust_remote_code: bool = False
    assume: tuple[str, ...] = ()
