#!/bin/sh
# Install the Debian packages named as arguments, those whose program is missing, where we may. PACKAGE:PROGRAM where the
# program has another name than the package.
# Never fails: a test that needs a program which is not there skips, and says which.
set -u
missing=
for argument in "$@"; do
    command -v "${argument##*:}" >/dev/null || missing="$missing ${argument%%:*}"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" -eq 0 ]; then
    as_root=
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    as_root=sudo
else
    echo "Not installed, because only root may:$missing; the tests that need them are skipped." >&2
    exit 0
fi
command -v apt-get >/dev/null || {
    echo "Not installed, because there is no apt-get:$missing; the tests that need them are skipped." >&2
    exit 0
}
echo "Installing$missing (Debian packages) ..."
# shellcheck disable=SC2086  # a list of words
{ timeout 120 $as_root apt-get update -qq &&
    timeout 300 $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; } \
    >/dev/null 2>&1 ||
    echo "Could not be installed:$missing; the tests that need them are skipped." >&2
exit 0
