"""Where a process finds its place among others, and how many there must be. Processes that train: test_processes.py."""

import socket

import pytest

from tale_jax.hardware.coordinator import Coordinator
from tale_jax.hardware.joining import Place, check_count, choose_gpus, find_place

FLAGS = {"address": "node1:8476", "count": 3, "index": 1}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "PMIX_NAMESPACE": "prterun-node7-4021@1"}


def test_flags_and_variables_of_jax_say_the_same():
    place = Place("node1:8476", 3, 1, "--num_processes")
    assert find_place(**FLAGS, environ={}) == place
    environ = {"JAX_COORDINATOR_ADDRESS": "node1:8476", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "1"}
    assert find_place(environ=environ) == place
    assert find_place(index=2, environ=environ) == Place("node1:8476", 3, 2, "--num_processes")


def test_a_process_that_nobody_launched_is_alone():
    assert find_place(environ={}) is None
    check_count(0, None, {})
    check_count(1, None, {"SLURM_NTASKS": "3", "JOB_COMPLETION_INDEX": "1"})


def test_open_mpi_5_names_its_machine_in_the_namespace():
    place = find_place(environ=OPEN_MPI)
    assert place == find_place(environ=OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "2"})
    assert place is not None and (place.count, place.index) == (4, 2) and place.address.startswith("node7:6")
    others = find_place(environ=OPEN_MPI | {"PMIX_NAMESPACE": "prterun-node7-4022@1"})
    assert others is not None and others.address != place.address


@pytest.mark.parametrize(
    ("flags", "message", "remedy"),
    [
        ({"count": 2}, "coordinator_address is missing beside num_processes=2; give", {"index": 0, "address": "a:1"}),
        ({"count": 2, "index": 0, "address": "node"}, r"coordinator_address=.*node.* must be", {"address": "node:1"}),
        ({"count": 2, "index": 2, "address": "a:1"}, "process_id=2 must be below num_processes=2", {"index": 1}),
    ],
)
def test_a_place_that_is_corrected_as_told_is_one(flags, message, remedy):
    with pytest.raises(ValueError, match=message):
        find_place(**flags, environ={})
    assert find_place(**flags | remedy, environ={})


def test_a_number_that_is_none_is_named_with_its_variable():
    with pytest.raises(ValueError, match=r"num_processes=.*two.* must be a whole number; give --num_processes"):
        find_place(environ={"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "a:1"})


def test_an_open_mpi_without_a_machine_takes_an_address():
    environ = OPEN_MPI | {"PMIX_NAMESPACE": "job"}
    with pytest.raises(ValueError, match=r"not where process 0 runs .*; give --coordinator_address"):
        find_place(environ=environ)
    environ["JAX_COORDINATOR_ADDRESS"] = "a:1"
    assert find_place(environ=environ) == Place("a:1", 4, 2, "Open MPI")


def test_fewer_or_more_than_stated_are_refused():
    for place, count in ((None, 1), (Place("a:1", 4, 0, "Slurm"), 4)):
        with pytest.raises(ValueError, match=rf"mesh\.processes=3 must be the number .*, which is {count}.*={count}"):
            check_count(3, place, {})
        check_count(count, place, {})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"SLURM_NTASKS": "3"}, "SLURM_NTASKS=3 tasks were asked for, .* srun .*mesh.processes=1"),
        ({"JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETION_INDEX=0 says .* one of several pods.*mesh.processes=1"),
    ],
)
def test_a_job_of_several_never_becomes_a_smaller_run(environ, message):
    with pytest.raises(ValueError, match=message):
        check_count(0, None, environ)
    check_count(1, None, environ)


@pytest.mark.parametrize(
    ("environ", "gpus"),
    [
        ({}, None),
        ({"SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, None),
        ({"SLURM_LOCALID": "3", "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x3),1"}, [3]),
        ({"SLURM_LOCALID": "0", "SLURM_NODEID": "3", "SLURM_STEP_TASKS_PER_NODE": "4(x3),1"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, [0]),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, None),
    ],
)
def test_a_process_takes_all_gpus_of_its_machine_or_its_own_one(environ, gpus):
    assert choose_gpus(environ) == gpus
    assert choose_gpus(environ | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}) == gpus
    assert choose_gpus(environ | {"CUDA_VISIBLE_DEVICES": "2"}) is None  # the launcher has given it one
    assert choose_gpus(environ | {"JAX_LOCAL_DEVICE_IDS": "1,2"}) is None


def test_a_launcher_that_is_not_understood_is_done_without(monkeypatch):
    for name in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID"):
        monkeypatch.setenv(f"SLURM_{name}", "none")
    with pytest.raises(ValueError, match=r"launcher's processes are not found .*; give --coordinator_address"):
        find_place()
    assert find_place(**FLAGS) == Place("node1:8476", 3, 1, "--num_processes")


def test_a_port_that_is_taken_is_named_and_another_one_serves():
    with socket.socket(socket.AF_INET6) as taken, socket.socket() as free:
        taken.bind(("::", 0))
        taken.listen()
        with pytest.raises(ValueError, match=r"coordinator_address=127.0.0.1:\d+ must have a port that is free"):
            Coordinator(f"127.0.0.1:{taken.getsockname()[1]}", 2)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    Coordinator(f"127.0.0.1:{port}", 2).shutdown()
