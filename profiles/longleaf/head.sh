#!/usr/bin/env bash
# Snakemake itself as a job, because login nodes end long processes:
#
#     sbatch profiles/longleaf/head.sh all --configfile mine.yaml          # from the project's folder
#     bash profiles/longleaf/head.sh all --configfile mine.yaml            # the same in tmux, without being a job
#
# Its arguments are Snakemake's; its profile is $SNAKEMAKE_PROFILE, or profiles/longleaf. What sbatch may be told on its
# command line wins over what stands below: sbatch --mail-user=me@unc.edu --time=2-0 profiles/longleaf/head.sh all ...
#
# - Ten minutes before its own walltime it stops Snakemake as Ctrl-C does (its jobs are cancelled, trainings save what
#   they have) and queues itself again.
# - Killed with its node, it is queued again by Slurm. It then waits for the jobs that its forerunner left behind, whose
#   work counts, unlocks the folder and goes on.
# - `scancel --batch --signal=TERM JOB` ends the run: its jobs are cancelled, trainings save, the folder is unlocked. It
#   takes minutes, for Snakemake may be sleeping. A plain `scancel JOB` kills Snakemake after half a minute, often
#   before it is done with that: see by `squeue --me` what it left, `snakemake --unlock`, go on with --rerun-incomplete.
#
# ---- The site ------------------------------------------------------------------------------------------------------
#SBATCH --job-name=cellmap-head
#SBATCH --partition=general
#SBATCH --time=7-00:00:00
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --output=cellmap-head-%j.log
# Slurm's own mail: it arrives also when this job's node is lost. To your address at the site unless you name another.
#SBATCH --mail-type=END,FAIL,REQUEUE
##SBATCH --mail-user=me@unc.edu
##SBATCH --account=your_account
# How it starts again; 600 = seconds before the walltime.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600

activate() { # Puts Snakemake on the PATH; jobs use the same environment by its full path.
    source .venv/bin/activate
    # micromamba: eval "$(micromamba shell hook --shell bash)" && micromamba activate cellmap
    # conda:      module load anaconda && eval "$(conda shell.bash hook)" && conda activate cellmap
}

# What becomes of jobs that a killed forerunner left: wait = until they have ended, cancel = end them (trainings save).
orphans=${CELLMAP_ORPHANS:-wait}
# Longest time from the signal to Snakemake's end, in seconds. It may sleep for minutes between two looks at the queue.
stop_seconds=${CELLMAP_STOP_SECONDS:-240}
# --------------------------------------------------------------------------------------------------------------------

stopping= child= watcher=
stop() { # stop SIGNAL: end Snakemake as Ctrl-C does; if it does not end, end it all the same
    stopping=$1
    if [[ $child && ! $watcher ]]; then
        say "SIG$1: stopping Snakemake; its jobs are cancelled"
        kill -INT -- "-$child" 2>/dev/null
        { sleep "$stop_seconds"; kill -KILL -- "-$child" 2>/dev/null; } &
        watcher=$!
    fi
}
# Before all else: a signal may come while the environment is activated.
trap 'stop USR1' USR1
trap 'stop TERM' TERM
trap 'stop INT' INT

set -uo pipefail
say() { echo "[head $(date +%FT%T)] $*"; }
fail() { say "ERROR $*" >&2; exit 1; }

job=${SLURM_JOB_ID:-}
starts=${SLURM_RESTART_COUNT:-0}
# What this job was given must not become what its jobs ask for, nor hide them: Slurm's commands read these as options.
unset $(compgen -e | grep -E '^(SLURM|SBATCH|SRUN|SQUEUE|SACCT)_' | grep -vx SLURM_CONF)

export SNAKEMAKE_PROFILE=${SNAKEMAKE_PROFILE:-profiles/longleaf}
[[ -d $SNAKEMAKE_PROFILE ]] || fail "$SNAKEMAKE_PROFILE is not in $PWD; submit from the project's folder: cd there first"
(($#)) || fail "no target given; for everything: sbatch profiles/longleaf/head.sh all --configfile mine.yaml"
set +u # scripts of conda and of modules use what is not set
command -v snakemake >/dev/null || activate || fail "the environment cannot be activated; edit activate() in $SNAKEMAKE_PROFILE/head.sh"
command -v snakemake >/dev/null || fail "no snakemake on the PATH; run 'make install', or edit activate() in $SNAKEMAKE_PROFILE/head.sh"
set -u
PATH=$(cd "$SNAKEMAKE_PROFILE" && pwd)/bin:$PATH

# The jobs of this run carry its number, which stays the same when it is queued again.
prefix=cellmap${job:+-$job}
left() { squeue --me --noheader --format='%i %j' | awk -v mine="${prefix}_" 'index($2, mine) == 1 { print $1 }'; }

stopped() { # Go no further if a signal came before Snakemake began
    [[ $stopping != USR1 ]] || requeue
    [[ ! $stopping ]] || exit 1
}

requeue() {
    say "walltime: queued again"
    scontrol requeue "$job" || fail "cannot be queued again; submit it anew, first: snakemake --unlock"
    sleep 120 & wait $! # Slurm ends this job
    exit 1
}

if [[ $job ]] && ((starts)); then
    say "start $((starts + 1)) of job $job"
    said=unknown
    while :; do
        ids=$(left) || ids=$said # Slurm does not answer: as before
        stopped
        [[ $ids ]] || break
        if [[ $ids != "$said" ]]; then
            said=$ids
            if [[ $orphans == cancel ]]; then
                say "cancels jobs of the start before: $(echo $ids)"
                scancel $ids
            else
                say "waits for jobs of the start before, whose work counts: $(echo $ids) (to go on sooner: scancel $(echo $ids))"
            fi
        fi
        sleep "${CELLMAP_ORPHAN_SECONDS:-30}" & wait $!
    done
    # The lock is the killed forerunner's: nobody else can have begun meanwhile without removing it.
    snakemake "$@" --unlock || fail "the working directory cannot be unlocked; see above"
    set -- "$@" --rerun-incomplete
fi

stopped
set -m # a process group of its own, which SIGINT reaches: bash starts others with it ignored
snakemake "$@" --slurm-jobname-prefix "$prefix" &
child=$!
set +m
[[ ! $stopping ]] || stop "$stopping" # the signal came when there was no Snakemake yet
while :; do # a signal ends `wait` before Snakemake has ended
    wait "$child"
    status=$?
    kill -0 "$child" 2>/dev/null || break
done
if ((status > 128)) && wait "$child" 2>/dev/null; then status=0; fi # it ended just when the signal came
child=
[[ ! $watcher ]] || kill "$watcher" 2>/dev/null
[[ $stopping != USR1 || $status == 0 ]] || requeue
say "Snakemake ended with status $status"
exit "$status"
