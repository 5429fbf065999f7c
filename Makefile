# Every task of the project as a target. `make help` lists them; each installs what it needs first.
#
#   PYTHON=...  use this interpreter as it is, without a virtual environment
#   ARGS=...    further arguments of the command, e.g. ARGS="--trainer.max_steps 100"
#
# Your own model and data, instead of the embedded demo, in the targets calibrate, regions, levels, train-sft, train-dpo, evaluate, report and
# slurm-*: see configs/stages.sh for all variables.
#   MODEL=...   a file in configs/model, e.g. MODEL=qwen2_5_vl_7b, or your own
#   DATA=...    a file in configs/data, e.g. DATA=jsonl; DATA_ROOT=...: the folder of the data
#   PRESET=...  a file in configs/experiment (default: anchored); TRAINER=...: a file in configs/trainer, e.g. TRAINER=ddp
#   RUN=...     name of the calibration, whose run directories are in runs/RUN (default: the name of the model)

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# Commands are not printed; `make -n TARGET` lists them.
.SILENT:

# Builds the environment; Python 3.11 or newer.
BOOTSTRAP ?= python3
VENV := .venv
ifdef PYTHON
  SETUP :=
  DEV :=
  DASHBOARD :=
  APP :=
else
  PYTHON := $(VENV)/bin/python
  SETUP := $(VENV)/.setup
  DEV := $(VENV)/.setup-dev
  DASHBOARD := $(VENV)/.setup-dashboard
  APP := $(VENV)/.setup-app
endif
CLI := $(PYTHON) -m vlm_calibration.cli
ARGS ?=

export NO_ALBUMENTATIONS_UPDATE := 1
export TOKENIZERS_PARALLELISM := false
# Training steps on the CPU allocate and free the same large tensors: let glibc keep up to 1 GiB for reuse.
export MALLOC_MMAP_THRESHOLD_ ?= 268435456
export MALLOC_TRIM_THRESHOLD_ ?= 1073741824

# 1 if the variables name a model, data or a configuration of the user's.
OWN := $(strip $(MODEL)$(DATA)$(CONFIG))
# The shell script below turns these variables into the settings of each stage.
ifdef OWN
  export RUN ?= $(basename $(notdir $(firstword $(MODEL))))
endif
export PYTHON

.PHONY: help setup demo calibrate regions levels train-sft train-dpo evaluate report demo-sft demo-dpo demo-model demo-levels demo-figure app dashboard slurm-sft slurm-dpo slurm-all test test-fast lint format type bench bench-gpu clean

help:  ## list the targets
	grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  %-12s %s\n", $$1, $$2}'

setup: $(SETUP)  ## build the virtual environment; again only when pyproject.toml changes

$(VENV)/.setup: pyproject.toml
	echo "set-up: installing into $(VENV), once; this takes minutes"
	test -x $(VENV)/bin/python || $(BOOTSTRAP) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[demo,regions]'
	# Byte-compile the modules and build the font cache now, so that the first run need not.
	$(VENV)/bin/python -c 'from vlm_calibration import quiet; quiet.quiet_libraries(); import vlm_calibration.commands.lightning_cli, wandb, matplotlib.font_manager'
	touch $@

$(VENV)/.setup-dev: $(VENV)/.setup
	$(VENV)/bin/python -m pip install --quiet --editable '.[demo,dev]'
	touch $@

$(VENV)/.setup-dashboard: $(VENV)/.setup
	$(VENV)/bin/python -m pip install --quiet --editable '.[demo,regions,dashboard]'
	touch $@

$(VENV)/.setup-app: $(VENV)/.setup
	$(VENV)/bin/python -m pip install --quiet --editable '.[demo,regions,app]'
	touch $@

demo:  ## the whole method on the embedded demo: both stages, our preset and the paper's, evaluation and report
	$(MAKE) --no-print-directory demo-sft
	$(MAKE) --no-print-directory demo-dpo
	$(MAKE) --no-print-directory evaluate ARGS=
	$(MAKE) --no-print-directory report ARGS="--out runs/demo/report.html" RUNS=runs/eval

