# Everything a person does here, by name. `make help` lists the targets; each does the set-up that it needs.
#
#   PYTHON=...  use this interpreter as it is, without a virtual environment
#   CONFIG=...  configuration of train-sft (default: the embedded demo)
#   ARGS=...    further settings for the command line, e.g. ARGS="--trainer.max_steps 100"

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# Any Python from 3.11 on can build the environment.
BOOTSTRAP ?= python3
VENV := .venv
ifdef PYTHON
  SETUP :=
  DEV :=
else
  PYTHON := $(VENV)/bin/python
  SETUP := $(VENV)/.setup
  DEV := $(VENV)/.setup-dev
endif
CLI := $(PYTHON) -m vlm_calibration.cli
ARGS ?=

export NO_ALBUMENTATIONS_UPDATE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo train-sft evaluate demo-model demo-levels test lint format type bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  %-12s %s\n", $$1, $$2}'

setup: $(SETUP)  ## build the virtual environment, once; again only when the requirements change

$(VENV)/.setup: pyproject.toml
	test -x $(VENV)/bin/python || $(BOOTSTRAP) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.setup-dev: $(VENV)/.setup
	$(VENV)/bin/python -m pip install --quiet --editable '.[demo,dev]'
	touch $@

demo: train-sft  ## the method on the embedded demo: SFT with anchored and linear levels, evaluation

ifdef CONFIG
train-sft: $(SETUP)  ## stage 1 on the demo, or on CONFIG=
	$(CLI) fit --config $(CONFIG) $(ARGS)
else
# Linear levels are trained beside anchored ones, one core each, for the comparison.
train-sft: $(SETUP)
	mkdir -p runs; export OMP_NUM_THREADS=1; \
	$(CLI) fit --config configs/sft.yaml --config configs/levels/linear.yaml $(ARGS) \
	  --trainer.default_root_dir runs/sft-linear > runs/sft-linear.log 2>&1 & linear=$$!; \
	trap "kill $$linear 2> /dev/null || true" EXIT; \
	$(CLI) fit --config configs/sft.yaml $(ARGS); \
	wait $$linear || { cat runs/sft-linear.log; exit 1; }
	$(CLI) test --config configs/eval/demo.yaml
endif

demo-levels: $(SETUP)  ## measure what the demo's anchored levels teach
	$(CLI) levels fit --config configs/levels.yaml --model.init_args.out src/vlm_calibration/demo/levels.json

evaluate: $(SETUP)  ## base model against the adapters on the demo's test split
	$(CLI) test --config configs/eval/demo.yaml $(ARGS)

demo-model: $(SETUP)  ## rebuild the shipped demo model and its levels (about half an hour)
	$(PYTHON) -m vlm_calibration.demo.recipe $(ARGS)
	$(MAKE) --no-print-directory demo-levels

test: $(DEV)  ## the whole test suite
	$(PYTHON) -m pytest $(ARGS)

lint: $(DEV)  ## ruff
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: $(DEV)  ## rewrite the code in the project's format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

type: $(DEV)  ## mypy
	$(PYTHON) -m mypy

bench: $(DEV)  ## every benchmark command, as Markdown tables in runs/bench/
	mkdir -p runs/bench
	for benchmark in perturbation metrics; do \
	  $(PYTHON) -m tests.benchmarks.$$benchmark | tee runs/bench/$$benchmark.md; done

clean:  ## remove caches and the demo's runs, keep the environment
	rm -rf runs/sft runs/sft-linear runs/sft-linear.log runs/eval runs/levels runs/bench .pytest_cache .mypy_cache .ruff_cache .hypothesis
