#!/usr/bin/env bash
# Evaluates every checkpoint of a run as it appears: `launch/eval.sh RUN [options]` is `ddpm eval watch RUN [options]`.
# Any number of these may run at once, anywhere the run's URL is readable: they share the work by leases.
#
# EVAL_PROCESSES  processes that evaluate each checkpoint together, one per GPU (default 1): more than one are started by
#                 torchrun on this machine.
# DDPM_PYTHON     the Python to use; without it: the activated virtual environment's, else the one launch/venv.sh made
#                 beside this folder, else python3.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

python=${DDPM_PYTHON:-}
if [ -z "$python" ]; then
    python=$here/../.venv/bin/python
    if [ -n "${VIRTUAL_ENV:-}" ] || [ ! -x "$python" ]; then python=python3; fi
fi
export PYTHONSAFEPATH=1 # a folder named eval/ where the user stands is not this system's

processes=${EVAL_PROCESSES:-1}
case $processes in
    '' | *[!0-9]* | 0*)
        echo "EVAL_PROCESSES=$processes: must be a positive number; set it to the GPUs of this machine or unset it" >&2
        exit 2
        ;;
    1) exec "$python" -u -m launch.cli eval watch "$@" ;;
    *) exec "$python" -u -m torch.distributed.run --standalone --nproc-per-node "$processes" -m launch.cli eval watch "$@" ;;
esac
