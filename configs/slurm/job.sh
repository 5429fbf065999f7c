# shellcheck shell=bash
# Functions that all jobs in this folder share: environment, one process per GPU, signals, requeueing, and the reason for a failure.
# Sourced from the repository root. Without SLURM (`bash configs/slurm/sft.sbatch`) a stage runs on this machine.
#
#   PYTHON   interpreter; default: .venv/bin/python, else `python` of the active (conda) environment
#   RUNS_DIR folder of the run directories sft, dpo, eval and regions; default: runs
#   GPUS     GPUs per node, one per task; 0: run on the CPU. Default without SLURM: all of this machine
#   TASKS    processes on this machine, without SLURM; default: GPUS, at least 1
#   WAIT     seconds after which the other processes are killed once one has ended; default: 300
#   OFFLINE  1 (default): compute nodes have no network, so do not contact the Hub and log to W&B offline; 0: online
#   ARGS     settings for every stage; SFT_ARGS, DPO_ARGS, EVALUATE_ARGS, REGIONS_ARGS: for one stage
#   SFT_CONFIG, DPO_CONFIG, EVALUATE_CONFIG, REGIONS_CONFIG   configuration files of a stage, in order, separated by spaces;
#            default: configs/sft.yaml, configs/dpo.yaml, configs/eval/demo.yaml (configs/eval/jsonl.yaml with TRAIN_ON=regions), configs/regions.yaml
#   ADAPTER  adapter that DPO starts from; default: RUNS_DIR/sft/adapter
#   QUERIES  queries to extract regions for: a .jsonl or .parquet file, or a folder of Parquet files; default: as configured
#   DATA_ROOT folder that the image paths in QUERIES are relative to; default: the folder of QUERIES
#   PARTS    jobs that share these queries; default: 1. The last one to end writes regions/queries.parquet with all queries, the
#            summary and the contact sheet. Without SLURM, PART (from 0) selects the part to run
#   TRAIN_ON regions: train on the first 80% of RUNS_DIR/regions/queries.parquet, validate on the next 10%, evaluate the last 10%,
#            instead of on the configured data; submit.sh sets this after stage `regions`. configured (default): the configured data
#
# Variables of libraries for caches and scratch space, since home folders are often too small or too slow:
#   HF_HOME                         models and data sets; fill it on a machine with a network: hf download NAME
#   TMPDIR                          temporary files; SLURM_TMPDIR takes precedence where the cluster sets it
#   WANDB_CACHE_DIR, WANDB_DATA_DIR artifacts to be uploaded to W&B

# last_signal: name of the last signal received. wait_signal: the signal that interrupted `wait`. requeued: 1 once this job is back in the
# queue. run: the run directory.
last_signal="" wait_signal="" requeued="" run=""

log_line() { echo "$(date +%FT%T) ${SLURM_JOB_ID:+job $SLURM_JOB_ID: }$*"; }
die() { log_line "$*" >&2; exit 1; }

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

python=${PYTHON:-.venv/bin/python}
[[ ${PYTHON:-} || -x $python ]] || python=python
command -v "$python" > /dev/null || die "no interpreter $python: run 'make setup', activate an environment, or set PYTHON="

RUNS_DIR=${RUNS_DIR:-runs}
export NO_ALBUMENTATIONS_UPDATE=1 TOKENIZERS_PARALLELISM=false
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
export TMPDIR=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}
if [[ ${OFFLINE:-1} == 1 ]]; then
    export HF_HUB_OFFLINE=1 WANDB_MODE=${WANDB_MODE:-offline}
fi

# Print the source class that reads QUERIES.
source_class() {
    case $QUERIES in
        *.jsonl) echo vlm_calibration.data.sources.jsonl.JsonlSource ;;
        *.parquet) echo vlm_calibration.data.sources.parquet.ParquetSource ;;
        *)
            [[ -d $QUERIES ]] || die "QUERIES=$QUERIES: expected a file that ends in .jsonl or .parquet, or a folder of Parquet files"
            echo vlm_calibration.data.sources.parquet.ParquetSource
            ;;
    esac
}

