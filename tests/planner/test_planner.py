"""Planning for TPUs: the compiler's figures, read; and the command, as a user calls it."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
from command import PDROP

from pdrop_jax.analysis.chips import CHIPS
from pdrop_jax.batch import Bucket
from pdrop_jax.cli.plan import run
from pdrop_jax.config import LlavaConfig, TextConfig, VisionConfig
from pdrop_jax.errors import UserError
from pdrop_jax.planner import hlo, programs, topology
from pdrop_jax.planner.estimate import PARTS, Estimate, Time, estimate
from pdrop_jax.planner.hlo_text import parse
from pdrop_jax.schedule import DropSchedule

CONFIG = LlavaConfig(
    vision=VisionConfig(56, 14, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2),
    text=TextConfig(512, 256, 512, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=128, max_length=512),
    schedule=DropSchedule((1,), (0.5,)),
)
LAYERS = 2 * (2 * 256 * 512 + 2 * 256 * 256 + 3 * 256 * 512)  # weights of q and o, k and v, the mlp
HLO = """
%piece (p: bf16[2,128]) -> bf16[8,128] {
  ROOT %all-gather.2 = bf16[8,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, dimensions={0}
}
%layer (carry: (s32[], f32[4])) -> (s32[], f32[4]) {
  %all-gather.1 = bf16[8,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, dimensions={0}
  %overlapped = bf16[8,128]{1,0} fusion(%p), kind=kCustom, calls=%piece, metadata={op_name="all-reduce("}
}
%more (carry: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%n, %limit), direction=LT
}
ENTRY %main (q: f32[2,4]) -> f32[16,4] {
  %layers = (s32[]{:T(128)}, f32[4]{0}) while(%tuple), condition=%more, body=%layer
  %ag = (f32[2,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%q), channel_id=8, dimensions={0}
  %agd = f32[16,4]{1,0} all-gather-done(%ag), metadata={op_name="all-gather("}
  %reduce = (f32[]{:T(128)}, f32[3]{0}) all-reduce(%a, %b), channel_id=9, to_apply=%add
}
%add (a: f32[], b: f32[]) -> f32[] {
}
"""


def test_collectives_are_counted_as_often_as_they_run():
    found = hlo.collectives(parse(HLO))
    assert found["all-gather"] == (3 + 1, 3 * 8 * 128 * 2 + 16 * 4 * 4)
    assert found["all-reduce"] == (1, 4 + 3 * 4)
    assert found["all-to-all"] == (0, 0)


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Used 17.25G of 15.75G hbm. Exceeded hbm capacity by 1.50G.\n\nAll",
        "the total memory required for HLO temporaries (17.25G) exceeds available HBM (15.75G).",
    ],
)
def test_what_does_not_fit_says_by_how_much(message):
    class Full:
        def compile(self):
            raise RuntimeError(message)

    report = hlo.compile_report(Full, "v5e:2x4")
    assert not report.fits
    assert report.excess_bytes == 1.5 * 2**30


def test_another_error_of_the_compiler_is_not_hidden():
    class Broken:
        def compile(self):
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        hlo.compile_report(Broken, "v5e:2x4")


def test_bad_topologies(monkeypatch):
    with pytest.raises(UserError, match="is not of the form v5e:4x8"):
        topology.devices_of("a100:8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'pdrop-jax\[plan\]'"):
        topology.devices_of("v5e:2x4")


def report(milliseconds, fits):
    """A program that takes so long, in one part of the model."""
    estimate = Estimate({"other": Time(cycles=milliseconds)}) if fits else None
    return hlo.Report(0, 0, 0, 0, 1, not fits, {}, 0.0, estimate)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    CONFIG.save(folder)
    return folder


def planned(folder, *options, **environment):
    command = [*PDROP, "plan", "--model", folder, "--topology", "v5e:2x4", "--bucket", "112", "144", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def test_a_training_step_is_compiled_for_a_slice(folder, tmp_path):
    done = planned(folder, "--mesh", "fsdp=8", "--batch", "8", "--json", "--hlo", tmp_path / "step.hlo")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    pyramid, dense = said["plans"]
    assert (pyramid["model"], dense["model"]) == ("PyramidDrop", "dense")
    assert pyramid["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert pyramid["fits"]
    assert dense["fits"]
    assert pyramid["macs"] < dense["macs"]
    assert pyramid["argument_bytes"] == pytest.approx(dense["argument_bytes"], rel=0.01)
    # The state is donated: what comes out lies where it went in, but for the metrics.
    assert pyramid["output_bytes"] < 0.01 * pyramid["argument_bytes"]
    # With one row a device, gradients are still scattered piece by piece: no device sums whole ones, as the compiler
    # does by default. The drops add what the ranking's two products gather, with some to spare for its pieces.
    sent = {plan["model"]: {kind: size for kind, (_, size) in plan["collectives"].items()} for plan in said["plans"]}
    ranking = 256 * (4 + 2) * 128 * 2  # the weights of q and k, bfloat16
    for sums in (each["all-reduce"] for each in sent.values()):
        assert 0 < sums < 2**13  # of norms and metrics: not even the embedding's gradient is summed as a whole
    assert sent["PyramidDrop"]["all-gather"] <= sent["dense"]["all-gather"] + 2 * ranking
    assert sent["PyramidDrop"]["collective-permute"] <= sent["dense"]["collective-permute"] + 2 * ranking
    # The estimate: of both programs, in all parts of the model, and of the program that was written.
    assert (said["estimate_ms"], said["dense"]["estimate_ms"]) == (pyramid["estimate_ms"], dense["estimate_ms"])
    assert said["ratio"] == pytest.approx(dense["estimate_ms"] / pyramid["estimate_ms"])
    assert said["mac_ratio"] == pytest.approx(dense["macs"] / pyramid["macs"])
    for plan, parts in ((pyramid, set(PARTS)), (dense, set(PARTS) - {"drop"})):
        assert set(plan["estimate"]["parts"]) == parts
        total = sum(part["cycles"] + part["links"] for part in plan["estimate"]["parts"].values())
        assert 0 < plan["estimate_ms"] == pytest.approx(total, abs=0.02)
        # The products of one device at the matrix unit's peak: remat runs the forward pass twice, and the compiler
        # pads small products.
        least = 2e3 * plan["macs"] / CHIPS["v5e"].flops
        assert least < plan["estimate"]["matrix"] < 3 * least
    written = estimate(parse((tmp_path / "step.hlo").read_text()), "v5e")
    assert written.time.total == pytest.approx(pyramid["estimate_ms"], abs=0.001)


def test_a_decode_step_needs_no_second_cache(folder):
    done = planned(folder, "--mesh", "data=4", "tensor=2", "--batch", "512", "--mode", "decode", "--no-dense", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    (report,) = said["plans"]
    assert said["estimate_ms"] == report["estimate_ms"] > 0
    assert "dense" not in said
    slots = 112 + 144 + 128 + 112 + 72 + 128
    cache = 512 // 4 * slots * 2 * 128 * 2  # of one device: keys and values, one of two heads, bfloat16
    assert report["argument_bytes"] > cache
    assert report["temporary_bytes"] < 0.05 * cache


COMPILE = """
import sys
from pdrop_jax.planner.topology import devices_of
devices = devices_of("v5e:2x2")
from pdrop_jax.batch import Bucket
from pdrop_jax.config import LlavaConfig
from pdrop_jax.planner.programs import Program, lower
from pdrop_jax.sharding import make_mesh
job = Program(LlavaConfig.load(sys.argv[1]), "decode", Bucket(112, (144,)), rows=8)
print(lower(job, make_mesh({"data": 2, "tensor": 2}, devices)).compile().as_text())
"""


LOWER = """
import sys
from pdrop_jax.planner.topology import devices_of
devices = devices_of("v5e:2x2")
from pdrop_jax.batch import Bucket
from pdrop_jax.config import LlavaConfig
from pdrop_jax.planner.programs import Program, lower
from pdrop_jax.sharding import make_mesh
config = LlavaConfig.load(sys.argv[1])
print(lower(Program(config, "prefill", Bucket(64, (config.image_tokens,)), rows=4), make_mesh(None, devices)).as_text())
"""


def test_the_tower_of_a_large_picture_runs_the_flash_kernel(tmp_path):
    """Its scores would be written to memory in float32: 33 x 33 patches and a class token, padded for the kernel."""
    vision = dataclasses.replace(CONFIG.vision, image_size=33 * CONFIG.vision.patch_size, num_heads=2)
    dataclasses.replace(CONFIG, vision=vision, schedule=DropSchedule.none()).save(tmp_path)
    done = subprocess.run([sys.executable, "-c", LOWER, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = [line for line in done.stdout.splitlines() if "tpu_custom_call" in line]
    assert any("x1280x32xbf16" in line for line in kernels)
    assert "1090x1090xf32" not in done.stdout


def test_decode_copies_no_stack_of_weights_or_keys(tmp_path):
    # Two layers per stage make a loop, and a device's 352 neurons are no whole number of tiles.
    text = dataclasses.replace(CONFIG.text, num_layers=4, num_kv_heads=4, intermediate_size=704)
    dataclasses.replace(CONFIG, text=text, schedule=DropSchedule((2,), (0.5,))).save(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILE, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stacks = {dims for dims in re.findall(r"bf16\[([\d,]+)\]", done.stdout) if re.match(r"2,\d+,\d", dims)}
    assert {"2,4,2,384,128", "2,256,2,128", "2,256,384", "2,384,256"} <= stacks
    copied = stacks & set(re.findall(r"= bf16\[([\d,]+)\]\S* copy\(", done.stdout))
    assert copied <= {"2,4,2,1,128"}  # the new tokens


@pytest.fixture(scope="module")
def plain_decode(folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    done = planned(folder, *DECODE, JAX_COMPILATION_CACHE_DIR=str(cache))
    assert (done.returncode, done.stderr) == (0, "")
    assert not [*cache.glob("jit_decode*")]  # could not be read again
    return json.loads(done.stdout)["plans"][0]


DECODE = ("--mode", "decode", "--mesh", "data=4", "tensor=2", "--batch", "8", "--layers", "none", "--json")


@pytest.mark.parametrize(
    ("quantize", "cache", "bits", "operands"),
    [("int8", None, 8, None), ("w8a8", "int8", 8, ("s8", "s8"))],
)
def test_quantized_arrays_take_their_bits_and_no_plain_copy(
    folder, plain_decode, tmp_path, quantize, cache, bits, operands
):
    options = ["--quantize", quantize, *(["--quantize-cache", cache] if cache else [])]
    done = planned(folder, *DECODE, "--hlo", tmp_path / "hlo", *options)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["plans"]
    weights = LAYERS // 2  # cut in two
    scales = 2 * ((512 + 2 * 256 + 2 * 512) // 2 + 2 * 256)  # of all but o and down cut in two
    saved = weights * (2 - bits / 8) - 4 * scales
    vectors = 2 * 2 * 2 * (112 + 144 + 128) if cache else 0  # of a device: keys and values, rows, layers, slots
    saved += vectors * (128 * (2 - bits / 8) - 4)
    assert plain_decode["argument_bytes"] - found["argument_bytes"] == pytest.approx(saved, rel=0.01)
    copy = 2 * (weights + vectors * 128)  # in bfloat16
    assert found["temporary_bytes"] - plain_decode["temporary_bytes"] < 0.25 * copy
    # The matrix unit is given integers: q, k, v, o, gate, up and down, in one loop over the layers.
    text = (tmp_path / "hlo").read_text()
    types = dict(re.findall(r"%(\S+) = (\w+)\[", text))
    products = re.findall(r"= (\w+)\[\S* convolution\(%([^,]+), %([^)]+)\)", text)
    integers = [(types[a], types[b]) for result, a, b in products if result == "s32"]
    assert integers == ([operands] * 7 if operands else [])
    # What devices sum is scaled first.
    assert not re.findall(r"= s32\[\d+,[\d,]+\]\S* all-reduce", text)


@pytest.mark.parametrize("option", ["quantize", "quantize_cache"])
def test_training_is_not_quantized(option):
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} applies to inference only: give --mode prefill"):
        run("v5e:2x4", "llava-1.5-7b", **{option: "int8"})


def test_rows_that_cannot_be_cut(folder):
    done = planned(folder, "--batch", "12")
    assert done.returncode == 2
    assert "a batch of 12 rows is not divisible by 8: choose a multiple of 8" in done.stderr


@pytest.mark.parametrize(
    ("mode", "batch", "fits", "expected"),
    [
        # 128 rows of a training step: four parts fit, whatever the mesh, and eight would be slower.
        (
            "train",
            128,
            lambda job: job.rows / job.grad_accum_steps <= 32,
            [(8, 1, 128, 4), (4, 2, 128, 4), (2, 4, 128, 4)],
        ),
        # As many rows as fit, from the first number that the mesh can cut: the more, the less time for each.
        ("prefill", 4, lambda job: job.rows <= 20, [(8, 1, 16, 1), (4, 2, 16, 1), (2, 4, 16, 1)]),
        ("decode", 4, lambda job: False, []),
        ("train", 8, lambda job: job.rows / job.grad_accum_steps <= 2, [(2, 4, 8, 4)]),
    ],
)
def test_what_fits_is_suggested(mode, batch, fits, expected):
    def compiled(job, sizes):
        return programs.CompiledProgram(job, sizes, report(10 * job.grad_accum_steps + job.rows, fits(job)))

    found = programs.suggest(programs.Program(CONFIG, mode, Bucket(112, (144,)), batch), 8, compiled)
    assert [(x.mesh["fsdp"], x.mesh["tensor"], x.job.rows, x.job.grad_accum_steps) for x in found] == expected


@pytest.mark.parametrize(("fastest", "tried"), [(1, [1, 2]), (4, [1, 2, 4, 8])])
def test_microbatches_are_doubled_while_that_makes_the_step_faster(fastest, tried):
    jobs = []

    def compiled(job, sizes):
        jobs.append(job.grad_accum_steps)
        return programs.CompiledProgram(job, sizes, report(abs(job.grad_accum_steps - fastest), True))

    (found,) = programs.suggest(programs.Program(CONFIG, "train", Bucket(112, (144,)), 16), 1, compiled)
    assert (found.job.grad_accum_steps, jobs) == (fastest, tried)


def test_the_mesh_that_is_fastest_per_row_comes_first():
    def compiled(job, sizes):  # more rows on a mesh of more devices along tensor, and more time
        milliseconds = {1: 80, 2: 96, 4: 256}[sizes["tensor"]]
        return programs.CompiledProgram(job, sizes, report(milliseconds, job.rows <= 8 * sizes["tensor"]))

    found = programs.suggest(programs.Program(CONFIG, "prefill", Bucket(112, (144,)), 8), 8, compiled)
    assert [(x.mesh["tensor"], x.job.rows) for x in found] == [(2, 16), (4, 32), (1, 8)]


def test_a_plan_that_does_not_fit_says_what_to_change(monkeypatch, capsys):
    full = hlo.Report(0, 0, 0, 0, 16 * 2**30, 3 * 2**29, {}, 1.0)
    monkeypatch.setattr(topology, "devices_of", lambda topology: [None] * 8)
    monkeypatch.setattr(programs, "compile_program", lambda job, *_: programs.CompiledProgram(job, {"fsdp": 8}, full))
    run("v5e:2x4", "llava-next-7b", bucket=(128, 2880))
    said = capsys.readouterr().out
    assert "no: 1.50 GiB over 16.00 GiB" in said
    assert "try more microbatches (--grad-accum-steps), more devices along fsdp, a larger slice, or --suggest" in said
