# shellcheck shell=bash
# What the scripts share; sourced, not run.
#
# A process called NAME (coordinator, worker-ID) leaves two files in the run folder:
#   NAME.pid    its process id, nothing else
#   NAME.info   start time as the kernel tells it, start time in seconds since 1970, log file, script, URL
# A pid file counts only while the process with this id has the same start time and runs the same script: after a
# crash or a reboot the id may belong to somebody else, and nothing of somebody else's is ever signalled.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
run_dir=${FEDMOE_RUN_DIR:-$root/run}
log_dir=${FEDMOE_LOG_DIR:-$root/logs}
# shellcheck disable=SC2034  # used by the scripts that source this
start_seconds=${FEDMOE_START_SECONDS:-60}
# A worker that is told to stop finishes its step and delivers its last update first.
stop_seconds=${FEDMOE_STOP_SECONDS:-90}

python=$root/.venv/bin/python
[[ -x $python ]] || python=python3

die() {
    printf 'error: %s\n' "$1" >&2
    exit "${2:-1}"
}

# The value of option $1 among the arguments after it, as --option VALUE or --option=VALUE; empty if it is not there.
option_value() {
    local wanted=$1
    shift
    while (($#)); do
        case $1 in
            "$wanted") printf '%s' "${2-}"; return ;;
            "$wanted"=*) printf '%s' "${1#*=}"; return ;;
        esac
        shift
    done
}

has_option() {
    local wanted=$1 argument
    shift
    for argument; do
        [[ $argument == "$wanted" || $argument == "$wanted"=* ]] && return 0
    done
    return 1
}

wants_help() { has_option --help "$@" || has_option -h "$@"; }

# When the process began, in the kernel's words; empty if there is no such process.
start_time() {
    local stat fields
    if [[ -r /proc/$1/stat ]]; then
        stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
        # The name in the second field may hold anything, so count from its closing parenthesis.
        read -r -a fields <<<"${stat##*) }"
        printf '%s' "${fields[19]}"
    else
        ps -o lstart= -p "$1" 2>/dev/null || true
    fi
}

# The command line of a process, one argument a line where the system tells them apart; empty for a zombie.
arguments_of() {
    if [[ -r /proc/$1/cmdline ]]; then
        tr '\0' '\n' <"/proc/$1/cmdline" 2>/dev/null || true
    else
        ps -o args= -p "$1" 2>/dev/null || true
    fi
}

info() { sed -n "${2}p" "$run_dir/$1.info" 2>/dev/null || true; }

# The process id of NAME if it runs and is ours; empty otherwise.
running_pid() {
    local pid script arguments
    [[ -r $run_dir/$1.pid ]] || return 0
    pid=$(cat "$run_dir/$1.pid")
    [[ $pid =~ ^[0-9]+$ ]] || return 0
    [[ -n $(info "$1" 1) && $(start_time "$pid") == "$(info "$1" 1)" ]] || return 0
    script=$(info "$1" 4)
    arguments=$(arguments_of "$pid")
    [[ -n $script && $arguments == *"$script"* ]] || return 0
    printf '%s' "$pid"
}

forget() { rm -f -- "$run_dir/$1.pid" "$run_dir/$1.info"; }

# The names of all pid files, running or not.
known_names() {
    local file
    for file in "$run_dir"/coordinator.pid "$run_dir"/worker-*.pid; do
        [[ -e $file ]] && basename "$file" .pid
    done
    return 0
}

# launch NAME LOG OUT SCRIPT ARGUMENT...: start SCRIPT in the background and leave its pid file; sets started_pid.
launch() {
    local name=$1 log=$2 out=$3 script=$4 pid
    shift 4
    pid=$(running_pid "$name")
    [[ -z $pid ]] || die "$name is running already with process id $pid; its log is $(info "$name" 3)"
    if [[ -e $run_dir/$name.pid ]]; then
        echo "a stale pid file of $name was there (it had ended without one of these scripts); replaced"
        forget "$name"
    fi
    nohup "$python" "$script" "$@" </dev/null >>"$out" 2>>"$log" &
    started_pid=$!
    # Until nohup and env have become Python the command line is another one; the start time is the same already.
    printf '%s\n' "$(start_time "$started_pid")" "$(date +%s)" "$log" "$script" "" >"$run_dir/$name.info.$started_pid"
    echo "$started_pid" >"$run_dir/$name.pid.$started_pid"
    # ln fails if the file is there: of two starts at the same moment one wins and the other takes its process back.
    if ! ln "$run_dir/$name.pid.$started_pid" "$run_dir/$name.pid" 2>/dev/null; then
        rm -f -- "$run_dir/$name.pid.$started_pid" "$run_dir/$name.info.$started_pid"
        kill "$started_pid" 2>/dev/null || true
        die "$name is being started by somebody else at this moment"
    fi
    mv -f -- "$run_dir/$name.info.$started_pid" "$run_dir/$name.info"
    rm -f -- "$run_dir/$name.pid.$started_pid"
}

# Whether a child of this script still runs; a zombie does not.
child_runs() { [[ -n $(arguments_of "$1") ]]; }

# What NAME wrote to its log since byte $2.
log_since() { tail -c "+$(($2 + 1))" "$1" 2>/dev/null || true; }

size_of() { if [[ -e $1 ]]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }

# failed_start NAME LOG OFFSET: the process ended while it started; show why and leave with its status.
failed_start() {
    local status=0
    wait "$started_pid" || status=$?
    forget "$1"
    echo "error: $1 ended with status $status; the end of $2:" >&2
    log_since "$2" "$3" | tail -n 12 >&2
    exit 1
}

# stop_process NAME: SIGTERM, wait, say what happened; status 1 if it is still there.
stop_process() {
    local name=$1 pid waited=0
    pid=$(running_pid "$name")
    if [[ -z $pid ]]; then
        if [[ -e $run_dir/$name.pid ]]; then
            echo "$name is not running; removed its stale pid file"
        else
            echo "$name is not running"
        fi
        forget "$name"
        return 0
    fi
    kill -TERM "$pid" 2>/dev/null || true
    while [[ $(running_pid "$name") == "$pid" ]]; do
        if ((waited >= stop_seconds * 5)); then
            echo "error: $name (process id $pid) still runs ${stop_seconds} s after SIGTERM; see $(info "$name" 3)." >&2
            echo "error: give it more time, or end it with: kill -KILL $pid (nothing acknowledged is lost)" >&2
            return 1
        fi
        sleep 0.2
        waited=$((waited + 1))
    done
    echo "$name stopped (process id $pid)"
    forget "$name"
}

duration() {
    local seconds=$1
    if ((seconds < 60)); then echo "${seconds} s"
    elif ((seconds < 3600)); then echo "$((seconds / 60)) min $((seconds % 60)) s"
    elif ((seconds < 86400)); then echo "$((seconds / 3600)) h $((seconds / 60 % 60)) min"
    else echo "$((seconds / 86400)) d $((seconds / 3600 % 24)) h"; fi
}

make_folders() {
    # Logs and pid files are nobody else's business.
    umask 077
    mkdir -p -- "$run_dir" "$log_dir"
}
