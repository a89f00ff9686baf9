#!/usr/bin/env bash
""":" # One file, two languages, because `deepspeed launch/train.sh` runs it with Python. bash reads this line as the null command `:`
# and Python as the start of a docstring that lasts until the last lines, which hand the script to bash (a here-document to bash).
#
# Trains. Whoever calls it, it finds out what it is to be and starts the matching program:
#
#   called by                                          recognised by                     acts as
#   a person, or a container's entry point             none of the below                 supervisor of this node
#   deepspeed [--no_python] launch/train.sh ...        RANK or LOCAL_RANK is set         worker
#   srun, one task per node                            SLURM_STEP_ID, a real step's      supervisor, its place from Slurm
#   srun, one task per device                          same, more tasks than nodes       worker, its rank from Slurm
#
# Arguments go on unchanged (`launch/train.sh --help`). DDPM_PYTHON chooses the Python; without it: the activated virtual
# environment's, else the one launch/venv.sh made beside this folder, else python3.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

python=${DDPM_PYTHON:-}
if [ -z "$python" ]; then
    python=$here/../.venv/bin/python
    if [ -n "${VIRTUAL_ENV:-}" ] || [ ! -x "$python" ]; then python=python3; fi
fi
export PYTHONSAFEPATH=1 # a folder named trainer/ or eval/ where the user stands is not this system's

arguments=()
for argument in "$@"; do # the deepspeed launcher adds --local_rank=N, which the environment says too
    case $argument in --local_rank=*) ;; *) arguments+=("$argument") ;; esac
done

# A step that runs srun's tasks has a small number. sbatch's and salloc's own shells are no such steps: they have none, or
# one of Slurm's reserved numbers (from 4294967280 up). SLURM_PROCID does not tell: it is 0 in sbatch's shell.
step=${SLURM_STEP_ID:-}
case $step in *[!0-9]*) step='' ;; esac
if [ -n "$step" ] && [ "$step" -ge 4294967280 ]; then step=''; fi

role=supervise
if [ -n "${RANK:-}${LOCAL_RANK:-}" ]; then
    role=worker
elif [ -n "$step" ]; then
    nodes=${SLURM_STEP_NUM_NODES:?} tasks=${SLURM_STEP_NUM_TASKS:?}
    # All nodes must agree on where rank 0 listens. The port follows from job and step, so that two jobs on a node differ.
    first=${MASTER_ADDR:-}
    if [ -z "$first" ] && [ "$nodes" -eq 1 ]; then first=127.0.0.1; fi
    if [ -z "$first" ]; then
        hosts=$(scontrol show hostnames "${SLURM_STEP_NODELIST:?}")
        first=${hosts%%[[:space:]]*}
    fi
    port=${MASTER_PORT:-$((20000 + (SLURM_JOB_ID * 7 + step) % 10000))}
    if [ "$tasks" -gt "$nodes" ]; then
        role=worker
        export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$tasks NODE_RANK=$SLURM_NODEID
        export MASTER_ADDR=$first MASTER_PORT=$port
        # SLURM_STEP_TASKS_PER_NODE reads 8(x2),4: nodes of one group follow each other.
        node=0
        for group in ${SLURM_STEP_TASKS_PER_NODE//,/ }; do
            times=1
            case $group in *x*) times=${group##*x} times=${times%)} ;; esac
            node=$((node + times))
            if [ "$SLURM_NODEID" -lt "$node" ]; then break; fi
        done
        export LOCAL_WORLD_SIZE=${group%%(*} LOCAL_SIZE=${group%%(*}
    else
        arguments=(--node_rank "$SLURM_NODEID" --num_nodes "$nodes" --master_addr "$first" --master_port "$port" "${arguments[@]}")
    fi
fi
exec "$python" -u -m trainer "$role" "${arguments[@]}"
: <<'# end of the Python part' # """
import os, sys; os.execvpe("bash", ["bash", os.path.abspath(__file__), *sys.argv[1:]], {**os.environ, "DDPM_PYTHON": sys.executable})
# end of the Python part
