#!/usr/bin/env bash
# Submits stages to SLURM, each to begin when the one before has succeeded: configs/slurm/submit.sh [regions] [sft] [dpo] [evaluate]
# Run from the root of a checkout, with these variables and those that job.sh lists:
#
#   NODES      default: 1
#   GPUS       of each node, and so processes; default: 1. 0: on the CPU
#   GPU_TYPE   e.g. a100; default: any
#   TASKS      processes of each node on the CPU (GPUS=0); default: 1
#   CPUS       of each process; default: 8
#   TIME       limit of each job; it is requeued when that comes near, and goes on. Default: 04:00:00
#   LEAD       seconds before the limit at which training is told to stop; default: 120
#   PARTITION, ACCOUNT, QOS, MEM   as the options of sbatch; default: the cluster's
#   PARTS      jobs that share the queries of stage `regions`; default: 1
#   OPTIONS    further options of sbatch, e.g. OPTIONS="--exclusive --mail-type=FAIL"
set -euo pipefail

fail() { echo "submit.sh: $*" >&2; exit 1; }

(( $# > 0 )) || fail "name stages: regions, sft, dpo, evaluate"
command -v sbatch > /dev/null || fail "no sbatch here; 'bash configs/slurm/sft.sbatch' runs a stage on this machine"
cd "$(dirname "$0")/../.."

# A chain works on one data set: the queries whose regions it extracts.
if [[ " $* " == *" regions "* && $# -gt 1 ]]; then
    export TRAIN_ON=${TRAIN_ON:-regions}
    [[ $TRAIN_ON != regions || ${QUERIES:-} ]] || fail "QUERIES= is not set: a .jsonl or .parquet file, or a folder of Parquet files," \
        "whose regions are extracted for the other stages. On the embedded demo, which has its regions: STAGES=\"sft dpo evaluate\";" \
        "on the data that the configurations name: TRAIN_ON=configured"
fi
if [[ ${TRAIN_ON:-} == regions ]]; then
    for stage in "$@"; do
        config=${stage^^}_CONFIG settings=${stage^^}_ARGS model=--model.init_args.base.name_or_path
        [[ $stage != sft && $stage != dpo || ${!config:-} || "${ARGS:-} ${!settings:-}" == *"$model"* ]] ||
            fail "$config= is not set, so $stage would train the demo's model on QUERIES=$QUERIES: name configurations with a model," \
                "e.g. $config=\"configs/$stage.yaml configs/model/qwen2_5_vl_3b.yaml\""
    done
fi
[[ -z ${QUERIES:-} || -e $QUERIES ]] || fail "QUERIES=$QUERIES: there is no such file or folder"

gpus=${GPUS:-1}
tasks=$gpus gres=gpu:${GPU_TYPE:+$GPU_TYPE:}$gpus
if [[ $gpus == 0 ]]; then
    tasks=${TASKS:-1} gres=none
elif [[ ${TASKS:-$gpus} != "$gpus" ]]; then
    fail "TASKS=$TASKS with GPUS=$gpus: each GPU has one process"
fi
options=(
    --export=ALL --parsable --nodes="${NODES:-1}" --ntasks-per-node="$tasks" --gres="$gres"
    --cpus-per-task="${CPUS:-8}" --time="${TIME:-04:00:00}"
    ${PARTITION:+--partition="$PARTITION"} ${ACCOUNT:+--account="$ACCOUNT"} ${QOS:+--qos="$QOS"} ${MEM:+--mem="$MEM"}
)
read -ra more <<< "${OPTIONS:-}"

before=""
for stage in "$@"; do
    script=configs/slurm/$stage.sbatch logs=${RUNS_DIR:-runs}/${stage/evaluate/eval}/logs name=%j shown='' own=()
    [[ -f $script ]] || fail "no stage $stage: expected regions, sft, dpo or evaluate"
    if [[ $stage == regions ]]; then
        name=%A_%a shown='_*' own=(--array="0-$((${PARTS:-1} - 1))")
    fi
    [[ $stage == evaluate ]] || own+=(--signal="B:USR1@${LEAD:-120}")
    # A job that waits for one that has failed would wait for ever.
    [[ -z $before ]] || own+=(--dependency="afterok:$before" --kill-on-invalid-dep=yes)
    mkdir -p "$logs"
    before=$(sbatch "${options[@]}" "${own[@]}" --output="$logs/$name.log" "${more[@]}" "$script")
    # With several clusters, sbatch says which one took the job.
    before=${before%%;*}
    echo "$stage: job $before, $logs/$before$shown.log"
done
