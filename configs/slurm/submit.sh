#!/usr/bin/env bash
# Submit stages to SLURM, each starting after the one before has succeeded: configs/slurm/submit.sh [regions] [sft] [dpo] [evaluate]
# Reads these variables and those of job.sh:
#
#   NODES      nodes per job; default: 1
#   GPUS       GPUs per node, with one process each; default: 1. 0: train on the CPU
#   GPU_TYPE   type of GPU, e.g. a100; default: any
#   TASKS      processes per node on the CPU (GPUS=0); default: 1
#   CPUS       cores per process; default: 8
#   TIME       time limit per job, which is requeued shortly before and resumes; default: 04:00:00
#   LEAD       seconds before the limit at which the job is signalled to stop; default: 120
#   PARTITION, ACCOUNT, QOS, MEM   options of sbatch; default: the cluster's
#   PARTS      jobs that share the queries of stage `regions`; default: 1
#   OPTIONS    further options of sbatch, e.g. OPTIONS="--exclusive --mail-type=FAIL"
set -euo pipefail

fail() { echo "submit.sh: $*" >&2; exit 1; }

(( $# > 0 )) || fail "name stages: regions, sft, dpo, evaluate"
command -v sbatch > /dev/null || fail "sbatch not found; 'bash configs/slurm/sft.sbatch' runs a stage on this machine"
cd "$(dirname "$0")/../.."

# Later stages train and evaluate on the queries whose regions the first stage extracts.
if [[ " $* " == *" regions "* && $# -gt 1 ]]; then
    export TRAIN_ON=${TRAIN_ON:-regions}
    [[ $TRAIN_ON != regions || ${QUERIES:-} ]] || fail "QUERIES= is not set: a .jsonl or .parquet file, or a folder of Parquet files," \
        "whose regions the other stages use. For the embedded demo, which has regions: STAGES=\"sft dpo evaluate\";" \
        "to train on the data of the configurations: TRAIN_ON=configured"
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
read -ra extra_options <<< "${OPTIONS:-}"

previous=""
for stage in "$@"; do
    script=configs/slurm/$stage.sbatch logs=${RUNS_DIR:-runs}/${stage/evaluate/eval}/logs name=%j array_suffix='' stage_options=()
    [[ -f $script ]] || fail "no stage $stage: expected regions, sft, dpo or evaluate"
    if [[ $stage == regions ]]; then
        name=%A_%a array_suffix='_*' stage_options=(--array="0-$((${PARTS:-1} - 1))")
    fi
    [[ $stage == evaluate ]] || stage_options+=(--signal="B:USR1@${LEAD:-120}")
    # Without kill-on-invalid-dep a job behind a failed one would stay in the queue forever.
    [[ -z $previous ]] || stage_options+=(--dependency="afterok:$previous" --kill-on-invalid-dep=yes)
    mkdir -p "$logs"
    previous=$(sbatch "${options[@]}" "${stage_options[@]}" --output="$logs/$name.log" "${extra_options[@]}" "$script")
    # With several clusters, sbatch prints JOB;CLUSTER.
    previous=${previous%%;*}
    echo "$stage: job $previous, $logs/$previous$array_suffix.log"
done
