PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint format clean

demo: .venv/installed
	rm -rf demo
	$(BIN)/pdrop convert tests/golden/model_mha demo --tokenizer examples/tiny_tokenizer --layers 2 4 6 --ratios 0.5 0.25 0.125
	$(BIN)/pdrop generate --model demo --image tests/golden/img_astronaut_square_small.png --prompt "Who is in the picture?" --max-new-tokens 16 --json

test: .venv/installed-test
	$(BIN)/pytest -n 2 --dist worksteal

lint: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv demo build *.egg-info

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@
