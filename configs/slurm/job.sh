# shellcheck shell=bash
# Functions that all jobs in this folder share: environment, one process per GPU, signals, requeueing, and the reason for a failure.
# Sourced from the repository root. Without SLURM (`bash configs/slurm/sft.sbatch`) a stage runs on this machine.
# What a stage does is chosen with the variables of configs/stages.sh: MODEL, DATA, DATA_ROOT, PRESET, TRAINER, RUN, ARGS, ...
#
#   GPUS     GPUs per node, one per task; 0: run on the CPU. Default without SLURM: all of this machine
#   TASKS    processes on this machine, without SLURM; default: GPUS, at least 1
#   WAIT     seconds after which the other processes are killed once one has ended; default: 300
#   OFFLINE  1 (default): compute nodes have no network, so do not contact the Hub and log to W&B offline; 0: online
#   PARTS    jobs that share the queries of stage regions. The last one to end writes the extracted regions of all, the summary and the
#            contact sheet. Without SLURM, PART (from 0) selects the part to run
#
# Variables of libraries for caches and scratch space, since home folders are often too small or too slow:
#   HF_HOME                         models and data sets; fill it on a machine with a network: hf download NAME
#   TMPDIR                          temporary files; SLURM_TMPDIR takes precedence where the cluster sets it
#   WANDB_CACHE_DIR, WANDB_DATA_DIR artifacts to be uploaded to W&B

source configs/stages.sh

# last_signal: name of the last signal received. wait_signal: the signal that interrupted `wait`. requeued: 1 once this job is back in the
# queue.
last_signal="" wait_signal="" requeued=""

log_line() { echo "$(date +%FT%T) ${SLURM_JOB_ID:+job $SLURM_JOB_ID: }$*"; }
fail() { log_line "$*" >&2; exit 1; }

on_signal() {
    last_signal=$1 wait_signal=$1
    log_line "received $1"
    # SLURM sends SIGTERM to every process of a job, but SIGUSR1 to this shell alone.
    if [[ ${child:-} && ( $1 == USR1 || -z ${SLURM_JOB_ID:-} ) ]]; then
        kill -s "${1/INT/TERM}" "$child" 2> /dev/null || true
    fi
}
for name in USR1 TERM INT; do
    # shellcheck disable=SC2064
    trap "on_signal $name" "$name"
done

command -v "$python" > /dev/null || fail "no interpreter $python: run 'make setup', activate an environment, or set PYTHON="

export NO_ALBUMENTATIONS_UPDATE=1 TOKENIZERS_PARALLELISM=false
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
export TMPDIR=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}
if [[ ${OFFLINE:-1} == 1 ]]; then
    export HF_HUB_OFFLINE=1 WANDB_MODE=${WANDB_MODE:-offline}
fi

# Let W&B resume the run that the checkpoint belongs to.
resume_wandb() {
    local file=$run/logs/wandb-run-id
    if [[ ! -s $file || ( ! -e $run/checkpoints/last.ckpt && ${SLURM_RESTART_COUNT:-0} == 0 ) ]]; then
        od -An -N4 -tx1 /dev/urandom | tr -d ' \n' > "$file"
    fi
    export WANDB_RUN_ID=${WANDB_RUN_ID:-$(< "$file")} WANDB_RESUME=allow
}

