#!/bin/sh
# Creates one environment: setup.sh platform|serving FOLDER. The marker is written last, so a killed set-up is repeated.
set -eu
kind=$1 venv=$2 python=${PYTHON:-python3}
die() { echo "setup: $1" >&2; exit 1; }

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null || {
    found=missing
    if command -v "$python" >/dev/null; then found=$("$python" --version 2>&1) || found="no Python"; fi
    die "needs Python 3.11 or 3.12, but '$python' is $found; install it or run make setup PYTHON=/path/to/python3.11"
}
"$python" -c 'import ensurepip, venv' 2>/dev/null || die "this Python has no venv module; on Debian: apt-get install python3-venv"
case "$(uname -s)-$(uname -m)" in
    Linux-x86_64) ;;
    *) die "the model server's wheel exists for Linux on x86_64 only, this is $(uname -s) on $(uname -m); use such a machine or container" ;;
esac
# Both environments take 4.0 GB; the second one alone 1.2 GB.
need_mb=5000
[ "$kind" = platform ] || need_mb=1500
free_mb=$(df -Pm . | awk 'NR == 2 {print $4}')
[ "$free_mb" -ge $need_mb ] || die "needs $need_mb MB of free disk here, found $free_mb MB; free some and run again"

echo "setup: $kind environment in $venv (a few minutes the first time)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || die "could not create $venv; remove the folder and run again"
pip() { "$venv/bin/python" -m pip install $PIP_FLAGS "$@" || die "installing packages failed (see the lines above); check that a package index is reachable (pip config list) and run make setup again"; }
if [ "$kind" = platform ]; then
    pip -c constraints.txt -e '.[platform,dev]'
else
    pip -c serving/constraints.txt -e '.[serving]'
    pip --no-deps -c serving/constraints.txt nvidia-pytriton
fi
touch "$venv/.ready"
