#!/bin/sh
# First run: sets everything up under installer_files/, then starts Switchyard. Later runs: starts it.
# ./start_macos.sh [subcommand] [flags]   subcommands: serve doctor convert download quantize install update rollback run test
set -eu
unset CDPATH PYTHONPATH PYTHONHOME
cd -- "$(dirname -- "$0")"

usable() {
    "$1" -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= ($2))" >/dev/null 2>&1
}

# macOS's own python3 is 3.9; Homebrew's may be off PATH when this is started from the Finder.
for newest in '3, 14' '3, 99'; do
    for folder in '' /opt/homebrew/bin/ /usr/local/bin/; do
        for python in python3 python3.13 python3.12 python3.11 python3.10 python3.14; do
            [ -n "${SWITCHYARD_PYTHON:-}" ] && python=$SWITCHYARD_PYTHON && folder=''
            if usable "$folder$python" "$newest"; then
                exec "$folder$python" one_click.py "$@"
            fi
        done
    done
done
echo "Switchyard needs Python 3.10 or newer: install it from python.org or with 'brew install python' and run this again." >&2
exit 1
