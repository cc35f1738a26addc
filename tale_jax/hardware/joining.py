"""How the processes of a run find one another, and how they end together.

    with joined(config.mesh, workdir, Place(...)):
        ...                                   # `jax.distributed` is started, where there are several

Which process this is, and where the others are, is known from flags, from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
and JAX_PROCESS_ID (which Kubeflow sets), from Open MPI's variables, or as JAX finds it under Slurm, Open MPI 4 and
Kubernetes. How many there must be is a hard number: fewer are an error within a minute, never a smaller run.

A process that is lost would leave the others waiting in a collective, some of them for ever. So each writes a beat into
the coordination service every two seconds, in a thread, and looks at those of the others: who has been silent for half
a minute, or says that it ended by an error, is named in one line, and the process ends.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import ipaddress
import json
import os
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import jax
from jax._src import clusters, distributed  # how JAX finds launchers has no public name without joining at once

from tale_jax.config import MeshConfig
from tale_jax.hardware.coordinator import Coordinator
from tale_jax.hardware.distributed import wait_for_processes
from tale_jax.utils.manifests import MANIFEST
from tale_jax.utils.settings import mistake
from tale_jax.utils.signals import before_exit
from tale_jax.utils.streams import write_line
from tale_jax.utils.subprocesses import PACKAGE_ROOT

JOIN_SECONDS = 50.0  # for all to come
BEAT_SECONDS = 2.0
LOST_BEATS = 15  # looks at another process in which its beat did not change
GRACE_BEATS = 5  # looks that one has to end by itself, when another has ended by an error: by the same one, mostly
DETECT = "auto_detect_unset_distributed_params"  # JAX's function that asks the launcher
ROOM = "tale_jax/watch"  # of the keys in the coordination service
FIRST_PORT, PORTS = 61440, 4096  # where JAX, too, puts the coordinator of a job
NAMES = {"coordinator_address": "JAX_COORDINATOR_ADDRESS", "num_processes": "JAX_NUM_PROCESSES"}
NAMES["process_id"] = "JAX_PROCESS_ID"


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process of a run this is: number `index` of `count`, which all meet at `address` (HOST:PORT of process 0).

    `source` says how that is known.
    """

    address: str
    count: int
    index: int
    source: str


def find_place(
    address: str = "", count: int = 0, index: int = -1, environ: Mapping[str, str] = os.environ
) -> Place | None:
    """The place of this process; None where nothing says that there are others.

    Args:
      address, count, index: as flags give them; "", 0 and -1 where they do not.
      environ: variables of the environment.

    Raises:
      ValueError: one line, for a place that is not whole, or makes no sense.
    """
    given = {"coordinator_address": address, "num_processes": count or "", "process_id": index if index >= 0 else ""}
    known = {name: str(value) or environ.get(NAMES[name], "") for name, value in given.items()}
    if known["num_processes"] or known["process_id"] or given["coordinator_address"]:
        return _place_of(known)
    if "OMPI_COMM_WORLD_SIZE" in environ and "OMPI_MCA_orte_hnp_uri" not in environ:
        return _open_mpi_place(environ, known["coordinator_address"])
    in_kubernetes = "KUBERNETES_SERVICE_HOST" in environ and importlib.util.find_spec("kubernetes") is None
    if in_kubernetes:  # JAX would ask the cluster's API by that package
        return None
    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            known["coordinator_address"] or None, None, None, None, None, int(JOIN_SECONDS)
        )
    except Exception as error:  # whatever a launcher's variables, or the API of a cluster, lead to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"the launcher's processes are not found ({reason}); give --coordinator_address=HOST:PORT, "
            "--num_processes and --process_id"
        ) from None
    if found[1] is None or found[2] is None:
        return None
    return Place(str(found[0]), int(found[1]), int(found[2]), "the launcher")


