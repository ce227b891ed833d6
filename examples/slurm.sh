#!/bin/bash
# A run on several nodes that survives preemption and time limits: sbatch examples/slurm.sh
#
# Change what is marked. One task a GPU; the tasks find one another by SLURM's own environment. Before SLURM ends
# the job it sends SIGUSR1; fastdino-train saves, exits with 75, and the job goes back into the queue, where the
# same command continues the run. A crash is not requeued: look at it first.
#SBATCH --job-name=dino
#SBATCH --nodes=2                  # change
#SBATCH --ntasks-per-node=8        # change: GPUs of a node
#SBATCH --gpus-per-node=8          # change: the same
#SBATCH --cpus-per-task=12         # change: cores a GPU; the loader uses all but one
#SBATCH --time=24:00:00            # change
#SBATCH --signal=USR1@180          # to the tasks, three minutes before the end
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

DATA=/path/to/images               # change; all nodes must see it
OUT=/path/to/runs/vit-small-16     # change; all nodes must share it
source /path/to/venv/bin/activate  # change
export TORCHINDUCTOR_CACHE_DIR=$OUT.compiled  # what torch.compile made, for the next start

# --wait: half a minute after one task has failed the others are ended. Not --kill-on-bad-exit: tasks that leave
# with 75 a moment after the first would be killed and give another code.
srun --wait=30 --kill-on-bad-exit=0 fastdino-train vit-small-16 \
    --batch-size 1024 --data "$DATA" --out "$OUT"
code=$?
if [ $code -eq 75 ]; then
    echo "saved; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
