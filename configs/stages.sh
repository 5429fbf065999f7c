#!/usr/bin/env bash
# The stages of a calibration, and the command line of each. This is the one place where the variables that `make` and the SLURM jobs
# share become settings: configs/slurm/submit.sh and configs/slurm/job.sh source this file. Run by itself, it runs stages on this machine:
#   MODEL=qwen2_5_vl_7b DATA=jsonl DATA_ROOT=my_data configs/stages.sh [regions] [levels] [sft] [dpo] [evaluate] [report]
# Without variables all is the embedded demo.
#
#   MODEL      base model: the name of a file in configs/model, e.g. qwen2_5_vl_7b, or a file of your own. Of several, a later one
#              overrides an earlier one: MODEL="qwen2_5_vl_7b qlora"
#   DATA       where queries come from: the same with configs/data, e.g. jsonl
#   DATA_ROOT  folder of the data; default: data
#   PRESET     the same with configs/experiment; default: anchored with MODEL= or DATA=. In stage dpo NAME_dpo follows NAME if it exists
#   TRAINER    the same with configs/trainer, e.g. ddp
#   RUN        name of the calibration: its run directories are runs/RUN/STAGE. With a slash, RUN is the folder itself
#   CONFIG     configuration of a single stage, instead of the stage's own
#   ARGS       further settings of every stage but report; SFT_ARGS, DPO_ARGS, ...: of one stage. --overwrite replaces earlier results
#   EVALUATED  runs to evaluate beside the base model; default: sft and dpo, if they have an adapter
#   PARTS      jobs that share the queries of stage regions; default: 1. PART: the number of this one, from 0
#   PYTHON     interpreter; default: .venv/bin/python, else `python` of the active (conda) environment
#
# A stage that has finished with the same settings says so; one that was interrupted resumes (--resume).

fail() { echo "${0##*/}: $*" >&2; exit 1; }

# Split $1 into the array `words`, with the quoting rules of a shell.
split_words() {
    local lines
    lines=$(xargs -r -n 1 printf '%s\n' <<< "$1") || fail "cannot split into words (unmatched quote?): $1"
    words=()
    [[ -z $lines ]] || mapfile -t words <<< "$lines"
}

# own: 1 if the model or the data are not the demo's. runs: folder of the run directories.
own=${MODEL:+1}${DATA:+1} runs=runs${RUN:+/$RUN}
[[ ${RUN:-} != */* ]] || runs=${RUN%/}
python=${PYTHON:-.venv/bin/python}
[[ ${PYTHON:-} || -x $python ]] || python=python
# What a calibration consists of, in order.
default_stages=(${DATA:+regions} ${own:+levels} sft dpo evaluate report)

# add_overlays VARIABLE FOLDER NAMES STAGE: add the files that NAMES, the value of VARIABLE, stands for to `arguments`.
add_overlays() {
    local name file words
    split_words "$3"
    for name in "${words[@]}"; do
        file=$name
        [[ -f $file ]] || file=configs/$2/$name.yaml
        [[ -f $file ]] || fail "$1=$name: there is neither such a file nor $file"
        arguments+=(--config "$file")
        # A preset's settings of stage 2.
        file=${file%.yaml}_dpo.yaml
        [[ $1$4 != PRESETdpo || ! -f $file ]] || arguments+=(--config "$file")
    done
}

# Add the adapters to evaluate to `arguments`; without one, the base model of the demo, since adapters name theirs.
add_adapters() {
    local name json="" words
    split_words "${EVALUATED:-}"
    for name in sft dpo; do
        [[ ${EVALUATED:-} || ! -d $runs/$name/adapter ]] || words+=("$name")
    done
    for name in "${words[@]}"; do json+=", \"$name\": \"$runs/$name/adapter\""; done
    arguments+=(--model.init_args.adapters "{${json#, }}")
    [[ $json || $own ]] || arguments+=(--model.init_args.base.name_or_path src/vlm_calibration/demo/model)
}

# Fail if the variables and these settings of a stage contradict each other.
check_settings() {
    local stage=$1 settings=" ${*:2} "
    [[ ! ${DATA_ROOT:-} || ${DATA:-} ]] || fail "DATA_ROOT=$DATA_ROOT without DATA=: name the kind of the data there, e.g. DATA=jsonl"
    [[ ! ${DATA_ROOT:-} || -d $DATA_ROOT ]] || fail "DATA_ROOT=$DATA_ROOT: there is no such folder"
    [[ ! ${DATA:-} || ${MODEL:-}${CONFIG:-} || $stage != @(levels|sft|dpo) || $settings == *" --model.init_args.base"* ]] ||
        fail "MODEL= is not set, so $stage would use the demo's model with DATA=$DATA: name one of configs/model, e.g. MODEL=qwen2_5_vl_7b"
    [[ $settings != *" --trainer.default_root_dir"* ]] || fail "the run directory of $stage is $run: RUN= chooses another"
}

# stage_arguments STAGE: set `arguments` to the stage's command line and `run` to its run directory.
stage_arguments() {
    local stage=$1 config=configs/$1.yaml further=${1^^}_ARGS words
    run=$runs/$stage
    [[ $stage != @(evaluate|report) ]] || run=$runs/eval
    case $stage in
        regions) arguments=(predict) ;;
        levels) arguments=(levels fit) ;;
        sft | dpo) arguments=(fit) ;;
        evaluate)
            arguments=(test) config=configs/eval/demo.yaml
            [[ ! ${DATA:-} ]] || config=configs/eval/jsonl.yaml
            ;;
        report)
            split_words "${!further:-}"
            arguments=(report "$run" "${words[@]}")
            return
            ;;
        *) fail "no stage $stage: expected regions, levels, sft, dpo, evaluate or report" ;;
    esac
    arguments+=(--config "${CONFIG:-$config}")
    add_overlays MODEL model "${MODEL:-}" "$stage"
    add_overlays DATA data "${DATA:-}" "$stage"
    add_overlays PRESET experiment "${PRESET:-${own:+anchored}}" "$stage"
    add_overlays TRAINER trainer "${TRAINER:-}" "$stage"
    arguments+=(${DATA_ROOT:+--data-root "$DATA_ROOT"} --runs "$runs")
    if [[ $stage == regions ]]; then
        (( ${PART:-0} < ${PARTS:-1} )) || fail "part ${PART:-0} of PARTS=${PARTS:-1}: parts are counted from 0"
        (( ${PARTS:-1} == 1 )) || arguments+=(--data.parts "$PARTS" --data.part "${PART:-0}")
    elif [[ -d $runs/regions ]]; then
        arguments+=(--data.regions "$runs/regions")
    fi
    [[ $stage != evaluate ]] || add_adapters
    split_words "${ARGS:-} ${!further:-}"
    check_settings "$stage" "${words[@]}"
    # At the end, since a configuration may name another run directory.
    arguments+=("${words[@]}" --trainer.default_root_dir "$run")
    [[ " ${words[*]} " == *" --overwrite "* ]] || arguments+=(--resume)
}

# run_stages [STAGE...]: run stages here, one after the other; by default all that a calibration needs.
run_stages() {
    local stage
    (( $# > 0 )) || set -- "${default_stages[@]}"
    [[ ! ${CONFIG:-} || $# == 1 ]] || fail "CONFIG= is for one stage, not for $*"
    for stage in "$@"; do
        stage_arguments "$stage"
        printf '+ vlm-calibration'; printf ' %q' "${arguments[@]}"; echo
        "$python" -m vlm_calibration.cli "${arguments[@]}"
    done
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -euo pipefail
    cd "$(dirname "$0")/.."
    run_stages "$@"
fi
