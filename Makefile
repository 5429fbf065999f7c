# Every task of the project as a target. `make help` lists them; each installs what it needs first.
#
#   PYTHON=...  use this interpreter as it is, without a virtual environment
#   ARGS=...    further arguments of the command, e.g. ARGS="--trainer.max_steps 100"
#
# What calibrate, regions, levels, train-sft, train-dpo, evaluate, report and slurm-* run on, instead of the embedded demo:
#   MODEL=...   base model: a preset of configs/model, e.g. qwen2_5_vl_7b, or a file; of several, later ones override earlier ones
#   DATA=...    where queries come from: the same with configs/data, e.g. jsonl; DATA_ROOT=...: the folder of the data
#   PRESET=...  the same with configs/experiment (default: anchored, or the demo's own settings)
#   TRAINER=... the same with configs/trainer, e.g. ddp
#   RUN=...     name of the calibration: its run directories are in runs/RUN (default: the name of the model, or runs itself); with a
#               slash, the folder itself
#   CONFIG=...  configuration of a single stage, instead of the stage's own
# A target refuses a variable that it does not use.

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

ifeq ($(MODEL),)
# The demo's matrices are small: one thread trains a quarter faster than two that wait for each other.
export OMP_NUM_THREADS ?= 1
endif

# Target -> the variables that it uses.
STAGE := MODEL DATA DATA_ROOT PRESET TRAINER RUN ARGS
JOB := NODES GPUS GPU_TYPE TASKS CPUS TIME LEAD PARTITION ACCOUNT QOS MEM OPTIONS PARTS WAIT OFFLINE
$(foreach target,calibrate report,$(eval USED_$(target) := $(STAGE)))
$(foreach target,regions levels train-sft train-dpo evaluate,$(eval USED_$(target) := $(STAGE) CONFIG))
$(foreach target,slurm-sft slurm-dpo,$(eval USED_$(target) := $(STAGE) CONFIG $(JOB)))
$(foreach target,demo demo-paper demo-model demo-figure app test test-fast test-all bench bench-gpu,$(eval USED_$(target) := ARGS))
USED_slurm-all := $(STAGE) STAGES $(JOB)
USED_dashboard := ENTITY PROJECT ARGS
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command line,$(origin $(name))),$(name)))
$(foreach target,$(MAKECMDGOALS),$(foreach name,$(filter-out PYTHON BOOTSTRAP $(USED_$(target)),$(GIVEN)),\
  $(error make $(target) does not use $(name)=; it uses $(or $(USED_$(target)),no variable))))

# The arguments of `calibrate` for these variables.
OWN := $(strip $(MODEL)$(DATA)$(CONFIG))
RUN ?= $(basename $(notdir $(firstword $(MODEL))))
RUNS := $(if $(findstring /,$(RUN)),$(RUN),$(if $(RUN),runs/$(RUN),runs))
# The demo's own runs are replaced, unless ARGS= resumes them.
REPLACED := $(if $(OWN)$(RUN)$(findstring --resume,$(ARGS))$(findstring --ckpt_path,$(ARGS)),,--overwrite)
CALIBRATION = $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)") $(if $(DATA_ROOT),--data-root "$(DATA_ROOT)") \
  $(if $(PRESET),--preset "$(PRESET)") $(if $(TRAINER),--trainer "$(TRAINER)") $(if $(CONFIG),--config "$(CONFIG)") \
  --runs "$(RUNS)" $(REPLACED)

.PHONY: help setup demo demo-paper calibrate regions levels train-sft train-dpo evaluate report demo-model demo-levels demo-figure app \
  dashboard slurm-sft slurm-dpo slurm-all test test-fast test-all lint format type bench bench-gpu clean

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

# With a further extra: dev, app or dashboard.
$(VENV)/.setup-%: $(VENV)/.setup
	$(VENV)/bin/python -m pip install --quiet --editable '.[demo,regions,$*]'
	touch $@

# Stage 1 with two thirds of its preset's scenes, on smaller batches; stage 2 with three quarters of them (tests/demo/README.md). The
# evaluation measures more than validations would, and answers in two processes.
DEMO := --sft.data.train.init_args.scenes 3400 --sft.data.batch_size 8 --sft.trainer.limit_val_batches 0 \
  --dpo.data.train.init_args.scenes 1572 --dpo.trainer.limit_val_batches 0 --dpo.trainer.num_sanity_val_steps 0

IN_TWO := --evaluate.trainer.accelerator cpu --evaluate.trainer.devices 2 --evaluate.trainer.strategy ddp_fork

demo: $(SETUP)  ## the whole method on the embedded demo: both stages, evaluation and report
	$(CLI) calibrate sft dpo evaluate report --overwrite $(DEMO) $(IN_TWO) --report.out runs/demo/report.html $(ARGS)

# The paper's stage 2 has no reference model and no drift term, and at our learning rate its answers become unreadable. 3e-5 has the best
# Brier score on the validation scenes among 3e-4, 1e-4 and 3e-5.
demo-paper: $(SETUP)  ## the demo with the paper's preset, the oracle and further estimators beside it
	$(CLI) calibrate sft dpo $(DEMO) $(ARGS)
	$(CLI) calibrate sft dpo $(DEMO) --preset paper --runs runs/paper --dpo.model.init_args.optimizer.lr 3.0e-5 $(ARGS)
	$(CLI) calibrate evaluate report --overwrite --runs runs/paper --evaluate.config eval/demo_estimators --evaluate.model.init_args.adapters \
	  '{"sft-paper": "runs/paper/sft/adapter", "dpo-paper": "runs/paper/dpo/adapter", "sft": "runs/sft/adapter", "dpo": "runs/dpo/adapter"}'

