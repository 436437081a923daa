"""The smallest TPU slice that fits a full fine-tune, with and without drops, according to the TPU compiler.

Global batch 128, all devices along fsdp, in the number of microbatches that is fastest by the estimate. Prints the rows
of the table in docs/benchmarks.md as they are found, which takes several hours on one core.
"""

import argparse
import dataclasses

from pdrop_jax.analysis.chips import CHIPS
from pdrop_jax.planner.topology import devices_of

SLICES = {
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8"),
}
ROWS = 128
STATE_BYTES = 12  # per trained parameter: the float32 master and two moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["llava-1.5-7b", "llava-1.5-13b", "llava-next-7b"])
    parser.add_argument("--chips", nargs="+", default=list(SLICES), choices=SLICES)
    parser.add_argument("--slices", nargs="+", help="slices to try, smallest first (default: all)")
    parser.add_argument("--rows", type=int, default=ROWS, help="global batch")
    arguments = parser.parse_args()
    slices = {chip: [size for size in SLICES[chip] if size in (arguments.slices or SLICES[chip])] for chip in SLICES}
    devices = {f"{chip}:{size}": devices_of(f"{chip}:{size}") for chip in arguments.chips for size in slices[chip]}

    from pdrop_jax.batch import Bucket
    from pdrop_jax.config import config_of
    from pdrop_jax.model.params import abstract_params, count
    from pdrop_jax.planner.programs import CompiledProgram, Program, compile_program, fastest, groups_of
    from pdrop_jax.schedule import DropSchedule

    for model in arguments.models:
        config = config_of(model)
        state = STATE_BYTES * count(abstract_params(config))
        bucket = Bucket(128, (2880,), 5) if config.tiling else Bucket(128, (config.image_tokens,))
        for chip in arguments.chips:
            capacity = CHIPS[chip].memory * 2**30
            for schedule in (config.schedule, DropSchedule.none()):
                job = Program(
                    dataclasses.replace(config, schedule=schedule),
                    "train",
                    bucket,
                    arguments.rows,
                    groups=groups_of(config),
                )
                for size in slices[chip]:
                    topology = f"{chip}:{size}"
                    number = len(devices[topology])
                    if state / number > capacity:
                        continue

                    def compiled(job: Program, sizes: dict[str, int], topology: str = topology) -> CompiledProgram:
                        return compile_program(job, sizes, topology, devices[topology])

                    found = fastest(job, {"fsdp": number}, compiled)
                    name = "PyramidDrop" if schedule.layers else "dense"
                    row = f"| {model} | {name} | {topology} | {job.macs / number / 1e12:.1f} T"
                    if found and found.report.estimate:
                        print(
                            f"{row} | {found.job.grad_accum_steps} | {found.report.total_bytes / 2**30:.2f} GiB"
                            f" | {found.report.estimate.time.total:.0f} ms | {found.report.compile_seconds:.0f} s |",
                            flush=True,
                        )
                        break
                    print(f"{row} | does not fit |", flush=True)


if __name__ == "__main__":
    main()
