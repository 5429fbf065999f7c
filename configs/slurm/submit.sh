#!/usr/bin/env bash
# Submit stages of a calibration to SLURM, each starting after the one before has succeeded. The arguments are those of
# `vlm-calibration calibrate`; without stages, those that the calibration needs:
#   GPUS=8 configs/slurm/submit.sh sft dpo --model qwen2_5_vl_7b --data jsonl --data-root my_data --runs runs/mine
# Reads the variables of job.sbatch, and these:
#
#   NODES      nodes per job; default: 1
#   GPUS       GPUs per node, with one process each; default: 1. 0: train on the CPU
#   GPU_TYPE   type of GPU, e.g. a100; default: any
#   TASKS      processes per node on the CPU (GPUS=0); default: 1
#   CPUS       cores per process; default: 8
#   TIME       time limit per job, which is requeued shortly before and resumes; default: 04:00:00
#   LEAD       seconds before the limit at which the job is signalled to stop; default: 120
#   PARTITION, ACCOUNT, QOS, MEM   options of sbatch; default: the cluster's
#   OPTIONS    further options of sbatch, e.g. OPTIONS="--exclusive --mail-type=FAIL"
set -euo pipefail
fail() { echo "submit.sh: $*" >&2; exit 1; }

python=${PYTHON:-.venv/bin/python}
[[ ${PYTHON:-} || -x $python ]] || python=python
command -v sbatch > /dev/null || fail "sbatch not found; 'bash configs/slurm/job.sbatch sft' runs a stage on this machine"
gpus=${GPUS:-1}
tasks=$gpus gres=gpu:${GPU_TYPE:+$GPU_TYPE:}$gpus
if [[ $gpus == 0 ]]; then
    tasks=${TASKS:-1} gres=none
elif [[ ${TASKS:-$gpus} != "$gpus" ]]; then
    fail "TASKS=$TASKS with GPUS=$gpus: each GPU has one process"
fi
options=(
    --export=ALL --parsable --cpus-per-task="${CPUS:-8}" --time="${TIME:-04:00:00}"
    ${PARTITION:+--partition="$PARTITION"} ${ACCOUNT:+--account="$ACCOUNT"} ${QOS:+--qos="$QOS"} ${MEM:+--mem="$MEM"}
)
read -ra extra_options <<< "${OPTIONS:-}"

# Checks the arguments of all stages before the first is submitted.
plan=$("$python" -m vlm_calibration.cli calibrate "$@" --dry-run)
while (( $# )) && [[ $1 != --* ]]; do shift; done

previous=""
while IFS=$'\t' read -r stage run _; do
    name=%j array_suffix='' stage_options=(--job-name="$stage" --nodes="${NODES:-1}" --ntasks-per-node="$tasks" --gres="$gres")
    [[ $stage != report ]] || stage_options=(--job-name="$stage" --nodes=1 --ntasks-per-node=1 --gres=none)
    if [[ $stage == regions ]]; then
        name=%A_%a array_suffix='_*'
        stage_options+=(--array="0-$((${PARTS:-1} - 1))")
    fi
    # LEAD is enough for the longest step or validation and for writing a checkpoint.
    [[ $stage != @(regions|sft|dpo) ]] || stage_options+=(--signal="B:USR1@${LEAD:-120}")
    # Without kill-on-invalid-dep a job behind a failed one would stay in the queue forever.
    [[ -z $previous ]] || stage_options+=(--dependency="afterok:$previous" --kill-on-invalid-dep=yes)
    mkdir -p "$run/logs"
    previous=$(sbatch "${options[@]}" "${stage_options[@]}" --output="$run/logs/$name.log" "${extra_options[@]}" "$(dirname "$0")/job.sbatch" "$stage" "$@")
    # With several clusters, sbatch prints JOB;CLUSTER.
    previous=${previous%%;*}
    echo "$stage: job $previous, $run/logs/$previous$array_suffix.log"
done <<< "$plan"
