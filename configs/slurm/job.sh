# shellcheck shell=bash
# What the jobs beside this file share: surroundings, one process a GPU, signals, requeue, and a log that says why a job ended.
# Sourced from the root of a checkout. Without SLURM (`bash configs/slurm/sft.sbatch`) the same steps run on this machine.
#
#   PYTHON   interpreter; default: .venv/bin/python, else `python` of the active (conda) environment
#   RUNS_DIR folder of the run directories sft, dpo, eval and regions; default: runs
#   GPUS     GPUs of each node, as many as there are tasks; 0: on the CPU. Without SLURM: all of this machine
#   TASKS    processes on this machine, where there is no SLURM; default: GPUS, at least 1
#   WAIT     seconds that the other processes may run on when one has ended; default: 300
#   OFFLINE  1 (default): no network on compute nodes, so nothing is looked for on the Hub and W&B stays offline; 0: online
#   ARGS     settings of every stage; SFT_ARGS, DPO_ARGS, EVALUATE_ARGS, REGIONS_ARGS: of one stage
#   SFT_CONFIG, DPO_CONFIG, EVALUATE_CONFIG, REGIONS_CONFIG   configurations of a stage, in order, separated by blanks;
#            default: configs/sft.yaml, configs/dpo.yaml, configs/eval/demo.yaml (configs/eval/jsonl.yaml with TRAIN_ON=regions), configs/regions.yaml
#   ADAPTER  what DPO starts from; default: RUNS_DIR/sft/adapter
#   QUERIES  whose regions are wanted: a file that ends in .jsonl or .parquet, or a folder of Parquet files; default: as configured
#   DATA_ROOT folder that the image paths in QUERIES are relative to; default: the folder of QUERIES
#   PARTS    jobs that share these queries; default: 1. The last one to end writes regions/queries.parquet, which holds them all, with
#            one summary and contact sheet. Without SLURM, PART (from 0) is the one to do
#   TRAIN_ON regions: train on the first 80% of RUNS_DIR/regions/queries.parquet, validate on the next 10%, evaluate the last 10%,
#            whatever data the configurations name; submit.sh sets it behind stage `regions`. configured (default): the data that they name
#
# Caches and scratch, as the libraries read them; a home folder is often too small or too slow for them:
#   HF_HOME                         models and data sets. Fill it where there is a network: hf download NAME
#   TMPDIR                          temporary files; SLURM_TMPDIR, where a cluster sets it, is used in its place
#   WANDB_CACHE_DIR, WANDB_DATA_DIR artifacts on their way to W&B

# The last signal; the one that ended `wait`; whether this job is in the queue again; the run directory.
told="" interrupted="" requeued="" run=""

say() { echo "$(date +%FT%T) ${SLURM_JOB_ID:+job $SLURM_JOB_ID: }$*"; }
die() { say "$*" >&2; exit 1; }

hear() {
    told=$1 interrupted=$1
    say "received $1"
    # SLURM sends SIGTERM to every process of a job, but SIGUSR1 to this shell alone.
    if [[ ${child:-} && ( $1 == USR1 || -z ${SLURM_JOB_ID:-} ) ]]; then
        kill -s "${1/INT/TERM}" "$child" 2> /dev/null || true
    fi
}
for name in USR1 TERM INT; do
    # shellcheck disable=SC2064
    trap "hear $name" "$name"
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

# The class that reads QUERIES.
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

