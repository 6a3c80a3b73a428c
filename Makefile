# Each command sets up .venv first, which takes no time when all is there.
#   make train ARGS="--data ROOT --epochs 50"
#   make test PYTHON=/path/to/python3.12

OUT ?= runs/profile

.PHONY: train accuracy test lint coverage bench trace report setup clean

train: setup
	.venv/bin/python -m detr_fast.train --resume auto $(ARGS)

test: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/codespell

coverage: setup
	.venv/bin/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --cov $(ARGS)

# Hours: python -m detr_profiling accuracy --help says of what.
accuracy: setup
	.venv/bin/python -m detr_profiling accuracy $(ARGS)

bench: setup
	.venv/bin/pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-sort=name $(ARGS)

trace: setup
	.venv/bin/python -m detr_profiling trace $(ARGS)

# Parity, ladder, trace and one page of them all, in 8 minutes. Each part writes as it goes, and one that fails or runs out
# of time keeps no other from running.
report: setup
	@code=0; profile=".venv/bin/python -m detr_profiling"; \
	part() { \
	    timeout --foreground --kill-after=10 "$$@"; ended=$$?; \
	    if [ $$ended = 124 ]; then echo "$$5: stopped after $$1 s"; elif [ $$ended != 0 ]; then code=1; fi; \
	}; \
	part 150 $$profile parity --output "$(OUT)" --compile $(ARGS); \
	part 260 $$profile ladder --output "$(OUT)" --minutes 4 $(ARGS); \
	part 70 $$profile trace --output "$(OUT)" $(ARGS); \
	$$profile report --output "$(OUT)" && exit $$code

setup:
	@./setup.sh

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .benchmarks .coverage