ifneq ($(filter-out ARGS,$(filter $(STAGE),$(GIVEN))),)
calibrate: $(SETUP)  ## all stages on MODEL= and DATA=, from regions to report; finished ones are not repeated (without them: the demo)
	$(CLI) calibrate $(CALIBRATION) $(ARGS)
else
calibrate: demo
endif

regions: $(SETUP)  ## find the regions of the queries that have none
	$(CLI) calibrate regions $(CALIBRATION) $(ARGS)

levels: $(SETUP)  ## measure the base model's accuracy by kind and strength of perturbation
	$(CLI) calibrate levels $(CALIBRATION) $(ARGS)

train-sft: $(SETUP)  ## stage 1 on the demo, or on MODEL= and DATA=
	$(CLI) calibrate sft $(CALIBRATION) $(ARGS)
	$(if $(OWN),,$(CLI) calibrate evaluate report $(CALIBRATION) --model.init_args.adapters '{"sft": "$(RUNS)/sft/adapter"}')

train-dpo: $(SETUP)  ## stage 2 on the demo, or on MODEL= and DATA=, from the adapter of stage 1
	$(CLI) calibrate dpo $(CALIBRATION) $(ARGS)
	$(if $(OWN),,$(CLI) calibrate evaluate report $(CALIBRATION))

evaluate: $(SETUP)  ## compare the base model and the adapters of both stages on the test split of DATA=, or of the demo
	$(CLI) calibrate evaluate $(CALIBRATION) $(ARGS)

report: $(SETUP)  ## write report.html about the evaluation
	$(CLI) calibrate report $(CALIBRATION) $(ARGS)

ENTITY ?=
PROJECT ?= vlm-calibration

app: $(APP)  ## web page on 127.0.0.1 with the demo's adapters (ARGS="--adapter runs/mine --port 8000")
	$(CLI) app $(ARGS)

dashboard: $(DASHBOARD)  ## create a W&B workspace and report for PROJECT= of ENTITY= (ARGS=--print: only print what they show)
	$(CLI) dashboard $(if $(ENTITY),--entity "$(ENTITY)") --project "$(PROJECT)" $(ARGS)

DEMO_LEVELS := $(CLI) levels fit --config configs/levels.yaml --overwrite --model.init_args.out src/vlm_calibration/demo/levels.json \
  --model.init_args.likelihoods src/vlm_calibration/demo/likelihoods.parquet

demo-levels: $(SETUP)  ## measure the demo's anchored levels again
	$(DEMO_LEVELS)

demo-model: $(SETUP)  ## train the shipped demo model again, and its levels (about half an hour)
	$(PYTHON) -m tests.demo.recipe $(ARGS)
	$(DEMO_LEVELS)

demo-figure: $(SETUP)  ## draw the README's figure from what demo_seeds --test wrote
	$(PYTHON) -m tests.figures.before_after $(ARGS)

# The headers of configs/slurm/submit.sh and configs/slurm/job.sbatch list the variables of these targets.
$(foreach name,$(JOB),$(if $($(name)),$(eval export $(name))))

slurm-sft: $(SETUP)  ## submit stage 1 to SLURM, e.g. NODES=2 GPUS=8 TIME=04:00:00 PARTITION=gpu
	PYTHON="$(PYTHON)" configs/slurm/submit.sh sft $(CALIBRATION) $(ARGS)

slurm-dpo: $(SETUP)  ## submit stage 2 to SLURM, from the adapter of stage 1
	PYTHON="$(PYTHON)" configs/slurm/submit.sh dpo $(CALIBRATION) $(ARGS)

slurm-all: $(SETUP)  ## submit all stages, or STAGES=, to SLURM, each after the one before
	PYTHON="$(PYTHON)" configs/slurm/submit.sh $(STAGES) $(CALIBRATION) $(ARGS)

# Two to four test processes; each runs whole files, so that a file's fixtures are set up once.
PYTEST = $(PYTHON) -m pytest -n logical --maxprocesses 4 --dist loadscope --no-loadscope-reorder

test: $(DEV)  ## the test suite; test-all adds what is marked `nightly`
	$(PYTEST) -m "not nightly" $(ARGS)

test-fast: $(DEV)  ## every module in a few minutes: tests that are neither slow nor nightly
	$(PYTEST) -m "not slow and not nightly" $(ARGS)

test-all: $(DEV)  ## every test; the nightly ones start clusters, browsers, notebooks, servers and environments
	$(PYTEST) $(ARGS)

lint: $(DEV)  ## ruff
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: $(DEV)  ## rewrite the code in the project's format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

type: $(DEV)  ## mypy
	$(PYTHON) -m mypy

bench: $(DEV)  ## run every benchmark and write runs/bench/benchmarks.md (hours; one of them: ARGS="--only thresholds")
	$(PYTHON) -m tests.performance $(ARGS)

bench-gpu: $(DEV)  ## speed and memory of real sizes on one GPU, with random weights; writes runs/bench/gpu.md (ten minutes)
	$(PYTHON) -m tests.performance.gpu $(ARGS)

clean:  ## remove caches and the demo's runs; keep the environment
	rm -rf runs/sft runs/dpo runs/paper runs/eval runs/demo runs/levels runs/bench .pytest_cache .mypy_cache .ruff_cache .hypothesis
