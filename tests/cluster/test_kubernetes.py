"""The manifests: valid by the published schemas, and their command run in two machines as pods would run it.

No Kubernetes runs here. What it does to a pod (variables, names, the numbers of pods, $(…) in a command, SIGTERM and a
new pod after it) is done by this file.
"""

import contextlib
import re
import signal
import subprocess
import sys

import pytest
from cluster.conftest import FLAGS, SECONDS, assert_same_losses, losses, wait_for_step
from cluster.machines import machines
from helpers import ROOT

pytestmark = pytest.mark.cluster
FOLDER = ROOT / "launch" / "cluster"
VERSIONS = ("1.31", "1.34", "1.37")  # of Kubernetes


def documents(name: str) -> dict[str, dict]:
    """The objects of a manifest by kind."""
    yaml = pytest.importorskip("yaml", reason="make test-cluster installs it")
    return {found["kind"]: found for found in yaml.safe_load_all((FOLDER / name).read_text())}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_job_and_its_service_are_valid(version):
    validator = pytest.importorskip("kubernetes_validate", reason="make test-cluster installs it")
    found = documents("kubernetes.yaml")
    assert set(found) == {"Service", "Job"}
    for each in found.values():
        validator.validate(each, version, strict=True)
    found["Job"]["spec"]["backofLimit"] = 1
    with pytest.raises(validator.ValidationError):
        validator.validate(found["Job"], version, strict=True)


def test_the_train_job_and_its_runtime_are_valid():
    """By Kubeflow's own models: no field is lost on the way through them. The job inside: by Kubernetes'."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="make test-cluster installs it")
    validator = pytest.importorskip("kubernetes_validate", reason="make test-cluster installs it")
    found = documents("trainjob.yaml")
    kinds = {
        "ClusterTrainingRuntime": models.TrainerV1alpha1ClusterTrainingRuntime,
        "TrainJob": models.TrainerV1alpha1TrainJob,
    }
    assert set(found) == set(kinds)
    for kind, model in kinds.items():
        assert model.from_dict(found[kind]).to_dict() == found[kind]
    runtime = found["ClusterTrainingRuntime"]
    assert found["TrainJob"]["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    [job] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    names = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}}
    validator.validate(names | {"spec": job["template"]["spec"]}, VERSIONS[-1], strict=True)


def test_the_names_in_the_job_fit_together():
    found = documents("kubernetes.yaml")
    service, job = found["Service"], found["Job"]
    pod = job["spec"]["template"]["spec"]
    name = job["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name} and pod["subdomain"] == service["metadata"]["name"]
    [train] = pod["containers"]
    values = {variable["name"]: variable.get("value") for variable in train["env"]}
    assert values["JAX_COORDINATOR_ADDRESS"].startswith(f"{name}-0.{pod['subdomain']}:")
    assert int(values["JAX_NUM_PROCESSES"]) == job["spec"]["parallelism"] == job["spec"]["completions"]
    rules = job["spec"]["podFailurePolicy"]["rules"]
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {train["name"]}


def pods_of_job() -> tuple[list[str], list[dict[str, str]], list[str], list[str]]:
    """Names and variables of the pods of kubernetes.yaml, what runs before all, and the command."""
    found = documents("kubernetes.yaml")
    pod = found["Job"]["spec"]["template"]["spec"]
    [before], [train] = pod["initContainers"], pod["containers"]
    assert before["env"] == train["env"]
    names = [f"{found['Job']['metadata']['name']}-{index}" for index in range(found["Job"]["spec"]["completions"])]
    fields = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    environs = []
    for index, name in enumerate(names):
        environ = {"HOSTNAME": name, "JOB_COMPLETION_INDEX": str(index)}
        for variable in train["env"]:
            if "value" not in variable:
                assert variable["valueFrom"] == {"fieldRef": {"fieldPath": fields}}
            environ[variable["name"]] = variable.get("value", str(index))
        environs.append(environ)
    return names, environs, before["command"], train["command"]


def pods_of_train_job() -> tuple[list[str], list[dict[str, str]], list[str], list[str]]:
    """The same of trainjob.yaml. The variables are those that Trainer's plugin for JAX sets (pkg/runtime/framework/
    plugins/jax/jax.go of kubeflow/trainer, August 2026)."""
    found = documents("trainjob.yaml")["TrainJob"]
    name, trainer = found["metadata"]["name"], found["spec"]["trainer"]
    names = [f"{name}-node-0-{index}" for index in range(trainer["numNodes"])]
    shared = {
        "JAX_NUM_PROCESSES": str(trainer["numNodes"]),
        "JAX_COORDINATOR_ADDRESS": f"{name}-node-0-0.{name}:29500",
    }
    own = [
        {"HOSTNAME": pod, "JOB_COMPLETION_INDEX": str(index), "JAX_PROCESS_ID": str(index)}
        for index, pod in enumerate(names)
    ]
    return names, [shared | each for each in own], ["true"], trainer["command"]


@pytest.mark.parametrize("pods", [pods_of_job, pods_of_train_job])
def test_the_command_trains_in_pods_and_goes_on_in_new_ones(pods, network, tmp_path, alone, tell):
    names, environs, before, command = pods()
    subdomain = re.fullmatch(r"[\w-]+\.([\w-]+):\d+", environs[0]["JAX_COORDINATOR_ADDRESS"])[1]
    cluster = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}  # nothing answers there
    workdir = tmp_path / "tales"
    theirs = {".venv/bin/python": sys.executable, "--config=configs/tales.py": FLAGS[0]}
    words = [theirs.get(word, word).replace("/experiments", str(tmp_path)) for word in command] + list(FLAGS[1:])
    assert f"--workdir={workdir}" in words and sys.executable in words
    (tmp_path / "network").mkdir()
    with machines(tmp_path / "network", *names, domain=subdomain) as nodes, contextlib.ExitStack() as stack:

        def start() -> list[subprocess.Popen]:
            started = []
            for node, environ in zip(nodes, environs):
                assert node.run(*before, env=cluster | environ, timeout=60).returncode == 0
                own = [re.sub(r"\$\((\w+)\)", lambda match, e=environ: e[match[1]], word) for word in words]
                pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
                started.append(stack.enter_context(node.start(*own, env=cluster | environ, **pipes)))
            return started

        first = start()
        wait_for_step(workdir, 15)
        kill_in(nodes[1])
        said = [process.communicate(timeout=SECONDS)[0] for process in first]
        assert [process.returncode for process in first] == [128 + signal.SIGTERM] * 2, said
        step = max(losses(workdir))
        assert f"stopped at step {step} of" in said[0]
        second = start()
        again = [process.communicate(timeout=SECONDS)[0] for process in second]
        assert [process.returncode for process in second] == [0, 0], again
        assert f"resumes at step {step}" in again[0]
    tell(pods.__name__, *said, *again, assert_same_losses(workdir, alone))


def kill_in(node) -> None:
    """SIGTERM to the training on a machine, as the kubelet sends it to the first process of a container."""
    assert node.run("pkill", "-TERM", "--oldest", "-f", "launch/train.py").returncode == 0