# Run the command line in `arguments`, one process per GPU; return the highest exit status of all processes.
launch() {
    local gpus=${GPUS:-1} status
    if [[ ${SLURM_JOB_ID:-} ]]; then
        # This script requeues the job once all processes have ended; Lightning would do it in the middle of a step.
        local environment=lightning.pytorch.plugins.environments.SLURMEnvironment
        local settings=(
            --trainer.plugins+ "{class_path: $environment, init_args: {auto_requeue: false}}"
            --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "${SLURM_NTASKS_PER_NODE:?give sbatch --ntasks-per-node}"
        )
        # When one process has ended, another may still be writing, or may wait for it forever.
        local prefix=(
            srun --kill-on-bad-exit=0 --wait="${WAIT:-300}" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}"
            --output="$(task_log %t)"
        )
    else
        gpus=${GPUS:-$(nvidia-smi --list-gpus 2> /dev/null | wc -l || true)}
        local tasks=${TASKS:-$gpus} prefix=()
        local settings=(--trainer.devices "$((tasks > 0 ? tasks : 1))")
    fi
    settings+=(--trainer.accelerator "$([[ $gpus == 0 ]] && echo cpu || echo gpu)")
    [[ ${arguments[0]} != report ]] || settings=()
    [[ -z $last_signal ]] || return 138
    "${prefix[@]}" "$python" -u -m vlm_calibration.cli "${arguments[@]}" "${settings[@]}" &
    child=$!
    while :; do
        wait_signal="" status=0
        wait "$child" || status=$?
        [[ $wait_signal ]] || break
        # Requeue now: SLURM kills busy processes soon after SIGTERM, and this shell with them.
        [[ $wait_signal != TERM ]] || ! at_time_limit || requeue
    done
    child=""
    return "$status"
}

task_log() { echo "$run/logs/$SLURM_JOB_ID-restart${SLURM_RESTART_COUNT:-0}-task$1.log"; }

# Print why processes failed: the error lines of each log, or its last lines if it has none.
show_reason() {
    [[ ${SLURM_JOB_ID:-} ]] || return 0
    local log errors
    for log in $(compgen -G "$(task_log '*')"); do
        errors=$(grep -h '^vlm-calibration: error: ' "$log" || true)
        echo "--- $log"
        echo "${errors:-$(tail -n 15 "$log")}"
    done
}

# Whether the last signal announces the time limit. SIGTERM comes when a job is cancelled as well; such a job must not be requeued.
at_time_limit() {
    [[ ${SLURM_JOB_ID:-} ]] || return 1
    [[ $last_signal == USR1 || ( $last_signal == TERM && $(scontrol show job "$SLURM_JOB_ID") == *Reason=TimeLimit* ) ]]
}

# Put this job back in the queue; give up after three restarts in a row without progress.
requeue() {
    [[ -z $requeued ]] || return 0
    local began=$run/logs/$SLURM_JOB_ID.began idle=$run/logs/$SLURM_JOB_ID.idle
    if [[ $(find "$run" \( -name last.ckpt -o -path '*/shards/[0-9]*.jsonl' -o -name '.answered.*.jsonl' \) -newer "$began" -print -quit) ]]; then
        rm -f "$idle"
    else
        echo "$(date +%FT%T) nothing was saved" >> "$idle"
        (( $(wc -l < "$idle") < 3 )) || fail "three times in a row the time limit came before anything was saved: raise TIME=," \
            "or have training save more often (every_n_train_steps)"
    fi
    # The number of an array's last job stands for the whole array, so name the task.
    local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    scontrol requeue "${job:-$SLURM_JOB_ID}" || fail "the time limit is near and SLURM refuses to requeue: submit again to resume"
    requeued=1
    log_line "requeued"
}

# run_stage STAGE: run a stage; on failure print the reason and exit.
run_stage() {
    local name=${1^^} status=0
    PART=${SLURM_ARRAY_TASK_ID:-${PART:-0}}
    stage_arguments "$1"
    mkdir -p "$run/logs"
    [[ ${arguments[0]} != fit ]] || resume_wandb
    [[ -z ${SLURM_JOB_ID:-} ]] || touch "$run/logs/$SLURM_JOB_ID.began"
    log_line "$name in $run${SLURM_JOB_ID:+ on $SLURM_NODELIST, restart ${SLURM_RESTART_COUNT:-0}}:" "${arguments[*]}"
    launch || status=$?
    if (( status == 0 )); then
        log_line "$name is done"
        [[ $1 == report || -z $(compgen -G "$run/wandb/offline-run-*") ]] || log_line "to upload from a machine with a network: wandb sync $run/wandb/offline-run-*"
        return 0
    fi
    show_reason
    if (( status > 128 )) && at_time_limit; then
        requeue
        exit 0
    fi
    log_line "$name ended with status $status${last_signal:+ after SIG$last_signal}; submit again to resume from what was saved, if anything"
    exit "$status"
}
