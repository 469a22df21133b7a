#!/bin/sh
# Make the virtual environment $1 with what Terraform's tests need (a schema-only provider, an AWS double), where there is
# a Terraform. Never fails: tests that need it skip, and say which.
set -u
tools=$1
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3
requirements=tests/infra/terraform/requirements.txt
command -v terraform >/dev/null || exit 0
cmp -s "$requirements" "$tools/requirements.txt" && exit 0
echo "Making $tools (once; for Terraform's tests, 150 MB) ..."
rm -rf "$tools"
{ "$python" -m venv "$tools" &&
    "$tools/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --requirement "$requirements" &&
    cp "$requirements" "$tools/requirements.txt"; } >/dev/null 2>&1 ||
    echo "Could not be made: $tools; the tests that need it are skipped." >&2
exit 0
