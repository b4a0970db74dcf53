#!/bin/sh
# Finds a Python 3.11 to 3.13 that really runs (a pyenv shim may exist and fail), then hands over to bootstrap.py.
# PYTHON=... names one. The virtual env's own interpreter goes first: a second run costs nothing.
set -eu
cd "$(dirname "$0")/.."

supported() { "$1" -I -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }
complete() { "$1" -I -c 'import ensurepip, venv' >/dev/null 2>&1; }

if [ -z "${PYTHON:-}" ] && supported .venv/bin/python; then
    exec .venv/bin/python -I deploy/bootstrap.py
fi

without_venv=
if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.12 python3.13 python3.11 python; fi
for candidate in "$@"; do
    supported "$candidate" || continue
    complete "$candidate" && exec "$candidate" -I deploy/bootstrap.py
    without_venv="$candidate"
done

if [ -n "$without_venv" ]; then
    echo "setup: $without_venv lacks the venv module with ensurepip (Debian, Ubuntu: install python3-venv), or name another interpreter with PYTHON=..." >&2
elif [ -n "${PYTHON:-}" ]; then
    echo "setup: PYTHON=$PYTHON is not a working Python 3.11, 3.12 or 3.13" >&2
else
    echo "setup: no working Python 3.11, 3.12 or 3.13 found on PATH; name one with PYTHON=/path/to/python3" >&2
fi
exit 1