regions: $(SETUP)  ## find the regions of the queries that have none
	configs/stages.sh regions

levels: $(SETUP)  ## measure the base model's accuracy by kind and strength of perturbation
	configs/stages.sh levels

# Demo targets overwrite earlier runs in runs/sft, runs/dpo, runs/sft-paper and runs/dpo-paper, unless ARGS= resumes the run or
# moves ours to another directory.
REPLACE_PAPER = $(if $(findstring --ckpt_path,$(ARGS)),,--overwrite)
REPLACE = $(if $(findstring --trainer.default_root_dir,$(ARGS)),,$(REPLACE_PAPER))

# $(call side_by_side,OURS,PAPER,NAME): run two fits in parallel, one core each. The second runs in runs/NAME and prints to
# runs/NAME.log.
define side_by_side
	mkdir -p runs; export OMP_NUM_THREADS=1; \
	$(CLI) fit $(2) $(REPLACE_PAPER) $(ARGS) --trainer.default_root_dir runs/$(3) > runs/$(3).log 2>&1 & paper=$$!; \
	trap "kill $$paper 2> /dev/null || true" EXIT; \
	$(CLI) fit $(1) $(REPLACE) $(ARGS); \
	if kill -0 $$paper 2> /dev/null; then echo "waiting for the paper's preset, see runs/$(3).log"; fi; \
	wait $$paper || { cat runs/$(3).log; exit 1; }
endef

PAPER := --config configs/experiment/paper.yaml
# The paper's stage 2 has no reference model and no drift term, and at our learning rate its answers become unreadable. 3e-5 has the best
# Brier score on the validation scenes among 3e-4, 1e-4 and 3e-5.
PAPER_DPO := $(PAPER) --config configs/experiment/paper_dpo.yaml --model.init_args.optimizer.lr 3.0e-5

demo-sft: $(SETUP)  ## stage 1 on the demo, our preset and the paper's, without evaluation
	$(call side_by_side,--config configs/sft.yaml,--config configs/sft.yaml $(PAPER),sft-paper)

demo-dpo: $(SETUP)  ## stage 2 on the demo, our preset and the paper's, without evaluation
	$(call side_by_side,--config configs/dpo.yaml,--config configs/dpo.yaml $(PAPER_DPO) \
	  --model.init_args.adapter runs/sft-paper/adapter,dpo-paper)

ifdef OWN
calibrate: $(SETUP)  ## all stages on MODEL= and DATA=, from regions to report; finished ones are not repeated (without them: the demo)
	configs/stages.sh

train-sft: $(SETUP)  ## stage 1 on the demo, or on MODEL= and DATA=
	configs/stages.sh sft

train-dpo: $(SETUP)  ## stage 2 on the demo, or on MODEL= and DATA=, from the adapter of stage 1
	configs/stages.sh dpo

evaluate: $(SETUP)  ## compare the base model and the adapters of both stages on the test split of DATA=, or of the demo
	configs/stages.sh evaluate

report: $(SETUP)  ## write report.html about the evaluation
	configs/stages.sh report
else
calibrate: demo

train-sft: $(SETUP)
	$(CLI) fit --config configs/sft.yaml $(REPLACE) $(ARGS)
	$(MAKE) --no-print-directory evaluate EVALUATED="sft" ARGS="$(STATED)"

train-dpo: $(SETUP)
	$(CLI) fit --config configs/dpo.yaml $(REPLACE) $(ARGS)
	$(MAKE) --no-print-directory evaluate EVALUATED="sft dpo" ARGS="$(STATED)"

# Evaluate the stated confidence only: no other estimators, no probes, no recalibration.
STATED := --model.init_args.estimators=[] --model.init_args.probes=[] --data.calibration=null

