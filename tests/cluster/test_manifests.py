"""The files that people hand to `ray up` and to Kubernetes, and the commands of docs/guides:
all that can be said of them where there is neither AWS nor Kubernetes."""

import copy
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml
from pydantic import TypeAdapter
from qe_pipelines.main import app
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli
from typer.main import get_command

from qe_dist.serve.http.endpoint import Endpoint

ROOT = Path(__file__).parents[2]
RAY = re.search(r"^ray==(\S+)$", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE)[1]


AWS = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text(encoding="utf-8"))
GUIDE = "".join((ROOT / "docs" / "guides" / name).read_text(encoding="utf-8") for name in ("cluster.md", "serving.md"))
COMMANDS = [
    *re.findall(r"^    ((?:qe-dist|ray) .+)$", GUIDE, re.MULTILINE),
    *AWS["head_start_ray_commands"],
    *AWS["worker_start_ray_commands"],
]


def parse(command: str) -> click.Context:
    """Fails where the command line has an option that the program does not have, or lacks one that it needs."""
    program, *words = shlex.split(command)
    group = {"qe-dist": get_command(app), "ray": cli}[program]
    while hasattr(group, "commands"):
        group = group.commands[words.pop(0)]
    return group.make_context(group.name, words)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_guide_and_the_files_can_be_typed(command: str) -> None:
    context = parse(command)
    if context.command.name == "submit" and context.args:  # what a job of ours runs is a command of ours
        parse(shlex.join(["qe-dist", *context.args]))


@pytest.fixture
def aws() -> dict:
    return copy.deepcopy(AWS)


@pytest.fixture
def kubernetes() -> dict[str, dict]:
    text = (ROOT / "cluster" / "kuberay.yaml").read_text(encoding="utf-8")
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


@pytest.fixture
def service() -> dict:
    found = yaml.safe_load((ROOT / "cluster" / "rayservice.yaml").read_text(encoding="utf-8"))
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", "RayService")
    return found["spec"]


def test_ray_up_takes_the_file(aws) -> None:
    """By Ray's own schema and rules, with its defaults filled in, as `ray up` does before it asks for machines."""
    validate_config(prepare_config(aws))


def test_workers_on_aws_are_spot_and_the_head_is_not(aws) -> None:
    types = aws["available_node_types"]
    assert types["gpu"]["resources"]["GPU"] == 1
    assert types["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in types[aws["head_node_type"]]["node_config"]
    assert types["gpu"]["min_workers"] < types["gpu"]["max_workers"] == aws["max_workers"]


def test_on_aws_a_token_is_wanted_and_the_dashboard_answers_the_head_alone(aws) -> None:
    options = aws["docker"]["run_options"]
    (path,) = [o.partition("RAY_AUTH_TOKEN_PATH=")[2] for o in options if "RAY_AUTH_TOKEN_PATH" in o]
    assert "--env RAY_AUTH_MODE=token" in options
    assert path in aws["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in " ".join(aws["head_start_ray_commands"])


def test_every_node_on_aws_sees_the_shared_file_system(aws) -> None:
    assert "--volume /shared:/shared" in aws["docker"]["run_options"]
    assert any(" /shared" in command for command in aws["initialization_commands"])


def test_all_files_name_the_ray_of_the_lock(aws, kubernetes, service) -> None:
    assert f":{RAY}-" in aws["docker"]["image"]
    assert kubernetes["RayJob"]["spec"]["rayClusterSpec"]["rayVersion"] == RAY
    assert service["rayClusterConfig"]["rayVersion"] == RAY


def test_the_job_on_kubernetes_is_a_command_of_ours(kubernetes) -> None:
    assert parse(kubernetes["RayJob"]["spec"]["entrypoint"]).command.name == "quantize"


def test_a_dead_driver_on_kubernetes_is_started_again_behind_a_token(kubernetes) -> None:
    job = kubernetes["RayJob"]
    assert (job["apiVersion"], job["spec"]["backoffLimit"] > 0) == ("ray.io/v1", True)
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_pods_on_kubernetes_share_the_claim_and_gpus_scale(kubernetes) -> None:
    cluster = kubernetes["RayJob"]["spec"]["rayClusterSpec"]
    (gpu,) = cluster["workerGroupSpecs"]
    claim = kubernetes["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in (cluster["headGroupSpec"], gpu):
        pod = group["template"]["spec"]
        (volume,) = pod["volumes"]
        (container,) = pod["containers"]
        assert volume["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/shared"}]
    assert gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert cluster["enableInTreeAutoscaling"]
    assert gpu["minReplicas"] <= gpu["replicas"] < gpu["maxReplicas"]
    assert gpu["template"]["spec"]["tolerations"]


def test_the_service_on_kubernetes_is_an_endpoint_of_ours_on_its_gpus(service) -> None:
    """That Ray takes its Serve config, tests/vllm/test_ray_serve.py sees: it needs ray[serve]."""
    (application,) = yaml.safe_load(service["serveConfigV2"])["applications"]
    assert application["import_path"] == "qe_cluster.serve:application"
    endpoint = TypeAdapter(Endpoint).validate_python(application["args"])
    assert set(application["args"]) <= set(vars(endpoint))
    (gpu,) = service["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = gpu["template"]["spec"]["containers"]
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) == endpoint.tensor_parallel_size
    assert gpu["replicas"] == endpoint.replicas
    assert gpu["template"]["spec"]["terminationGracePeriodSeconds"] > endpoint.drain_seconds


def test_every_pod_of_the_service_has_the_key_and_the_checkpoint_behind_a_token(service) -> None:
    cluster = service["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        (variable,) = container["env"]
        assert variable["name"] == "VLLM_API_KEY"
        assert variable["valueFrom"]["secretKeyRef"] == {"name": "qe-dist", "key": "api-key"}
        assert {"name": "shared", "mountPath": "/shared", "readOnly": True} in container["volumeMounts"]
        assert {"containerPort": 8000, "name": "serve"} in container["ports"]
