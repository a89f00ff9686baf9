#!/usr/bin/env bash
# From a bare machine to a trained, scored model: sets up .venv (see venv.sh), then trains on a small embedded data set
# with every part of the system. `launch/quickstart.sh --help` lists the options.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/venv.sh" quickstart
export PYTHONSAFEPATH=1
exec "$here/../.venv/bin/python" -u -m launch.quickstart "$@"
