"""Peak rates of the chips that training reports its utilization of, and that the planner estimates times for."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of a device, from Google's documentation and "How to Scale Your Model" (Austin et al., 2025).

    Attributes:
      memory: HBM in GiB, as stated in the compiler's out-of-memory message.
      flops: dense bfloat16 FLOP/s.
      int8_ops: dense int8 operations a second.
      hbm: bytes/s of the high-bandwidth memory.
      ici: bytes/s of one ring of links, both directions together.
      clock: cycles a second, ``flops`` divided by what the matrix units do in a cycle.
    """

    memory: float
    flops: float
    int8_ops: float
    hbm: float
    ici: float
    clock: float


CHIPS = {
    "v4": Chip(31.75, 275e12, 275e12, 1.23e12, 9e10, 1.05e9),
    "v5e": Chip(15.75, 197e12, 394e12, 8.19e11, 9e10, 1.5e9),
    "v5p": Chip(95.74, 459e12, 918e12, 2.765e12, 1.8e11, 1.75e9),
    "v6e": Chip(31.25, 918e12, 1836e12, 1.64e12, 1.8e11, 1.75e9),
    # A device is half of a chip.
    "tpu7x": Chip(94.75, 1153e12, 1153e12, 3.69e12, 1.8e11, 2.2e9),
}

# Names of the TPUs as JAX reports them (``jax.Device.device_kind``).
DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}

# Dense bfloat16 peak of a device in FLOP/s by its kind, from the vendors' data sheets.
PEAK_FLOPS = {kind: CHIPS[chip].flops for kind, chip in DEVICE_KINDS.items()} | {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
}
