"""Base units: fxroof computes in FLOP, byte and second; TFLOPS and GB/s exist in TOML and on screen only."""

from typing import NewType

Flops = NewType("Flops", float)
Bytes = NewType("Bytes", int)
Seconds = NewType("Seconds", float)
FlopsPerSecond = NewType("FlopsPerSecond", float)
BytesPerSecond = NewType("BytesPerSecond", float)
FlopsPerByte = NewType("FlopsPerByte", float)
