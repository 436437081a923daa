"""Planning for TPUs: the compiler's figures, read; and the command, as a user calls it."""

import json
import subprocess

import pytest
from command import PDROP

from pdrop_jax.analysis import plan
from pdrop_jax.config import LlavaConfig, TextConfig, VisionConfig
from pdrop_jax.errors import UserError
from pdrop_jax.schedule import DropSchedule

CONFIG = LlavaConfig(
    vision=VisionConfig(56, 14, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2),
    text=TextConfig(512, 256, 512, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=128, max_length=512),
    schedule=DropSchedule((1,), (0.5,)),
)
HLO = """
  %all-gather.1 = bf16[8,128]{1,0:T(8,128)(2,1)} all-gather(%p), dimensions={0}
  %ag = (f32[2,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%q), dimensions={0}
  %agd = f32[16,4]{1,0} all-gather-done(%ag), metadata={op_name="all-gather("}
  %reduce = (f32[]{:T(128)}, f32[3]{0}) all-reduce(%a, %b), to_apply=%add
"""


def test_collectives_are_counted():
    found = plan.collectives(HLO)
    assert found["all-gather"] == (2, 8 * 128 * 2 + 16 * 4 * 4)
    assert found["all-reduce"] == (1, 4)
    assert found["all-to-all"] == (0, 0)


def test_what_does_not_fit_says_by_how_much():
    class Full:
        def compile(self):
            raise RuntimeError("RESOURCE_EXHAUSTED: Used 17.25G of 15.75G hbm. Exceeded hbm capacity by 1.50G.\n\nAll")

    report = plan.compile_report(Full, "v5e:2x4")
    assert not report.fits
    assert report.excess_bytes == 1.5 * 2**30

    class Broken:
        def compile(self):
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        plan.compile_report(Broken, "v5e:2x4")


def test_bad_topologies(monkeypatch):
    with pytest.raises(UserError, match="is not of the form v5e:4x8"):
        plan.devices_of("a100:8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'pdrop-jax\[plan\]'"):
        plan.devices_of("v5e:2x4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    CONFIG.save(folder)
    return folder


def planned(folder, *options):
    command = [*PDROP, "plan", folder, "--topology", "v5e:2x4", "--bucket", "112", "144", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_training_step_is_compiled_for_a_slice(folder):
    done = planned(folder, "--mesh", "fsdp=4", "tensor=2", "--batch", "8", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["devices"] == 8
    pyramid, dense = result["PyramidDrop"], result["dense"]
    assert pyramid["fits"]
    assert dense["fits"]
    assert pyramid["macs"] < dense["macs"]
    assert pyramid["argument_bytes"] == pytest.approx(dense["argument_bytes"], rel=0.01)
    # The state is donated: what comes out lies where it went in, but for the metrics.
    assert pyramid["output_bytes"] < 0.01 * pyramid["argument_bytes"]
    assert sum(count for count, _ in pyramid["collectives"].values()) > 0


def test_a_decode_step_needs_no_second_cache(folder):
    done = planned(folder, "--mesh", "data=4", "tensor=2", "--batch", "512", "--mode", "decode", "--no-dense", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)["PyramidDrop"]
    slots = 112 + 144 + 128 + 112 + 72 + 128
    cache = 512 // 4 * slots * 2 * 128 * 2  # of one device: keys and values, one of two heads, bfloat16
    assert report["argument_bytes"] > cache
    assert report["temporary_bytes"] < 0.05 * cache


def test_rows_that_cannot_be_cut(folder):
    done = planned(folder, "--batch", "12")
    assert done.returncode == 2
    assert "12 rows cannot be cut into 8 parts: choose a multiple of 8" in done.stderr
