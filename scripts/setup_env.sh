#!/usr/bin/env bash
# Makes the environment of `make demo` and `make test`: scripts/setup_env.sh VENV
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:?usage: scripts/setup_env.sh VENV}
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "halfweight needs Python 3.10 or newer; $python is $("$python" --version 2>&1)" >&2
    exit 1
fi
# An environment of another Python, or a broken one, is made anew; a good one is only brought up to date.
version='import sys; print(sys.version_info[:3])'
if [ "$("$venv/bin/python" -c "$version" 2>/dev/null)" != "$("$python" -c "$version")" ]; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi

# Some of the pinned releases have left Python 3.10 behind; there pip chooses.
pins=(-c constraints.txt)
if "$python" -c 'import sys; sys.exit(sys.version_info >= (3, 11))'; then
    pins=()
fi
install=("$venv/bin/python" -m pip --disable-pip-version-check install ${pins[@]+"${pins[@]}"})

if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    # PyPI's Linux build of torch carries gigabytes of CUDA, so torch is taken from the index of CPU builds. That may
    # be out of reach: pip gives up on it soon, and takes what it finds elsewhere.
    cpu=https://download.pytorch.org/whl/cpu
    "${install[@]}" --no-deps --retries 1 --timeout 15 --extra-index-url "$cpu" torch || true
fi
"${install[@]}" -e '.[dev]'

# mypy wants a folder with the package's name (see pyproject.toml).
mkdir -p "$venv/typing"
ln -sfn "$PWD" "$venv/typing/halfweight"