def _place_of(known: Mapping[str, str]) -> Place:
    """The place that flags and variables of JAX say."""
    for name, variable in NAMES.items():
        if not known[name]:
            others = " and ".join(f"{other}={known[other]}" for other in NAMES if known[other])
            raise ValueError(f"{name} is missing beside {others}; give --{name}, or set {variable}")
    for name in ("num_processes", "process_id"):
        if not re.fullmatch(r"\d{1,6}", known[name]):
            raise mistake(name, known[name], "be a whole number", f"give --{name}, or set {NAMES[name]} right")
    count, index = int(known["num_processes"]), int(known["process_id"])
    if not re.fullmatch(r"\S+:\d{1,5}", known["coordinator_address"]):
        rule = "be HOST:PORT, of a port that is free where process 0 runs"
        remedy = "try --coordinator_address=127.0.0.1:8476 for processes on one machine"
        raise mistake("coordinator_address", known["coordinator_address"], rule, remedy)
    if not 0 <= index < count:
        rule = f"be below num_processes={count}, for they count from 0"
        raise mistake("process_id", index, rule, f"give --process_id=0 to --process_id={max(0, count - 1)}")
    return Place(known["coordinator_address"], count, index, "--num_processes")


def _open_mpi_place(environ: Mapping[str, str], address: str) -> Place:
    """The place in a run of Open MPI 5, which JAX does not find without mpi4py: process 0 runs where mpirun does."""
    count, index = int(environ["OMPI_COMM_WORLD_SIZE"]), int(environ.get("OMPI_COMM_WORLD_RANK", "0"))
    job = re.fullmatch(r"\w+-(.+)-(\d+)@(\d+)", environ.get("PMIX_NAMESPACE", ""))
    if not address and not job and count > 1:
        raise ValueError(
            f"Open MPI says that there are {count} processes, and not where process 0 runs (PMIX_NAMESPACE="
            f"{environ.get('PMIX_NAMESPACE', '')}); give --coordinator_address=HOST:PORT"
        )
    if not address and job:
        address = f"{job[1]}:{FIRST_PORT + (int(job[2]) + int(job[3])) % PORTS}"
    return Place(address, count, index, "Open MPI")


