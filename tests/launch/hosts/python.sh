#!/bin/bash
# Stands for the python of hosts: the trainer of the tests in place of a run, everything else as it is. On the host
# that PLANTED_HOST names (by the address of its sshd) another version of torch is installed.
here=$(dirname "$(readlink -f "$0")")
address=$(cut -d' ' -f3 <<<"$SSH_CONNECTION")
[[ $address != "$PLANTED_HOST" ]] || export PYTHONPATH=$PLANTED_VERSION
if [[ "$1 $2 $3 $4" == "-u -m fovea pretrain" ]]; then
    shift 3
    export SLURM_PROCID=$RANK SLURM_NTASKS=$WORLD_SIZE SLURM_JOB_ID=$MASTER_PORT SLURMD_NODENAME=$address
    exec "$REAL_PYTHON" "$here/../../slurm/trainer.py" "$@"
fi
exec "$REAL_PYTHON" "$@"
