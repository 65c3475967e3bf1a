"""Small models to run for real."""

import sys

import torch
from torch import nn


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 256)
        self.down = nn.Linear(256, 64)
        self.register_buffer("scale", torch.tensor([3.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x))) * self.scale


class Norm(nn.Module):
    """One kernel on a GPU, several on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.last = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(x))


class Moody(Mlp):
    """Runs other operators each time."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.times += 1
        return super().forward(x) + self.times if self.times % 2 else super().forward(x)


class Counting(Mlp):
    """Counts its steps, and has no place for a fourth."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros(1, dtype=torch.long))
        self.register_buffer("table", torch.arange(192.0).view(3, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x) + self.table[self.step]
        self.step.add_(1)
        return y


class Failing(Mlp):
    """Makes a tensor of a size that nothing else has, and fails, but only when it has memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor and not x.is_meta:
            made = torch.zeros(12345)
            raise RuntimeError(f"made {made.numel()} numbers")
        return super().forward(x)


class Leaving(Mlp):
    """Ends the program, but only when it has memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor and not x.is_meta:
            sys.exit(0)
        return super().forward(x)


class OnCuda(Mlp):
    """Written for one device."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.ones(64, device="cuda:0")