def check_count(wanted: int, place: Place | None, environ: Mapping[str, str] = os.environ) -> None:
    """Raises ValueError, in one line, unless there are as many processes as `mesh.processes` says (0: however many), or
    where a launcher has started several and this one knows of no other."""
    count = place.count if place else 1
    if wanted and wanted != count:
        rule = f"be the number of processes, which is {count}" + (f" by {place.source}" if place else "")
        remedy = f"start as many, or set --config.mesh.processes={count}"
        raise mistake("mesh.processes", wanted, rule, remedy)
    if wanted or place:
        return
    alone = "or set --config.mesh.processes=1 to train with this process alone"
    if int(tasks := environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" not in environ:
        raise ValueError(
            f"SLURM_NTASKS={tasks} tasks were asked for, and this process is none; run srun python …, {alone}"
        )
    if number := environ.get("JOB_COMPLETION_INDEX"):
        raise ValueError(
            f"JOB_COMPLETION_INDEX={number} says that this is one of several pods, and not where they are; set "
            f"JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or pip install kubernetes, {alone}"
        )


@contextmanager
def joined(mesh: MeshConfig, workdir: Path, place: Place | None) -> Iterator[bool]:
    """Inside it the processes of a run are connected (where `place` says that there are several), and end together.

    Call it before anything starts a backend of JAX. It yields whether this process tells of the results.

    Args:
      mesh: its `processes` says how many there must be; 0: as many as there are.
      workdir: whose last checkpoint is named when a process is lost.
      place: of `find_place`.

    Raises:
      ValueError: one line, when there are not so many.
    """
    check_count(mesh.processes, place)
    if place is None or place.count == 1:
        yield True
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # the default of JAX since 0.5
    _connect(place)
    with _Watch(place, workdir) as watch:
        _current.append(watch)
        try:
            yield place.index == 0
            wait_for_processes()
        except SystemExit:  # the end that all came to
            wait_for_processes()
            raise
        finally:
            _current.clear()
    jax.distributed.shutdown()


_current: list["_Watch"] = []  # the watch of this process, where it is one of several


def tell_error(error: BaseException) -> None:
    """Tells the other processes that this one ends by an error, before it waits for anything that they take part in."""
    for watch in _current:
        watch.tell(error)


def _connect(place: Place) -> None:
    """`jax.distributed.initialize`, with the coordination service in a process of its own."""

    def give_up() -> None:
        _quit(
            f"not all of the {place.count} processes (by {place.source}) were there within {JOIN_SECONDS:.0f} s: this "
            f"is process {place.index}, and they meet at {place.address}; start all of them, or, where they were, "
            "look at whether that address is process 0's machine and can be reached"
        )

    timer = threading.Timer(JOIN_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    library: Any = getattr(distributed, "_jax", None) or distributed.xla_extension  # pyright: ignore
    environment: Any = clusters.ClusterEnv
    usual, detect = library.get_distributed_runtime_service, vars(environment)[DETECT]
    try:
        library.get_distributed_runtime_service = lambda *_, **__: Coordinator(place.address, place.count)
        # JAX would ask the launcher once more, for the GPUs: it takes one, even where this process has a whole machine,
        # and fails under Open MPI 5.
        setattr(environment, DETECT, lambda *given: given[:4])
        devices = choose_gpus()
        jax.distributed.initialize(place.address, place.count, place.index, devices, initialization_timeout=600)
        if own := _own_address(place):
            library.make_gloo_tcp_collectives = functools.partial(library.make_gloo_tcp_collectives, hostname=own)
    finally:
        library.get_distributed_runtime_service = usual
        setattr(environment, DETECT, detect)
        timer.cancel()


def _own_address(place: Place) -> str:
    """Where the others reach this process. Without it gloo takes what the machine's own name stands for, which is
    127.0.1.1 where Debian's installer has written /etc/hosts, and the machine's name is not always known at all.

    It is the address from which this process reaches process 0; on the machine of process 0, where that may be a
    loopback address, the one at which a process elsewhere reaches it."""
    host, _, port = place.address.rpartition(":")
    own, target, ways = "", "", []
    with contextlib.suppress(OSError):  # a name that only gRPC understands
        ways = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)
    for family, kind, _, _, end in sorted(ways, key=lambda way: way[0] != socket.AF_INET):
        with socket.socket(family, kind) as probe, contextlib.suppress(OSError):
            probe.connect(end)  # sends nothing: the system chooses the way
            own, target = own or str(probe.getsockname()[0]), target or str(end[0])
    client: Any = distributed.global_state.client
    client.key_value_set(f"{ROOM}/reached/{place.index}", target)
    client.wait_at_barrier(f"{ROOM}/reached", int(JOIN_SECONDS * 1000))
    if not own or ipaddress.ip_address(own).is_loopback:
        targets = [value for _, value in client.key_value_dir_get(f"{ROOM}/reached") if value]
        own = next((value for value in targets if not ipaddress.ip_address(value).is_loopback), own)
    return own


def choose_gpus(environ: Mapping[str, str] = os.environ) -> list[int] | None:
    """Which of the GPUs that this process sees are its own: one, where a launcher has started several processes on this
    machine and shows all GPUs to each of them; None: all that it sees, or what JAX_LOCAL_DEVICE_IDS says."""
    index, count = environ.get("OMPI_COMM_WORLD_LOCAL_RANK", ""), environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # 4(x3),2: four on each of three nodes, two on another one
    if tasks and not index:
        found = re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks)
        counts = [number for number, times in found for _ in range(int(times or 1))]
        index, count = environ.get("SLURM_LOCALID", ""), counts[int(environ.get("SLURM_NODEID", "0"))]
    visible = environ.get("CUDA_VISIBLE_DEVICES", "").strip(",")
    is_told = "JAX_LOCAL_DEVICE_IDS" in environ or (visible and "," not in visible)
    return None if is_told or not index or int(count) == 1 else [int(index)]


