# Each command sets up .venv first, which takes no time when all is there.
#   make train ARGS="--data ROOT --epochs 50"
#   make test PYTHON=/path/to/python3.12

.PHONY: train test lint coverage bench trace report setup clean

train: setup
	.venv/bin/python -m detr_fast.train --resume auto $(ARGS)

test: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/codespell

coverage: setup
	.venv/bin/pytest -n auto --maxprocesses 4 --dist loadfile --cov $(ARGS)

bench: setup
	.venv/bin/pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-sort=name $(ARGS)

trace: setup
	.venv/bin/python -m detr_profiling trace $(ARGS)

report: setup
	.venv/bin/python -m detr_profiling suite $(ARGS)

setup:
	@./setup.sh

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .benchmarks .coverage
