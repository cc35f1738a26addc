#!/bin/bash
# Trains one run on several nodes of a Slurm cluster. Submit it from the root of the checkout, which all nodes must see
# (a shared file system), with train.py's flags behind it and Slurm's before it:
#
#     sbatch launch/cluster/slurm.sh --config=configs/tales.py --workdir=experiments/tales
#     sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=32 launch/cluster/slurm.sh --config=… --workdir=…
#
# `squeue --me` lists your jobs, slurm-JOB.out is the log of one, `scancel JOB` saves and ends it. The same command goes
# on with a run that was ended. PYTHON names another Python than that of `make env`.
#
#SBATCH --job-name=tale_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1      # one process a node: it takes all the GPUs, or cores, that the job has there
#SBATCH --time=24:00:00          # of one start; a run may take several
#SBATCH --signal=TERM@120        # so many seconds before that time is over all processes are told to save and end
#SBATCH --requeue                # preempted, or with a node that failed: back into the queue, to go on from what is saved
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append       # a job that starts again goes on with its log

# train.py finds the others by Slurm's variables. Fewer processes than tasks are an error, never a smaller run.
# --kill-on-bad-exit=0, for some sites have 1: processes that were told to end must not be killed while others save.
srun --kill-on-bad-exit=0 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    "${PYTHON:-.venv/bin/python}" launch/train.py "$@" --config.mesh.processes="$SLURM_NTASKS"
code=$?

# 143 is 128 + SIGTERM: all processes have saved. Here that signal came by --signal, or a preemption, since scancel
# without a signal ends this script, too. Other codes (2: a mistake, 3: memory ran out) would only come again.
if [ "$code" -eq 143 ]; then
    echo "all is saved, and job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
