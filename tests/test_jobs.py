"""Job files in examples/jobs: what they run exists, and other tools' linters accept them."""

import importlib
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import kubernetes_validate
import pytest
import yaml

from pdrop_jax.cli import parsed
from pdrop_jax.serve.app import create_app
from pdrop_jax.train.recipe import load_recipe

ROOT = pathlib.Path(__file__).parents[1]
JOBS = ROOT / "examples" / "jobs"
SCRIPTS = sorted(JOBS.glob("*.sh"))
IMAGES = sorted(JOBS.glob("Dockerfile.*"))
MANIFESTS = sorted(JOBS.glob("*.yaml"))


def commands():
    """(file, arguments) of each call of pdrop in a script, in what other hosts run for it, or in a manifest."""
    for path in SCRIPTS:
        for line in path.read_text().replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for call in (words, *map(shlex.split, words)):
                programs = [n for n, word in enumerate(call) if word in ("pdrop", "venv/bin/pdrop")]
                if programs and len(call) > programs[0] + 1:
                    yield path.name, call[programs[0] + 1 :]
    for path in MANIFESTS:
        for container in containers(path):
            program, *arguments = container["command"]
            assert program == "pdrop"
            yield path.name, arguments


def containers(path):
    for manifest in yaml.safe_load_all(path.read_text()):
        spec = manifest["spec"]
        for job in spec.get("replicatedJobs", ()):
            yield from job["template"]["spec"]["template"]["spec"]["containers"]
        if manifest["kind"] == "Deployment":
            yield from spec["template"]["spec"]["containers"]


def test_every_command_is_one_of_ours_with_options_and_settings_that_exist(monkeypatch):
    calls = list(commands())
    assert {name for name, _ in calls} == {path.name for path in (*SCRIPTS, *MANIFESTS)}
    for _, (command, *arguments) in calls:
        call = parsed(importlib.import_module(f"pdrop_jax.cli.{command}").run, f"pdrop {command}", arguments)
        if command == "train":
            recipe = load_recipe(*call.args, call.keywords.get("settings", ())) if call.args else None
            recipe = recipe or load_recipe(call.keywords["recipe"], call.keywords["settings"])
            assert recipe.run.grad_accum_steps == 1


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert path.stat().st_mode & 0o100


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_images_pass_hadolint_and_install_extras_that_exist(path):
    subprocess.run([pathlib.Path(sys.executable).with_name("hadolint"), path], check=True)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (wanted,) = re.findall(r"'\.\[([\w,]+)\]'", path.read_text())
    assert set(wanted.split(",")) <= extras.keys()
    assert 'ENTRYPOINT ["pdrop"]' in path.read_text()


def test_the_jobs_of_a_slice_are_valid():
    """JobSet is not part of Kubernetes' own schemas; the jobs in it are."""
    path = JOBS / "jobset.yaml"
    for manifest in yaml.safe_load_all(path.read_text()):
        assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
        for job in manifest["spec"]["replicatedJobs"]:
            whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
            kubernetes_validate.validate(whole, "1.34", strict=True)
            # One process a host, and as many hosts as the slice has.
            spec = job["template"]["spec"]
            rows, columns = spec["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
            chips = sum(int(each["resources"]["limits"]["google.com/tpu"]) for each in containers(path))
            assert spec["parallelism"] == spec["completions"] == int(rows) * int(columns) // chips


def test_the_servers_replicas_are_valid_and_reached_by_their_service():
    path = JOBS / "serve.yaml"
    manifests = {each["kind"]: each for each in yaml.safe_load_all(path.read_text())}
    for each in manifests.values():
        kubernetes_validate.validate(each, "1.34", strict=True)
    (container,) = containers(path)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    for kind in ("Service", "PodDisruptionBudget"):
        selector = manifests[kind]["spec"]["selector"]
        assert labels >= selector.get("matchLabels", selector).items()
    assert {port["targetPort"] for port in manifests["Service"]["spec"]["ports"]} <= ports.keys()
    routes = {getattr(route, "path", None) for route in create_app(None).routes}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        ask = container[probe]["httpGet"]
        assert ask["path"] in routes
        assert ports[ask["port"]] == 8000  # the port of `pdrop serve`, which the command does not change
    assert "--port" not in container["command"]
    assert {"name": "PDROP_API_KEY"}.items() <= container["env"][0].items()
