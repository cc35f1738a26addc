"""Trains one run on a Ray cluster: each of so many workers runs one process of launch/train.py.

python launch/cluster/ray_train.py --workers=2 --config=configs/tales.py --workdir=experiments/tales

Ray is an extra: make env EXTRAS=dev,ray. Without RAY_ADDRESS it starts a cluster of this machine alone, with as many
workers as fit. For several machines: `ray start --head` on one, `ray start --address=HEAD:6379` on the others, and this
command on any of them, with RAY_ADDRESS=auto. All need the checkout, its .venv and the workdir under the same paths
(a shared file system), and RAY_process_group_cleanup_enabled=1 where Ray is started: with a worker that is killed, its
training ends. On a cluster: ray job submit -- .venv/bin/python launch/cluster/ray_train.py …

A worker that fails, or whose machine is taken away, makes Ray end all of them and start them anew, on the machines that
are left or come: the run goes on from its last checkpoint. After --max_failures of that kind the command fails. SIGTERM
to one of the training processes saves on all before that. Ctrl-C here ends the run without a save: what
checkpoint.every_steps asked for is kept, and the same command goes on.
"""

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

try:
    import ray
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
except ImportError as error:
    print(f"error: {error.name} is missing in {sys.executable}; run make env EXTRAS=dev,ray", file=sys.stderr)
    sys.exit(2)

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def train_on_worker(settings: dict[str, Any]) -> None:
    """One process of the run, on each worker. A process of its own, for Ray calls this in a thread, where no signal
    arrives. It starts `jax.distributed` itself: Ray's JaxTrainer does so on GPU and TPU only."""
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    with socket.socket() as free:
        free.bind(("", 0))
        own = f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"
    address = broadcast_from_rank_zero(own)
    place = [f"--coordinator_address={address}", f"--num_processes={size}", f"--process_id={rank}"]
    # Fewer processes are an error, never a smaller run.
    command = [sys.executable, str(TRAIN), *settings["flags"], f"--config.mesh.processes={size}", *place]
    if code := subprocess.call(command, cwd=settings["folder"]):
        raise RuntimeError(f"process {rank} of {size} ended with exit code {code}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--workers", type=int, required=True, help="processes, each on a worker of its own")
    parser.add_argument("--cpus", type=float, default=1, help="cores that Ray keeps for each")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs that each sees")
    parser.add_argument("--max_failures", type=int, default=3, help="how often the run is started again; -1: always")
    given, flags = parser.parse_known_args()  # what it does not know is for train.py
    os.environ.setdefault("RAY_process_group_cleanup_enabled", "1")  # for a cluster that starts here
    ray.init()
    trainer = DataParallelTrainer(
        train_on_worker,
        train_loop_config={"flags": flags, "folder": os.getcwd()},
        scaling_config=ray.train.ScalingConfig(
            num_workers=given.workers,
            use_gpu=given.gpus > 0,
            resources_per_worker={"CPU": given.cpus} | ({"GPU": given.gpus} if given.gpus else {}),
            placement_strategy="SPREAD",  # over the machines
        ),
        run_config=ray.train.RunConfig(failure_config=ray.train.FailureConfig(max_failures=given.max_failures)),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        reason = str(error).strip().splitlines()[-1]
        print(f"error: the run failed more than {given.max_failures} times; the last time: {reason}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