# Print $1 as a JSON string.
json_string() {
    local text=${1//\\/\\\\}
    printf '"%s"' "${text//\"/\\\"}"
}

# regions_source BEGIN END: print the source of this share of the extracted regions, with the images of QUERIES, as JSON.
regions_source() {
    local class root=""
    [[ ${QUERIES:-} ]] || die "TRAIN_ON=regions needs QUERIES=, the queries whose regions were extracted"
    class=$(source_class)
    [[ -z ${DATA_ROOT:-} ]] || root=", \"root\": $(json_string "$DATA_ROOT")"
    printf '{"class_path": "vlm_calibration.data.sources.parquet.ParquetSource", "init_args": {"path": %s, "begin": %s, "end": %s, ' \
        "$(json_string "$RUNS_DIR/regions/queries.parquet")" "$1" "$2"
    printf '"images": {"class_path": "%s", "init_args": {"path": %s%s}}}}' "$class" "$(json_string "$QUERIES")" "$root"
}

# Split $1 into the array `words`, with the quoting rules of a shell.
split_words() {
    local lines
    lines=$(xargs -r -n 1 printf '%s\n' <<< "$1") || die "cannot split into words (unmatched quote?): $1"
    words=()
    [[ -z $lines ]] || mapfile -t words <<< "$lines"
}

# Let W&B resume the run that the checkpoint belongs to.
resume_wandb() {
    local file=$run/logs/wandb-run-id
    if [[ ! -s $file || ( ! -e $run/checkpoints/last.ckpt && ${SLURM_RESTART_COUNT:-0} == 0 ) ]]; then
        od -An -N4 -tx1 /dev/urandom | tr -d ' \n' > "$file"
    fi
    export WANDB_RUN_ID=${WANDB_RUN_ID:-$(< "$file")} WANDB_RESUME=allow
}

# launch COMMAND ARGUMENT...: run the command line, one process per GPU; return the highest exit status of all processes.
launch() {
    local gpus=${GPUS:-1} command=$1 status
    shift
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
    [[ -z $last_signal ]] || return 138
    "${prefix[@]}" "$python" -u -m vlm_calibration.cli "$command" "$@" "${settings[@]}" &
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
        (( $(wc -l < "$idle") < 3 )) || die "three times in a row the time limit came before anything was saved: raise TIME=," \
            "or have training save more often (every_n_train_steps)"
    fi
    # The number of an array's last job stands for the whole array, so name the task.
    local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    scontrol requeue "${job:-$SLURM_JOB_ID}" || die "the time limit is near and SLURM refuses to requeue: submit again to resume"
    requeued=1
    log_line "requeued"
}

# run_stage NAME COMMAND FOLDER CONFIG ARGUMENT...: run one stage; on failure print the reason and exit.
run_stage() {
    local name=${1^^} command=$2 default=$4 status=0 words config
    run=$RUNS_DIR/$3
    shift 4
    mkdir -p "$run/logs"
    split_words "$(config="${name}_CONFIG"; echo "${!config:-$default}")"
    local configs=("${words[@]}") arguments=()
    for config in "${configs[@]}"; do arguments+=(--config "$config"); done
    split_words "${ARGS:-} $(config="${name}_ARGS"; echo "${!config:-}")"
    [[ " ${words[*]} " != *" --trainer.default_root_dir"* ]] || die "the run directory is $run: RUNS_DIR= chooses another folder"
    arguments+=("$@" "${words[@]}" --trainer.default_root_dir "$run")
    if [[ $command == fit ]]; then
        resume_wandb
        [[ ! -e $run/checkpoints/last.ckpt ]] || arguments+=(--ckpt_path last)
    fi
    [[ -z ${SLURM_JOB_ID:-} ]] || touch "$run/logs/$SLURM_JOB_ID.began"
    log_line "$name in $run${SLURM_JOB_ID:+ on $SLURM_NODELIST, restart ${SLURM_RESTART_COUNT:-0}}:" "$command" "${arguments[*]}"
    launch "$command" "${arguments[@]}" || status=$?
    if (( status == 0 )); then
        log_line "$name is done"
        [[ -z $(compgen -G "$run/wandb/offline-run-*") ]] || log_line "to upload from a machine with a network: wandb sync $run/wandb/offline-run-*"
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
