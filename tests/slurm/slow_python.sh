#!/bin/bash
# Stands for the python of a job whose steps are to take a while.
exec "$REAL_PYTHON" "$(dirname "$(readlink -f "$0")")/slow.py" "$@"
