# make demo | make test | make check | make bench: each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
DEMO := data_shards/demo
RUN := runs/demo

.PHONY: demo test check format bench clean
.DEFAULT_GOAL := demo

# Stamped by the files that decide what is installed, so that a second call costs nothing.
.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'make: seer needs Python 3.11 to 3.13; name one with PYTHON=python3.12' >&2; exit 2; }
	@echo 'setting up .venv (one to three minutes, once)'
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: .venv/ready
	@$(BIN)/python data_shards/make_demo.py $(DEMO)/images
	@$(BIN)/seer shards pack $(DEMO)/images/train --out $(DEMO)/train --labels folders --overwrite
	@$(BIN)/seer shards pack $(DEMO)/images/val --out $(DEMO)/val --labels folders --classes $(DEMO)/train --overwrite
	@rm -rf $(RUN)
	@$(BIN)/seer train experiment=demo run_dir=$(RUN) $(DEMO_OVERRIDES)
	@$(BIN)/seer evaluate knn --run $(RUN) --train '$(DEMO)/train/*.tar' --val '$(DEMO)/val/*.tar' --baselines --picture $(RUN)/neighbours.png --next-steps

test: .venv/ready
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

check: .venv/ready
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: .venv/ready
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: .venv/ready
	@$(BIN)/python benchmarks/bench_step.py
	@$(BIN)/python benchmarks/bench_photometric.py

clean:
	rm -rf .venv runs $(DEMO) build *.egg-info
