#!/bin/sh
# Install the Debian packages named as arguments, those whose program is missing, where we may. PACKAGE:PROGRAM where the
# program has another name than the package.
# Never fails: a test that needs a program which is not there skips, and says which. A service that comes with a package
# is stopped and disabled: the tests start the program themselves.
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
timeout 120 $as_root apt-get update -qq >/dev/null 2>&1
# One by one: a package that this Debian does not have must not take the others with it.
for package in $missing; do
    timeout 300 $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" \
        >/dev/null 2>&1 ||
        echo "Could not be installed: $package; the tests that need it are skipped." >&2
    # Neither fails the whole: there may be no systemd, and no service of that name.
    if [ -d /run/systemd/system ]; then
        $as_root systemctl disable --now "$package" >/dev/null 2>&1
    elif [ -x "/etc/init.d/$package" ]; then
        $as_root "/etc/init.d/$package" stop >/dev/null 2>&1
        $as_root update-rc.d "$package" disable >/dev/null 2>&1
    fi
done
exit 0
