#!/usr/bin/env bash
# Makes the virtual environment .venv of this checkout: `launch/venv.sh [EXTRA]`, train by default (extras of setup.cfg).
# Checks first what pip cannot install, and prints how to get it. Running it again costs a second unless setup.cfg or the
# environment's Python changed; an interrupted run is taken up by the next. PYTHON chooses the interpreter a new .venv is
# made from (default: python3 if it is 3.11 or newer, else a newer one by name).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra=${1:-train}
case $extra in
    train | quickstart | test | benchmarks) ;;
    *)
        echo "error: unknown extra '$extra'; choose train, quickstart, test or benchmarks" >&2
        exit 2
        ;;
esac

# --- what must be there -------------------------------------------------------------------------------------------------
new_enough='import sys; sys.exit(sys.version_info < (3, 11))'
python=
for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if "$candidate" -c "$new_enough" 2>/dev/null; then
        python=$(command -v "$candidate")
        break
    elif [ -n "${PYTHON:-}" ]; then
        echo "error: PYTHON=$PYTHON is no Python 3.11 or newer; choose another or unset it" >&2
        exit 2
    fi
done
missing=()
if [ -z "$python" ]; then
    missing=(python3 python3-venv python3-dev g++) # (on distributions whose python3 is older: python3.11 and so on)
else
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' ||
        missing+=(python3-dev)
fi
if ! command -v "${CXX:-c++}" >/dev/null; then missing+=(g++); fi # DeepSpeed compiles one operator on the CPU
if [ ${#missing[@]} -gt 0 ]; then
    {
        echo "error: this machine lacks Python >= 3.11 with venv and headers, or a C++ compiler. On Debian or Ubuntu:"
        echo "    apt-get update && apt-get install -y $(printf '%s\n' "${missing[@]}" | sort -u | tr '\n' ' ')"
    } >&2
    exit 2
fi

# --- .venv --------------------------------------------------------------------------------------------------------------
exec 9<setup.cfg # two set-ups at the same time take turns; the kernel drops the lock with its owner
if ! flock --nonblock 9; then
    echo "another set-up of .venv is running; waiting for it" >&2
    flock 9
fi
usable='import sys, pip; sys.exit(sys.version_info < (3, 11))'
if ! .venv/bin/python -c "$usable" 2>/dev/null; then
    "$python" -m venv --clear .venv
fi
wanted=$({ .venv/bin/python -VV && pwd && cat setup.cfg pyproject.toml; } | sha256sum | cut -d ' ' -f 1)
if [ "$(cat ".venv/.installed-$extra" 2>/dev/null)" != "$wanted" ]; then
    echo "installing '.[$extra]' into .venv (the first time this takes minutes) ..." >&2
    if [ -t 2 ]; then quiet=(); else quiet=(--quiet); fi
    .venv/bin/python -m pip install --disable-pip-version-check "${quiet[@]}" --editable ".[$extra]" >&2
    case $extra in # the bigger extras hold the smaller
        test) extras=(train quickstart test) ;;
        quickstart) extras=(train quickstart) ;;
        *) extras=(train) ;;
    esac
    for name in "${extras[@]}"; do echo "$wanted" >".venv/.installed-$name"; done
fi

# --- DeepSpeed's operator, so that no run has to compile it ------------------------------------------------------------------
.venv/bin/python -m trainer.extensions >&2
