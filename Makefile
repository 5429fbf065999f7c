# Everything a person does here, by name. `make help` lists the targets; each does the set-up that it needs.
#
#   PYTHON=...  use this interpreter as it is, without a virtual environment
#   CONFIG=...  configuration of train-sft and train-dpo (default: the embedded demo)
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
# A step on the CPU takes and gives back the same large tensors as the one before: glibc is to keep them, up to 1 GiB.
export MALLOC_MMAP_THRESHOLD_ ?= 268435456
export MALLOC_TRIM_THRESHOLD_ ?= 1073741824

.PHONY: help setup demo train-sft train-dpo evaluate report demo-sft demo-dpo demo-model demo-levels app dashboard slurm-sft slurm-dpo slurm-all test lint format type bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  %-12s %s\n", $$1, $$2}'

setup: $(SETUP)  ## build the virtual environment, once; again only when the requirements change

$(VENV)/.setup: pyproject.toml
	test -x $(VENV)/bin/python || $(BOOTSTRAP) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[demo,regions]'
	@# What a first run would do once: compile the modules, list the fonts.
	$(VENV)/bin/python -c 'import vlm_calibration.cli.lightning_cli, wandb, matplotlib.font_manager'
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

demo:  ## the whole method on the embedded demo: both stages, ours and the paper's, one table of all and a report
	$(MAKE) --no-print-directory demo-sft
	$(MAKE) --no-print-directory demo-dpo
	$(MAKE) --no-print-directory evaluate ARGS=
	$(MAKE) --no-print-directory report ARGS= RUNS=runs/eval
	mkdir -p runs/demo && cp runs/eval/report.* runs/demo/

# The demo's run directories are its own: a run in them is replaced, unless ARGS= resumes it. Ours may go to another one by ARGS=.
REPLACE_PAPER = $(if $(findstring --ckpt_path,$(ARGS)),,--overwrite)
REPLACE = $(if $(findstring --trainer.default_root_dir,$(ARGS)),,$(REPLACE_PAPER))

# $(call side_by_side,ours,paper): two fits, one core each. The second one's output goes to its log.
define side_by_side
	mkdir -p runs; export OMP_NUM_THREADS=1; \
	$(CLI) fit $(2) $(REPLACE_PAPER) $(ARGS) --trainer.default_root_dir runs/$(3) > runs/$(3).log 2>&1 & paper=$$!; \
	trap "kill $$paper 2> /dev/null || true" EXIT; \
	$(CLI) fit $(1) $(REPLACE) $(ARGS); \
	wait $$paper || { cat runs/$(3).log; exit 1; }
endef

PAPER := --config configs/experiment/paper.yaml
# Nothing holds the paper's stage 2 to where it began: at our learning rate its answers fall apart. Of 3e-4, 1e-4 and 3e-5 this one
# has the best Brier score on the validation scenes.
PAPER_DPO := $(PAPER) --config configs/experiment/paper_dpo.yaml --model.init_args.optimizer.lr 3.0e-5

demo-sft: $(SETUP)  ## stage 1 on the demo, ours and the paper's, without evaluation
	$(call side_by_side,--config configs/sft.yaml,--config configs/sft.yaml $(PAPER),sft-paper)

demo-dpo: $(SETUP)  ## stage 2 on the demo, ours and the paper's, without evaluation
	$(call side_by_side,--config configs/dpo.yaml,--config configs/dpo.yaml $(PAPER_DPO) \
	  --model.init_args.adapter runs/sft-paper/adapter,dpo-paper)

ifdef CONFIG
train-sft: $(SETUP)  ## stage 1 on the demo, or on CONFIG=
	$(CLI) fit --config $(CONFIG) $(ARGS)

train-dpo: $(SETUP)  ## stage 2 on the demo, or on CONFIG=, from the adapter of stage 1
	$(CLI) fit --config $(CONFIG) $(ARGS)
else
# The paper's preset is trained beside ours for the comparison.
train-sft: demo-sft
	$(MAKE) --no-print-directory evaluate EVALUATED="sft-paper sft" ARGS="$(STATED)"

