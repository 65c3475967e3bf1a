"""What is asked of a model: how many sequences, how long."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A serving situation.

    Attributes:
        batch_size: sequences in flight.
        input_len: prompt tokens of each.
        output_len: tokens generated for each.
        name: how reports call it.
        lengths_given: true when the user chose the lengths, which are then not shortened to the model's limit.
    """

    batch_size: int = 1
    input_len: int = 2048
    output_len: int = 256
    name: str = "default"
    lengths_given: bool = False

    @property
    def context_len(self) -> int:
        """Tokens already in the cache at the mean decode step."""
        return self.input_len + self.output_len // 2