# A text as JSON has it.
quoted() {
    local text=${1//\\/\\\\}
    printf '"%s"' "${text//\"/\\\"}"
}

# extracted BEGIN END: the source of this share of what stage `regions` extracted, with the images of QUERIES, as JSON.
extracted() {
    local class root=""
    [[ ${QUERIES:-} ]] || die "TRAIN_ON=regions needs QUERIES=, from which the regions were extracted"
    class=$(source_class)
    [[ -z ${DATA_ROOT:-} ]] || root=", \"root\": $(quoted "$DATA_ROOT")"
    printf '{"class_path": "vlm_calibration.data.sources.parquet.ParquetSource", "init_args": {"path": %s, "begin": %s, "end": %s, ' \
        "$(quoted "$RUNS_DIR/regions/queries.parquet")" "$1" "$2"
    printf '"images": {"class_path": "%s", "init_args": {"path": %s%s}}}}' "$class" "$(quoted "$QUERIES")" "$root"
}

# The words of $1, quoted as in a shell, as the array `words`.
words_of() {
    local lines
    lines=$(xargs -r -n 1 printf '%s\n' <<< "$1") || die "cannot tell the words apart in: $1"
    words=()
    [[ -z $lines ]] || mapfile -t words <<< "$lines"
}

# W&B goes on with the run that the checkpoint belongs to.
continue_wandb() {
    local file=$run/logs/wandb-run-id
    if [[ ! -s $file || ( ! -e $run/checkpoints/last.ckpt && ${SLURM_RESTART_COUNT:-0} == 0 ) ]]; then
        od -An -N4 -tx1 /dev/urandom | tr -d ' \n' > "$file"
    fi
    export WANDB_RUN_ID=${WANDB_RUN_ID:-$(< "$file")} WANDB_RESUME=allow
}

# start COMMAND ARGUMENT...: the command line, one process a GPU; its exit status, the highest of all processes.
start() {
    local gpus=${GPUS:-1} command=$1 status
    shift
    if [[ ${SLURM_JOB_ID:-} ]]; then
        # This job asks for its requeue, once all processes have ended, and not Lightning in the middle of a step.
        local environment=lightning.pytorch.plugins.environments.SLURMEnvironment
        local settings=(
            --trainer.plugins+ "{class_path: $environment, init_args: {auto_requeue: false}}"
            --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "${SLURM_NTASKS_PER_NODE:?give sbatch --ntasks-per-node}"
        )
        # Where one has ended, another may still be writing, or may wait for it for ever.
        local launch=(
            srun --kill-on-bad-exit=0 --wait="${WAIT:-300}" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}"
            --output="$(task_log %t)"
        )
    else
        gpus=${GPUS:-$(nvidia-smi --list-gpus 2> /dev/null | wc -l || true)}
        local tasks=${TASKS:-$gpus} launch=()
        local settings=(--trainer.devices "$((tasks > 0 ? tasks : 1))")
    fi
    settings+=(--trainer.accelerator "$([[ $gpus == 0 ]] && echo cpu || echo gpu)")
    [[ -z $told ]] || return 138
    "${launch[@]}" "$python" -u -m vlm_calibration.cli "$command" "$@" "${settings[@]}" &
    child=$!
    while :; do
        interrupted="" status=0
        wait "$child" || status=$?
        [[ $interrupted ]] || break
        # Processes that are deep in something are killed soon, and this shell with them.
        [[ $interrupted != TERM ]] || ! at_time_limit || requeue
    done
    child=""
    return "$status"
}

task_log() { echo "$run/logs/$SLURM_JOB_ID-restart${SLURM_RESTART_COUNT:-0}-task$1.log"; }

# Why processes ended, from their logs: their own error lines, or else how their logs end.
show_reason() {
    [[ ${SLURM_JOB_ID:-} ]] || return 0
    local log errors
    for log in $(compgen -G "$(task_log '*')"); do
        errors=$(grep -h '^vlm-calibration: error: ' "$log" || true)
        echo "--- $log"
        echo "${errors:-$(tail -n 15 "$log")}"
    done
}

# SIGTERM comes at the limit, and also where someone cancels the job, which is not to come back then.
at_time_limit() {
    [[ ${SLURM_JOB_ID:-} ]] || return 1
    [[ $told == USR1 || ( $told == TERM && $(scontrol show job "$SLURM_JOB_ID") == *Reason=TimeLimit* ) ]]
}

# Put this job back in the queue, where it can go on from; not for ever, if it gets nowhere.
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
    # By its number alone the last job of an array would stand for all of it.
    local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    scontrol requeue "${job:-$SLURM_JOB_ID}" || die "the time limit is near and SLURM refuses to requeue: submit again to go on"
    requeued=1
    say "requeued"
}

# stage NAME COMMAND FOLDER CONFIG ARGUMENT...: run one stage; if it fails, end this job with what there is to say.
stage() {
    local name=${1^^} command=$2 default=$4 status=0 words config
    run=$RUNS_DIR/$3
    shift 4
    mkdir -p "$run/logs"
    words_of "$(config="${name}_CONFIG"; echo "${!config:-$default}")"
    local configs=("${words[@]}") arguments=()
    for config in "${configs[@]}"; do arguments+=(--config "$config"); done
    words_of "${ARGS:-} $(config="${name}_ARGS"; echo "${!config:-}")"
    [[ " ${words[*]} " != *" --trainer.default_root_dir"* ]] || die "the run directory is $run: RUNS_DIR= chooses another folder"
    arguments+=("$@" "${words[@]}" --trainer.default_root_dir "$run")
    if [[ $command == fit ]]; then
        continue_wandb
        [[ ! -e $run/checkpoints/last.ckpt ]] || arguments+=(--ckpt_path last)
    fi
    [[ -z ${SLURM_JOB_ID:-} ]] || touch "$run/logs/$SLURM_JOB_ID.began"
    say "$name in $run${SLURM_JOB_ID:+ on $SLURM_NODELIST, restart ${SLURM_RESTART_COUNT:-0}}:" "$command" "${arguments[*]}"
    start "$command" "${arguments[@]}" || status=$?
    if (( status == 0 )); then
        say "$name is done"
        [[ -z $(compgen -G "$run/wandb/offline-run-*") ]] || say "to upload, where there is a network: wandb sync $run/wandb/offline-run-*"
        return 0
    fi
    show_reason
    if (( status > 128 )) && at_time_limit; then
        requeue
        exit 0
    fi
    say "$name ended with status $status${told:+ after SIG$told}; submitted again, it goes on from what it has saved, if anything"
    exit "$status"
}
