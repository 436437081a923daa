"""Names of the benchmarks that can be scored; a module of its own because it imports nothing."""

from typing import Literal

Benchmark = Literal["pope", "textvqa", "gqa", "vqav2", "scienceqa", "mme"]
