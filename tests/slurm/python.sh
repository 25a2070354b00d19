#!/bin/bash
# Stands for the python of a job: the trainer of the tests in place of a run, everything else as it is.
here=$(dirname "$(readlink -f "$0")")
if [[ "$1 $2" == "-m fovea" && $3 =~ ^(pretrain|finetune)$ ]]; then
    shift 2
    exec "$REAL_PYTHON" "$here/trainer.py" "$@"
fi
exec "$REAL_PYTHON" "$@"
