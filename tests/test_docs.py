"""The README and the documentation site say what is true: examples run, links, commands and options exist."""

import ast
import importlib
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(program):
    """(page, arguments) of every call of ``program`` in the pages' shell blocks."""
    found = []
    for page, name in zip(PAGES, NAMES, strict=True):
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if program in words[:3]:
                    found.append((name, words[words.index(program) + 1 :]))
    return found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]
            assert anchor in slugs, target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_blocks_use_what_exists(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pdrop_jax":
                assert hasattr(importlib.import_module("pdrop_jax"), node.attr), node.attr
            if isinstance(node, ast.ImportFrom):
                assert all(hasattr(importlib.import_module(node.module), name.name) for name in node.names)


def test_the_first_example_prints_what_it_says(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    example = blocks(ROOT / "README.md", "python")[0]
    exec(compile(example, "README.md", "exec"), {})
    promised = re.findall(r"^print\(.*?\)  # (?:.*: )?(\[.*\])$", example, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == promised
    assert len(promised) == 2


def test_the_options_of_every_pdrop_command_exist():
    help_of = {}
    for page, words in commands("pdrop"):
        if words[0] not in help_of:
            call = [sys.executable, "-c", "from pdrop_jax.cli import main; main()", words[0], "--help"]
            help_of[words[0]] = subprocess.run(call, capture_output=True, text=True, check=True).stdout
        for option in (word for word in words[1:] if word.startswith("--")):
            assert re.search(rf"{option}\b", help_of[words[0]]), f"{page}: pdrop {words[0]} {option}"
    assert {"generate", "convert", "export", "train", "plan", "eval", "score", "cost", "study"} <= set(help_of)


def test_every_module_that_is_run_exists():
    calls = {module for page in PAGES for module in re.findall(r"python -m ([\w.]+)", page.read_text())}
    ours = {module for module in calls if module.startswith(("benchmarks.", "examples."))}
    assert all((ROOT / f"{module.replace('.', '/')}.py").exists() for module in ours), ours
    assert len(ours) >= 10


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    for page, words in commands("make"):
        assert re.search(rf"^{words[0]}:", makefile, re.MULTILINE), f"{page}: make {words[0]}"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs')}" in navigation, page
