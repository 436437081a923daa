"""Imports run one way and in no circles, torch is never imported, and no module is over 350 lines."""

import ast
import graphlib
import itertools
import pathlib
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = {"pdrop_jax": "pdrop_jax", "train": "pdrop_jax.train", "convert": "pdrop_jax.convert"}  # folder -> package

# What each package may import besides itself. A module belongs to the longest listed prefix of its name.
READING = {"pdrop_jax.errors", "pdrop_jax.io", "pdrop_jax.paths", "pdrop_jax.schema"}
CONFIG = {"pdrop_jax.config", "pdrop_jax.text_config", "pdrop_jax.vision_config", "pdrop_jax.families.*.config"}
BASE = READING | CONFIG | {"pdrop_jax.schedule", "pdrop_jax.batch"}
MODEL = BASE | {"pdrop_jax.sharding", "pdrop_jax.model"}
LIBRARY = MODEL | {"pdrop_jax.checkpoint", "pdrop_jax.inputs", "pdrop_jax.generation"}
APPLICATIONS = {"pdrop_jax.analysis", "pdrop_jax.eval", "pdrop_jax.parity", "pdrop_jax.train", "pdrop_jax.convert"}
MAY_IMPORT = {
    "pdrop_jax": LIBRARY | {"pdrop_jax.analysis", "pdrop_jax.compilation_cache"},
    "pdrop_jax.errors": set(),
    "pdrop_jax.io": {"pdrop_jax.errors", "pdrop_jax.paths"},
    "pdrop_jax.paths": {"pdrop_jax.errors"},
    "pdrop_jax.schema": {"pdrop_jax.errors"},
    "pdrop_jax.cache_folder": set(),
    "pdrop_jax.without_torch": set(),
    "pdrop_jax.compilation_cache": {"pdrop_jax.cache_folder", "pdrop_jax.errors"},
    "pdrop_jax.batch": set(),
    "pdrop_jax.schedule": READING | {"pdrop_jax.batch"},
    "pdrop_jax.text_config": READING,
    "pdrop_jax.vision_config": READING,
    "pdrop_jax.config": READING | CONFIG | {"pdrop_jax.schedule"},
    "pdrop_jax.sharding": BASE,
    "pdrop_jax.model": MODEL | {"pdrop_jax.families.*.params", "pdrop_jax.families.*.tower"},
    "pdrop_jax.inputs": BASE | {"pdrop_jax.families.*.inputs", "pdrop_jax.without_torch"},
    "pdrop_jax.checkpoint": MODEL,
    "pdrop_jax.generation": LIBRARY | {"pdrop_jax.compilation_cache"},
    "pdrop_jax.eval": LIBRARY | {"pdrop_jax.convert"},
    "pdrop_jax.analysis": LIBRARY | {"pdrop_jax.eval"},
    "pdrop_jax.parity": LIBRARY,
    "pdrop_jax.train": LIBRARY
    | {"pdrop_jax.analysis", "pdrop_jax.compilation_cache", "pdrop_jax.eval", "pdrop_jax.without_torch"},
    "pdrop_jax.convert": LIBRARY | {"pdrop_jax.cache_folder", "pdrop_jax.families.*.checkpoint"},
    # A family stands together in one folder, but each of its files belongs to one part of the project: * is its name.
    "pdrop_jax.families": set(),
    "pdrop_jax.families.*.config": READING | {"pdrop_jax.text_config", "pdrop_jax.vision_config"},
    "pdrop_jax.families.*.params": MODEL,
    "pdrop_jax.families.*.tower": MODEL,
    "pdrop_jax.families.*.inputs": BASE | {"pdrop_jax.inputs"},
    "pdrop_jax.families.*.checkpoint": LIBRARY | {"pdrop_jax.convert", "pdrop_jax.families.*.inputs"},
    "pdrop_jax.serve": LIBRARY | {"pdrop_jax.analysis", "pdrop_jax.compilation_cache"},
    "pdrop_jax.planner": LIBRARY | {"pdrop_jax.analysis", "pdrop_jax.train"},
    "pdrop_jax.cli": LIBRARY
    | APPLICATIONS
    | {"pdrop_jax.compilation_cache", "pdrop_jax.planner", "pdrop_jax.serve", "pdrop_jax.without_torch"},
}


def modules():
    """Dotted name -> file of every module of the installed package."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(node, top_level):
    """Every statement below ``node`` that runs; with ``top_level`` only those that run on import."""
    for child in ast.iter_child_nodes(node):
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if is_type_checking(child) or (inside and top_level):
            continue
        yield child
        yield from statements(child, top_level)


def imports(name, top_level):
    """Names that module ``name`` imports; ``from a import b`` gives ``a.b``."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in statements(ast.parse(path.read_text()), top_level):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def own_module(name):
    """The module of ours that an imported name lives in, or None."""
    prefixes = itertools.accumulate(name.split("."), "{}.{}".format)
    return max((prefix for prefix in prefixes if prefix in MODULES), key=len, default=None)


def package_of(module):
    parts = module.split(".")
    if parts[1:2] == ["families"] and len(parts) > 3:
        module = ".".join([*parts[:2], "*", *parts[3:]])
    return max((r for r in MAY_IMPORT if module == r or module.startswith(r + ".")), key=len)


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    used = {package_of(module) for module in map(own_module, imports(name, top_level=False)) if module}
    assert used - {package_of(name)} <= MAY_IMPORT[package_of(name)]


def test_every_package_is_named_here():
    top = {name for name in MODULES if name.count(".") == 1}
    assert top <= set(MAY_IMPORT)


def test_imports_have_no_circle():
    graph = {name: {own_module(used) for used in imports(name, top_level=True)} - {None} for name in MODULES}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_torch_is_never_imported_with_a_module(name):
    assert not {used.split(".")[0] for used in imports(name, top_level=True)} & {"torch", "torchvision"}


def test_the_model_imports_no_transformers():
    used = {u.split(".")[0] for name in MODULES if package_of(name) == "pdrop_jax.model" for u in imports(name, False)}
    assert "transformers" not in used


def test_inputs_make_no_jax_calls():
    host = ("pdrop_jax.inputs", "pdrop_jax.families.*.inputs")
    used = {u.split(".")[0] for name in MODULES if package_of(name) in host for u in imports(name, False)}
    assert "jax" not in used


@pytest.mark.parametrize("module", ["pdrop_jax.generation.chat", "pdrop_jax.cli", "pdrop_jax.convert"])
def test_the_library_imports_where_torch_is_not_installed(module):
    code = f"import sys; sys.modules['torch'] = None; import {module}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", MODULES)
def test_no_module_outgrows_its_package_of(name):
    assert len(MODULES[name].read_text().splitlines()) <= 350


def test_every_package_is_installed():
    """setuptools does not find the folders outside of pdrop_jax/ by itself, so pyproject.toml names all of them."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = [
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("__init__.py")
    ]
    assert sorted(named) == sorted(found)