# Names of the runs to evaluate: by default those demo runs that have an adapter.
EVALUATED ?= $(foreach run,sft-paper dpo-paper sft dpo,$(if $(wildcard runs/$(run)/adapter),$(run)))
ADAPTERS = $(foreach run,$(EVALUATED),"$(run)": "runs/$(run)/adapter"$(comma))
comma := ,
# An adapter names its base model; without adapters, evaluate the demo's.
BASE_ONLY = $(if $(strip $(EVALUATED)),,--model.init_args.base.name_or_path src/vlm_calibration/demo/model)

evaluate: $(SETUP)
	$(CLI) test --config configs/eval/demo.yaml --model.init_args.adapters '{$(ADAPTERS)}' $(BASE_ONLY) $(ARGS)

RUNS ?= runs/eval

report: $(SETUP)
	$(CLI) report $(RUNS) $(ARGS)
endif

ENTITY ?=
PROJECT ?= vlm-calibration

app: $(APP)  ## web page on 127.0.0.1 with the demo's adapters (ARGS="--adapter runs/mine --port 8000")
	$(CLI) app $(ARGS)

dashboard: $(DASHBOARD)  ## create a W&B workspace and report for PROJECT= of ENTITY= (ARGS=--print: only print what they show)
	$(CLI) dashboard $(if $(ENTITY),--entity "$(ENTITY)") --project "$(PROJECT)" $(ARGS)

demo-levels: $(SETUP)  ## measure the demo's anchored levels again
	$(CLI) levels fit --config configs/levels.yaml --overwrite --model.init_args.out src/vlm_calibration/demo/levels.json \
	  --model.init_args.likelihoods src/vlm_calibration/demo/likelihoods.parquet

demo-model: $(SETUP)  ## train the shipped demo model again, and its levels (about half an hour)
	$(PYTHON) -m vlm_calibration.demo.recipe $(ARGS)
	$(MAKE) --no-print-directory demo-levels

demo-figure: $(SETUP)  ## draw the README's figure from the evaluation in runs/eval
	$(PYTHON) -m tests.figures.before_after $(ARGS)

# The headers of configs/stages.sh, configs/slurm/submit.sh and configs/slurm/job.sh list the variables of these targets.
slurm-sft: $(SETUP)  ## submit stage 1 to SLURM, e.g. NODES=2 GPUS=8 TIME=04:00:00 PARTITION=gpu
	configs/slurm/submit.sh sft

slurm-dpo: $(SETUP)  ## submit stage 2 to SLURM, from the adapter of stage 1
	configs/slurm/submit.sh dpo

slurm-all: $(SETUP)  ## submit all stages, or STAGES=, to SLURM, each after the one before
	configs/slurm/submit.sh $(STAGES)

# Two to four test processes; each runs whole files, so that a file's fixtures are set up once.
PYTEST = $(PYTHON) -m pytest -n logical --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

test: $(DEV)  ## the whole test suite
	$(PYTEST) $(ARGS)

test-fast: $(DEV)  ## every module in a few minutes: tests that are not marked slow, slurm or browser
	$(PYTEST) -m "not slow and not slurm and not browser" $(ARGS)

lint: $(DEV)  ## ruff
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: $(DEV)  ## rewrite the code in the project's format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

type: $(DEV)  ## mypy
	$(PYTHON) -m mypy

bench: $(DEV)  ## run every benchmark and write runs/bench/benchmarks.md (hours; one of them: ARGS="--only metrics")
	$(PYTHON) -m tests.performance $(ARGS)

bench-gpu: $(DEV)  ## speed and memory of real sizes on one GPU, with random weights; writes runs/bench/gpu.md (ten minutes)
	$(PYTHON) -m tests.performance.gpu $(ARGS)

clean:  ## remove caches and the demo's runs; keep the environment
	rm -rf runs/sft runs/dpo runs/sft-paper* runs/dpo-paper* runs/eval runs/demo runs/levels runs/bench .pytest_cache .mypy_cache .ruff_cache .hypothesis
