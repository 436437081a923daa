"""The smallest TPU slice that fits a full fine-tune, with and without drops, according to the TPU compiler.

Global batch 128, all devices along fsdp, one row per device at a time. Prints the rows of the table in
docs/benchmarks.md as they are found, which takes several hours on one core.
"""

import argparse
import dataclasses

from pdrop_jax.planner.topology import CHIPS, devices_of

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
    from pdrop_jax.planner.programs import Program, compile_program, groups_of
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
                    parts = arguments.rows // number
                    found = compile_program(
                        dataclasses.replace(job, grad_accum_steps=parts), None, topology, devices[topology]
                    ).report
                    gib = found.total_bytes / 2**30 if found.fits else found.excess_bytes / 2**30
                    said = f"{gib:.2f} of {CHIPS[chip].memory} GiB" if found.fits else f"{gib:.2f} GiB too much"
                    name = "PyramidDrop" if schedule.layers else "dense"
                    print(
                        f"| {model} | {name} | {topology} | {said} | {job.macs / number / 1e12:.1f} T |"
                        f" {found.compile_seconds:.0f} s |",
                        flush=True,
                    )
                    if found.fits:
                        break


if __name__ == "__main__":
    main()
