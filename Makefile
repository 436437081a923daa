PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# Modules are compiled to bytecode when they are first imported; compiling all of them now would take a minute.
# Container images often set this variable, and every process would compile them again.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(PIP) --no-compile --editable

.PHONY: demo install test test-newest lint types docs format clean

demo: .venv/installed
	$(BIN)/pdrop generate --image examples/grid.png --prompt "What is in row 3, column 2?" --picture demo.png --overwrite

test: .venv/installed-test
	$(BIN)/pytest -n 3 --dist worksteal  # on two cores, since many tests wait for processes

# Recorded vectors and the demo on a newer Python, if there is one, with the newest packages.
test-newest:
	.ci/newest

lint: .venv/installed-test types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# train/ and convert/ are installed as pdrop_jax.train and pdrop_jax.convert. mypy and mkdocstrings do not know that, so
# they read the package through links that have the installed layout.
types:
	rm -rf build/types
	mkdir -p build/types/pdrop_jax
	ln -s $(CURDIR)/pdrop_jax/* $(CURDIR)/train $(CURDIR)/convert build/types/pdrop_jax/

docs: .venv/installed-docs types
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: .venv/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv demo.png build *.egg-info

.venv/pip:
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip  # older ones take minutes to choose versions
	touch $@

.venv/installed: pyproject.toml | .venv/pip
	$(INSTALL) .
	touch $@

.venv/installed-test: pyproject.toml | .venv/pip
	$(INSTALL) '.[test]'
	touch $@

.venv/installed-docs: pyproject.toml | .venv/pip
	$(INSTALL) '.[docs]'
	touch $@

# All at once, as CI does: pip builds the package and chooses versions once.
install: pyproject.toml | .venv/pip
	$(INSTALL) '.[test,docs]'
	touch .venv/installed .venv/installed-test .venv/installed-docs
