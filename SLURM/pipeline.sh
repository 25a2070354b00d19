#!/bin/bash
# Pretrain, then finetune from its release on several tasks, each as soon as the release exists. Edit and run on a
# login node:  bash SLURM/pipeline.sh
# or:  fovea launch slurm pipeline CONFIG key=value ... --finetune 'CONFIG key=value ...' --finetune ...
set -euo pipefail

run=/scratch/$USER/mae
pretrain=(configs/pretrain/mae_vit_base.yaml data.shards=/data/in1k/train "run_dir=$run")
tasks=(configs/finetune/mae_vit_base_imagenet.yaml)

first=$(sbatch --parsable SLURM/pretrain.sbatch "${pretrain[@]}")
echo "job $first: pretrain to $run"
for task in "${tasks[@]}"; do
    # A requeued job keeps its id. If pretraining stops without a release, these jobs are cancelled instead of waiting.
    next=$(sbatch --parsable --dependency="afterok:$first" --kill-on-invalid-dep=yes SLURM/finetune.sbatch "$task" \
        "model.release=$run/release" "run_dir=$run-$(basename "$task" .yaml)")
    echo "job $next: $task"
done