train-dpo: $(SETUP)
	$(CLI) fit --config configs/dpo.yaml $(REPLACE) $(ARGS)
	$(MAKE) --no-print-directory evaluate EVALUATED="sft dpo" ARGS="$(STATED)"
endif

# Confidence as it is stated, without other estimators or recalibration.
STATED := --model.init_args.estimators=[] --data.calibration=null

# Names of runs: by default those of the demo that have been trained.
EVALUATED ?= $(foreach run,sft-paper dpo-paper sft dpo,$(if $(wildcard runs/$(run)/adapter),$(run)))
ADAPTERS = $(foreach run,$(EVALUATED),"$(run)": "runs/$(run)/adapter"$(comma))
comma := ,
# Adapters name their base model; without any there is the demo's.
ALONE = $(if $(strip $(EVALUATED)),,--model.init_args.base.name_or_path src/vlm_calibration/demo/model)

evaluate: $(SETUP)  ## base model against the adapters in EVALUATED= on the demo's test split
	$(CLI) test --config configs/eval/demo.yaml --model.init_args.adapters '{$(ADAPTERS)}' $(ALONE) $(ARGS)

ENTITY ?=
PROJECT ?= vlm-calibration

app: $(APP)  ## the web page on 127.0.0.1, with what was trained on the demo (ARGS="--adapter runs/mine --port 8000")
	$(CLI) app $(ARGS)

dashboard: $(DASHBOARD)  ## workspace and report in W&B for PROJECT= of ENTITY= (ARGS=--print shows them, without a network)
	$(CLI) dashboard --entity "$(ENTITY)" --project "$(PROJECT)" $(ARGS)

RUNS ?= runs/eval

report: $(SETUP)  ## a page on whether confidence can be trusted, of the runs and evaluations in RUNS=
	$(CLI) report $(RUNS) $(ARGS)

demo-levels: $(SETUP)  ## measure what the demo's anchored levels teach
	$(CLI) levels fit --config configs/levels.yaml --model.init_args.out src/vlm_calibration/demo/levels.json

demo-model: $(SETUP)  ## rebuild the shipped demo model and its levels (about half an hour)
	$(PYTHON) -m vlm_calibration.demo.recipe $(ARGS)
	$(MAKE) --no-print-directory demo-levels

# On SLURM. configs/slurm/submit.sh and job.sh list the variables that these heed.
slurm-sft: $(SETUP)  ## submit stage 1 to SLURM, e.g. NODES=2 GPUS=8 TIME=04:00:00 PARTITION=gpu
	$(if $(CONFIG),SFT_CONFIG="$(CONFIG)") configs/slurm/submit.sh sft

slurm-dpo: $(SETUP)  ## submit stage 2 to SLURM, from the adapter of stage 1
	$(if $(CONFIG),DPO_CONFIG="$(CONFIG)") configs/slurm/submit.sh dpo

# All on QUERIES=. The embedded demo has its regions: STAGES="sft dpo evaluate".
STAGES ?= regions sft dpo evaluate
slurm-all: $(SETUP)  ## submit STAGES= (regions sft dpo evaluate) to SLURM, on QUERIES=, each to begin after the one before
	$(if $(CONFIG),$(error CONFIG= is for one stage; here SFT_CONFIG=, DPO_CONFIG=, EVALUATE_CONFIG=, REGIONS_CONFIG=)) \
	configs/slurm/submit.sh $(STAGES)

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

bench: $(DEV)  ## every benchmark, as tables in runs/bench/benchmarks.md (about an hour; ARGS="--only metrics" for one)
	$(PYTHON) -m tests.performance $(ARGS)

clean:  ## remove caches and the demo's runs, keep the environment
	rm -rf runs/sft runs/dpo runs/sft-paper* runs/dpo-paper* runs/eval runs/demo runs/levels runs/bench .pytest_cache .mypy_cache .ruff_cache .hypothesis
