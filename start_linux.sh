#!/bin/sh
# First run: sets everything up under installer_files/, then starts Switchyard. Later runs: starts it.
# ./start_linux.sh [subcommand] [flags]   subcommands: serve doctor convert download quantize install update rollback run test
set -eu
unset CDPATH PYTHONPATH PYTHONHOME
cd -- "$(dirname -- "$0")"

usable() {
    "$1" -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= ($2))" >/dev/null 2>&1
}

for newest in '3, 14' '3, 99'; do
    for python in "${SWITCHYARD_PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10 python3.14 python; do
        if [ -n "$python" ] && usable "$python" "$newest"; then
            exec "$python" one_click.py "$@"
        fi
    done
done
echo "Switchyard needs Python 3.10 or newer: install it (sudo apt install python3 python3-venv, or your distribution's package) and run this again." >&2
exit 1
