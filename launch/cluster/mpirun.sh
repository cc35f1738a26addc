#!/bin/bash
# Trains one run on several machines by Open MPI (4 or 5), which starts a process on each over ssh; no scheduler is
# needed. Run it at the root of the checkout, on one of the machines. The others must let you in by ssh without a
# password, and have the checkout, its .venv and the workdir under the same paths (a shared file system).
#
#     HOSTS=node1,node2 launch/cluster/mpirun.sh --config=configs/tales.py --workdir=experiments/tales
#
# The first machine must be this one: the processes meet here. HOSTS=node1:4,node2:4 starts four processes on each, one
# a GPU. Under PBS, LSF or Slurm leave HOSTS out: mpirun asks the scheduler. PYTHON names another Python than that of
# `make env`. What mpirun itself should know goes into variables: OMPI_MCA_plm_rsh_agent="ssh -p 2222".
#
# To stop: Ctrl-C, or `kill` this command, as schedulers do before they take the machines away. All processes save and
# end, and the same command goes on. It also does after a machine was lost, which ends the processes on the others.

# --bind-to none: else each process may use a core or two only. mpirun refuses root unless root says that it is meant.
options=(--bind-to none)
[ -z "${HOSTS:-}" ] || options+=(--host "$HOSTS")
[ "$(id -u)" != 0 ] || options+=(--allow-run-as-root)

# mpirun answers SIGTERM by killing all processes a second later, but SIGUSR1 it hands to them, and then they save, too.
# In a session of its own (setsid) it does not see the Ctrl-C that this script gets.
setsid mpirun "${options[@]}" "${PYTHON:-.venv/bin/python}" launch/train.py "$@" &
mpirun=$! stopped=""
trap 'stopped=129; kill -USR1 "$mpirun"' HUP
trap 'stopped=130; kill -USR1 "$mpirun"' INT
trap 'stopped=143; kill -USR1 "$mpirun"' TERM
wait "$mpirun"
code=$?
while kill -0 "$mpirun" 2>/dev/null; do # a signal ends `wait`, not mpirun
    wait "$mpirun"
    code=$?
done
saved=$((128 + $(kill -l USR1)))
[ -z "$stopped" ] || [ "$code" -ne "$saved" ] || code=$stopped
exit "$code"