class _Watch:
    """The thread that says that this process is there, and ends it when another one is not."""

    def __init__(self, place: Place, workdir: Path):
        self._place, self._workdir = place, workdir
        self._client: Any = distributed.global_state.client
        self._stop, self._told = threading.Event(), ""
        self._seen: dict[int, tuple[str, int]] = {}  # process → its last beat, and looks since it changed
        self._failures = self._since_told = 0
        self._ended_looks: dict[int, int] = {}  # looks since another process told of an error
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None or isinstance(error, SystemExit):
            self._stop.set()
            self._thread.join()
            return
        # A collective fails where another process was lost: the watch is about to name it, and to end this one.
        if not _is_ours(error):
            self._stop.wait((LOST_BEATS + 3) * BEAT_SECONDS)
        if not self._told:
            self._tell(error)
        before_exit.append(os._exit)  # not by JAX's end, which waits for all the others

    def tell(self, error: BaseException) -> None:
        """See `tell_error`. What another process may be the cause of is not told before that is known."""
        if not self._told and _is_ours(error):
            self._tell(error)

    def _tell(self, error: BaseException) -> None:
        self._told = " ".join(str(error).split()) or type(error).__name__
        with contextlib.suppress(Exception):  # whatever JAX raises where the service is gone
            self._client.key_value_set(f"{ROOM}/ended/{self._place.index}", self._told)

    def _run(self) -> None:
        host, number = f"{socket.gethostname()}, process {os.getpid()}", 0
        while not self._stop.wait(BEAT_SECONDS if number else 0):
            number += 1
            beat = json.dumps([number, host])
            try:
                self._client.key_value_set(f"{ROOM}/beat/{self._place.index}", beat, allow_overwrite=True)
                beats, ended = self._read("beat"), self._read("ended")
            except Exception:  # whatever JAX raises
                self._failures += 1
                if self._failures >= GRACE_BEATS and not self._stop.is_set():
                    self._end("process 0", "its coordination service cannot be reached")
                continue
            self._failures = 0
            self._look(beats, ended)

    def _read(self, name: str) -> dict[int, str]:
        found = self._client.key_value_dir_get(f"{ROOM}/{name}")
        return {int(key.rpartition("/")[2]): value for key, value in found}

    def _look(self, beats: Mapping[int, str], ended: Mapping[int, str]) -> None:
        """Ends this process where another one is silent, or has ended by an error that is not this one's, too."""
        self._since_told += bool(self._told)
        if self._since_told > 2 * GRACE_BEATS:  # what it waits for does not come
            _quit(self._told)
        for index in range(self._place.count):
            if index == self._place.index:
                continue
            beat, silence = self._seen.get(index, ("", 0))
            silence = silence + 1 if beats.get(index, "") == beat else 0
            self._seen[index] = beats.get(index, ""), silence
            if index in ended and not self._told:
                self._ended_looks[index] = self._ended_looks.get(index, 0) + 1
                if self._ended_looks[index] > GRACE_BEATS:
                    self._end(self._name(index), f"ended by an error: {ended[index]}")
            elif silence >= LOST_BEATS:
                seconds = LOST_BEATS * BEAT_SECONDS
                self._end(self._name(index), f"is lost: nothing was heard of it for {seconds:.0f} s")

    def _name(self, index: int) -> str:
        beat = self._seen[index][0]
        where = f" ({json.loads(beat)[1]})" if beat else ""
        return f"process {index} of {self._place.count}{where}"

    def _end(self, who: str, what: str) -> NoReturn:
        step = _last_checkpoint(self._workdir)
        kept = f"the checkpoint of step {step} is whole" if step else "no checkpoint was written before"
        _quit(f"{who} {what}; {kept}, and the same command goes on from there")


def _last_checkpoint(workdir: Path) -> int:
    """The newest step with a manifest, which is written last; 0 where there is none."""
    steps = [
        int(path.parent.name) for path in workdir.glob(f"checkpoints/[0-9]*/{MANIFEST}") if path.parent.name.isdecimal()
    ]
    return max(steps, default=0)


def _is_ours(error: BaseException | None) -> bool:
    """Whether an error, and what it came from, was raised by tale_jax, or by the system: then no other process is the
    cause. What JAX and orbax raise, a process that is lost may have led to."""
    while error is not None:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        file = trace.tb_frame.f_code.co_filename if trace is not None else ""
        is_of_system = isinstance(error, KeyboardInterrupt) or (isinstance(error, OSError) and bool(error.errno))
        if not is_of_system and not file.startswith(str(PACKAGE_ROOT / "tale_jax")):
            return False
        error = error.__cause__
    return True


def _quit(line: str) -> NoReturn:
    """Ends this process at once, with a line that says why."""
    with contextlib.suppress(Exception):  # a stream that is gone must not keep it
        write_line(f"error: {line}")
    os._exit(2)
