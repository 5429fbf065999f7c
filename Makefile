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

.PHONY: help setup demo train-sft evaluate demo-model test lint format type bench clean

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

demo: train-sft  ## the whole method on the embedded demo: levels, SFT, evaluation

ifdef CONFIG
train-sft: $(SETUP)  ## stage 1 on the demo, or on CONFIG=
	$(CLI) fit --config $(CONFIG) $(ARGS)
else
train-sft: $(SETUP) runs/levels.json
	$(CLI) fit --config configs/sft.yaml $(ARGS)
	$(CLI) fit --config configs/sft.yaml --config configs/levels/linear.yaml --trainer.default_root_dir runs/sft-linear $(ARGS)
	$(CLI) test --config configs/eval/demo.yaml
endif

runs/levels.json: src/vlm_calibration/demo/model/model.safetensors configs/levels.yaml | $(SETUP)
	$(CLI) levels fit --config configs/levels.yaml

evaluate: $(SETUP)  ## base model against the adapters on the demo's test split
	$(CLI) test --config configs/eval/demo.yaml $(ARGS)

demo-model: $(SETUP)  ## rebuild the shipped demo model (about half an hour)
	$(PYTHON) -m vlm_calibration.demo.recipe $(ARGS)

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
	rm -rf runs/sft runs/sft-linear runs/eval runs/levels runs/levels.json runs/bench .pytest_cache .mypy_cache .ruff_cache .hypothesis
