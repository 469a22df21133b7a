#!/bin/sh
# Make the virtual environment $1 with the pinned dependencies. PYTHON names the interpreter (3.11).
set -eu
venv=$1
python=$PYTHON
command -v "$python" >/dev/null || python=python3
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
    echo "ExpertScale needs Python 3.11; $python is $("$python" --version 2>&1). Set PYTHON=/path/to/python3.11." >&2
    exit 1
}
echo "Making $venv (once; a few minutes, most of it the download of torch and ray) ..."
if ! "$python" -m venv "$venv" >/dev/null 2>&1; then
    # Debian ships venv separately; install it where we may, else say what is missing.
    (apt-get update -qq && apt-get install -y -qq python3-venv) >/dev/null 2>&1 || {
        echo "Python's venv module is missing; install the package python3-venv." >&2
        exit 1
    }
    "$python" -m venv "$venv"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
