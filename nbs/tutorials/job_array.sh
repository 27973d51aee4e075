#!/bin/bash
# Six students of one teacher, without an engine: `sbatch nbs/tutorials/job_array.sh` in a checkout. Every task is one
# notebook; the first to need the teacher trains it while the others wait. A task that is requeued resumes.
#SBATCH --array=0-5 --requeue --open-mode=append
#SBATCH --time=04:00:00 --cpus-per-task=1 --output=job_array-%a.log
set -euo pipefail
losses=(kd dkd ldrld)
task=${SLURM_ARRAY_TASK_ID:?not set: call this with sbatch, or with SLURM_ARRAY_TASK_ID=0 for the first task}
export PATH=$PWD/.venv/bin:$PATH OMP_NUM_THREADS=1 LDRLD_OUT=${LDRLD_OUT:-$PWD/results}
mkdir -p "$LDRLD_OUT"
exec papermill nbs/run/train.ipynb "$LDRLD_OUT/task-$task.ipynb" -p profile job_array \
    -p loss "${losses[task % 3]}" -p seed $((task / 3)) "$@"  # further parameters: -p dataset cifar100 ...
