"""kuberay.yaml, cluster.yaml, the Dockerfile and the commands of docs/cluster.md, without a cluster."""

import copy
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import kubernetes.client
import pytest
import yaml
from mlflow.cli import cli as mlflow_cli
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_cli

from distributed import run
from distributed.config import ExperimentConfig, validate

ROOT = Path(__file__).parents[2]
CLUSTER, KUBERAY = ROOT / "cluster.yaml", ROOT / "kuberay.yaml"
DOCUMENTS = {document["kind"]: document for document in yaml.safe_load_all(KUBERAY.read_text())}
DOCKERFILE = (ROOT / "Dockerfile").read_text()
GUIDE = (ROOT / "docs" / "cluster.md").read_text()
SCHEMA = yaml.safe_load((Path(__file__).parent / "kuberay_schema.yaml").read_text())
RUN = "python -m distributed.run "

# ---- types of Kubernetes

PLAIN: dict[str, type | tuple[type, ...]] = {
    "str": str, "int": int, "float": (int, float), "bool": bool, "datetime": str, "object": (int, str),
}  # fmt: skip
"""The client's names of types; `object` is a number or a name, as of a port."""
CHOICES = {
    ("V1PodSpec", "restartPolicy"): ["Always", "OnFailure", "Never"],
    ("V1Toleration", "operator"): ["Exists", "Equal", "Lt", "Gt"],
    ("V1Toleration", "effect"): ["NoSchedule", "PreferNoSchedule", "NoExecute"],
    ("V1EmptyDirVolumeSource", "medium"): ["", "Memory"],
    ("V1NetworkPolicyPort", "protocol"): ["TCP", "UDP", "SCTP"],
    ("V1SeccompProfile", "type"): ["RuntimeDefault", "Localhost", "Unconfined"],
    ("V1Container", "imagePullPolicy"): ["Always", "IfNotPresent", "Never"],
}
"""Where Kubernetes allows only some strings."""
QUANTITY = re.compile(SCHEMA["$defs"]["quantity"]["pattern"])
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def problems_of_type(kind: str, value: Any, where: str) -> Iterator[str]:
    """What is wrong with `value` as a `kind` of the Kubernetes client: unknown fields, types, required fields, choices."""
    item = re.fullmatch(r"list\[(.+)\]", kind)
    entry = re.fullmatch(r"dict[\[(]str, (.+)[\])]", kind)
    if item or entry:
        if not isinstance(value, list if item else dict):
            yield f"{where}: {value!r} is no {kind}"
            return
        for key, part in enumerate(value) if item else value.items():
            yield from problems_of_type((item or entry)[1], part, f"{where}.{key}")
    elif kind in PLAIN:
        if not isinstance(value, PLAIN[kind]) or (isinstance(value, bool) and kind != "bool"):
            yield f"{where}: {value!r} is no {kind}"
    else:
        yield from problems_of_model(kind, value, where)


def problems_of_model(kind: str, value: Any, where: str) -> Iterator[str]:
    model = getattr(kubernetes.client, kind)
    fields = {name: attribute for attribute, name in model.attribute_map.items()}
    if not isinstance(value, dict):
        yield f"{where}: {value!r} is no {kind}"
        return
    for name, part in value.items():
        if name not in fields:
            yield f"{where}: {kind} has no field {name}"
            continue
        yield from problems_of_type(model.openapi_types[fields[name]], part, f"{where}.{name}")
        if part not in CHOICES.get((kind, name), [part]):
            yield f"{where}.{name}: {part!r} is not allowed"
        if name == "name" and kind in ("V1ObjectMeta", "V1Container", "V1Volume") and not NAME.fullmatch(str(part)):
            yield f"{where}.{name}: {part!r} is no name of Kubernetes'"
        if name in ("requests", "limits", "sizeLimit"):
            for quantity in part.values() if isinstance(part, dict) else [part]:
                if not QUANTITY.match(str(quantity)):
                    yield f"{where}.{name}: {quantity!r} is no quantity"
    try:
        model(**{attribute: value.get(name) for name, attribute in fields.items()})
    except ValueError as error:
        yield f"{where}: {kind}: {error}"


def _kubernetes(_: Any, kind: str, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    for problem in problems_of_type(kind, value, kind):
        yield jsonschema.ValidationError(problem)


Checker = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"kubernetes": _kubernetes})

# ---- kuberay.yaml as a whole


def pods(documents: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Pod templates of the RayJob."""
    spec = documents["RayJob"]["spec"]
    cluster = spec["rayClusterSpec"]
    found = {"submitter": spec["submitterPodTemplate"], "head": cluster["headGroupSpec"]["template"]}
    return found | {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}


def problems(documents: dict[str, Any]) -> list[str]:
    """What Kubernetes, KubeRay or Ray would refuse, or what would not fit together."""
    found = [
        f"{list(error.absolute_path)}: {error.message}" for error in Checker(SCHEMA).iter_errors(documents["RayJob"])
    ]
    for kind, model in (("PersistentVolumeClaim", "V1PersistentVolumeClaim"), ("NetworkPolicy", "V1NetworkPolicy")):
        found += problems_of_type(model, documents[kind], kind)
    if found:
        return found
    cluster = documents["RayJob"]["spec"]["rayClusterSpec"]
    for name, pod in pods(documents).items():
        found += [f"{name}: {problem}" for problem in problems_of_pod(pod, documents)]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        words = ["--head"] if group is groups[0] else ["--address=head:6379"]
        # KubeRay writes them into a shell command
        words += [word for key, value in group["rayStartParams"].items() for word in shlex.split(f"--{key}={value}")]
        found += problems_of_command(ray_cli, ["start", *words])
    try:
        _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "n", "namespace": "n"}, "spec": cluster})
    except Exception as error:  # Ray raises what it pleases
        found.append(f"autoscaler: {error!r}")
    return found


def problems_of_pod(pod: dict[str, Any], documents: dict[str, Any]) -> Iterator[str]:
    selected = documents["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    if not selected.items() <= pod["metadata"]["labels"].items():
        yield f"the NetworkPolicy does not hold for labels {pod['metadata']['labels']}"
    volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
    for volume in volumes.values():
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim not in (None, documents["PersistentVolumeClaim"]["metadata"]["name"]):
            yield f"there is no claim {claim}"
    whole = pod["spec"]["securityContext"]
    if whole.get("runAsNonRoot") is not True or whole.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "pod security"
    for container in pod["spec"]["containers"]:
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False or context.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{container['name']}: container security"
        resources = container.get("resources", {})
        if not resources.get("limits") or resources.get("requests") != resources["limits"]:
            yield f"{container['name']}: requests are not limits"
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"{container['name']}: there is no volume {mount['name']}"
        if container.get("command", [""])[0] == "mlflow":
            yield from problems_of_command(mlflow_cli, container["command"][1:])


def problems_of_command(group: click.Command, words: list[str]) -> Iterator[str]:
    """What the command-line parser of a program says of a command, which is not run."""
    try:
        while isinstance(group, click.Group):
            name, group = words[0], group.commands[words[0]]
            words = words[1:]
        group.make_context(name, words)
    except (click.ClickException, KeyError) as error:
        yield f"{words}: {error!r}"


def parsed(command: str, capsys: pytest.CaptureFixture[str]) -> ExperimentConfig:
    """The configuration that a command with `-m distributed.run` would run with."""
    words = shlex.split(command.split("-m distributed.run", 1)[1])
    if "--resume" in words:  # there is no such folder here
        del words[words.index("--resume") : words.index("--resume") + 2]
    assert run.main([*words, "--print-config"]) == 0
    return validate(yaml.safe_load(capsys.readouterr().out))


def changed(path: str, value: Any) -> dict[str, Any]:
    """kuberay.yaml with the field at a dotted path replaced, or, where `value` is ..., left out."""
    documents = copy.deepcopy(DOCUMENTS)
    *parents, last = path.split(".")
    place: Any = documents
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    last_key: Any = int(last) if isinstance(place, list) else last
    if value is ...:
        del place[last_key]
    else:
        place[last_key] = value
    return documents


def test_kuberay_would_take_it():
    assert set(DOCUMENTS) == {"PersistentVolumeClaim", "NetworkPolicy", "RayJob"}
    assert len(list(yaml.safe_load_all(KUBERAY.read_text()))) == 3
    assert problems(DOCUMENTS) == []


HEAD = "RayJob.spec.rayClusterSpec.headGroupSpec"
WORKER = "RayJob.spec.rayClusterSpec.workerGroupSpecs.0"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("RayJob.spec.backoffLimits", 0),
        ("RayJob.spec.backoffLimit", "0"),
        ("RayJob.spec.entrypoint", ...),
        ("RayJob.spec.entrypoint", ["python"]),
        ("RayJob.spec.submissionMode", "K8SJobMode"),
        ("RayJob.spec.shutdownAfterJobFinishes", False),
        ("RayJob.spec.rayClusterSpec.authOptions.mode", "on"),
        ("RayJob.spec.rayClusterSpec.enableInTreeAutoScaling", True),
        ("RayJob.spec.rayClusterSpec.autoscalerOptions.version", 2),
        ("RayJob.spec.rayClusterSpec.autoscalerOptions.securityContext.privilege", False),
        (f"{HEAD}.template", ...),
        (f"{HEAD}.rayStartParams.dashboard-host", True),
        (f"{HEAD}.rayStartParams.dashboard-hosts", "0.0.0.0"),
        (f"{HEAD}.template.spec.volumes.0.emptyDir.medium", "memory"),
        (f"{HEAD}.template.spec.volumes.0.emptyDir.sizeLimit", "9GB"),
        (f"{HEAD}.template.spec.volumes.1.persistentVolumeClaim.claimName", "other"),
        (f"{HEAD}.template.spec.volumes.1.persistentVolumeClaim.claimName", ...),
        (f"{HEAD}.template.spec.tolerations.0.effect", "NoScheduling"),
        (f"{HEAD}.template.spec.containers.0.env.0.value", 5000),
        (f"{HEAD}.template.spec.containers.0.name", ...),
        (f"{HEAD}.template.spec.containers.0.volumeMounts.0.mountpath", "/dev/shm"),
        (f"{HEAD}.template.spec.containers.0.volumeMounts.0.name", "other"),
        (f"{HEAD}.template.spec.containers.0.securityContext.allowPrivilegeEscalation", True),
        (f"{HEAD}.template.spec.containers.0.resources.limits.cpu", "6"),
        (f"{HEAD}.template.spec.containers.0.resources.limits.cpu", 5),
        (f"{HEAD}.template.spec.containers.1.command.2", "--hosts=127.0.0.1"),
        (f"{WORKER}.maxReplicas", -1),
        (f"{WORKER}.minReplicas", ...),
        (f"{WORKER}.groupName", "Rollout"),
        (f"{WORKER}.rayStartParams.resources", '"{rollout: 1}"'),
        (f"{WORKER}.template.spec.restartPolicy", "No"),
        (f"{WORKER}.template.spec.securityContext.runAsNonRoot", False),
        (f"{WORKER}.template.metadata.labels.app", "other"),
        ("NetworkPolicy.spec.ingress.0.from.0.podselector", {}),
        ("NetworkPolicy.spec.policyTypes", "Ingress"),
        ("PersistentVolumeClaim.spec.resources.requests.storage", "200GB"),
        ("PersistentVolumeClaim.metadata.name", "Sequence_Flows"),
    ],
)
def test_a_mistake_in_it_is_found(path, value):
    assert problems(changed(path, value))


def test_the_run_fits_its_pods(capsys):
    spec = DOCUMENTS["RayJob"]["spec"]
    config = parsed(spec["entrypoint"], capsys)
    cluster = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "n", "namespace": "n"}, "spec": spec["rayClusterSpec"]}
    )
    groups = cluster["available_node_types"]
    head, worker = groups["headgroup"]["resources"], groups["rollout"]["resources"]
    assert worker[config.actors.rollout_resource] >= 1
    assert config.actors.rollout_resource not in head
    assert head["GPU"] >= config.actors.learner_num_gpus
    assert head["CPU"] >= config.actors.learner_num_cpus
    room = groups["rollout"]["max_workers"] * int(worker["CPU"] / config.actors.num_cpus)
    assert room >= config.actors.max_rollout_actors
    containers = {c["name"]: c for c in pods(DOCUMENTS)["head"]["spec"]["containers"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in containers["ray-head"]["volumeMounts"]}
    assert mounts["/data"] == "data"
    assert config.run.output_folder.is_relative_to("/data")
    environment = {entry["name"]: entry["value"] for entry in containers["ray-head"]["env"]}
    served = dict(word.removeprefix("--").split("=", 1) for word in containers["mlflow"]["command"] if "=" in word)
    assert environment["MLFLOW_TRACKING_URI"] == f"http://{served['host']}:{served['port']}"
    assert served["backend-store-uri"].startswith("sqlite:////data/")
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


def test_only_the_cluster_and_the_operator_come_in():
    spec = DOCUMENTS["NetworkPolicy"]["spec"]
    own, operator = spec["ingress"]
    assert own == {"from": [{"podSelector": spec["podSelector"]}]}
    assert [port["port"] for port in operator["ports"]] == [8265]
    assert all(peer["podSelector"]["matchLabels"] for peer in operator["from"])


def test_shared_memory_holds_the_object_store_of_ray():
    """Ray takes 30% of the memory for it."""
    for name in ("head", "rollout"):
        spec = pods(DOCUMENTS)[name]["spec"]
        memory = int(spec["containers"][0]["resources"]["limits"]["memory"].removesuffix("Gi"))
        shared = next(volume["emptyDir"] for volume in spec["volumes"] if "emptyDir" in volume)
        assert int(shared["sizeLimit"].removesuffix("Gi")) >= 0.3 * memory


# ---- cluster.yaml


def cluster_values() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER.read_text())


def test_a_host_is_set_up_by_what_the_project_itself_depends_on():
    """A name that is no dependency would never be there, and each start of a host would install everything again."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    (imported,) = re.findall(r'python -c "import (.*?)"', "\n".join(cluster_values()["setup_commands"]))
    assert set(imported.split(", ")) <= dependencies


def test_ray_up_would_take_cluster_yaml():
    validate_config(prepare_config(cluster_values()))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (None, "idle_timeout", 5),
        (None, "max_workers", "8"),
        (None, "head_node_type", "gpu"),
        ("auth", "user", "ubuntu"),
        ("available_node_types", "rollout", {"resource": {"rollout": 1}}),
    ],
)
def test_ray_up_would_refuse_a_mistake(section, key, value):
    values = cluster_values()
    (values[section] if section else values)[key] = value
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(prepare_config(values))


def start_commands(key: str) -> list[list[str]]:
    """Words after `ray` or `mlflow` in the shell commands that start a node."""
    found = [
        re.search(r"~/venv/bin/(?:ray|mlflow) ((?:start|server) [^;>]*)", command) for command in cluster_values()[key]
    ]
    return [shlex.split(match[1]) for match in found if match]


@pytest.mark.parametrize(("key", "count"), [("head_start_ray_commands", 2), ("worker_start_ray_commands", 1)])
def test_the_commands_that_start_nodes_parse(key, count):
    commands = start_commands(key)
    assert len(commands) == count
    for words in commands:
        assert list(problems_of_command(mlflow_cli if words[0] == "server" else ray_cli, words)) == []


def test_a_stopped_job_has_time_to_save():
    (seconds,) = re.findall(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", " ".join(cluster_values()["head_start_ray_commands"]))
    assert int(seconds) >= 60


def test_workers_say_the_resources_that_the_autoscaler_expects(capsys):
    (words,) = start_commands("worker_start_ray_commands")
    resources = json.loads(next(w for w in words if w.startswith("--resources=")).removeprefix("--resources="))
    values = cluster_values()
    assert resources == values["available_node_types"]["rollout"]["resources"]
    assert values["available_node_types"]["rollout"]["max_workers"] <= values["max_workers"]
    (command,) = runs_in(CLUSTER.read_text().replace("#", " "))
    assert parsed(command, capsys).actors.rollout_resource in resources


# ---- commands of the guide


def commands_in(text: str) -> list[str]:
    """Commands of the text blocks; a line that is set in continues the one before."""
    blocks = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    return [
        " ".join(re.sub(r"\s+# .*", "", line) for line in command.splitlines()).strip()
        for block in blocks
        for command in re.split(r"\n(?=\S)", block)
    ]


def runs_in(text: str) -> list[str]:
    """Commands with `python -m distributed.run` and their options, over lines and up to a quote."""
    found = re.findall(r"-m distributed\.run((?:\s+(?:--?[\w.-]+|[\w./]+))*)(?='|\n)", text)
    return [f"{RUN}{' '.join(words.split())}" for words in found]


def test_runs_of_the_guide_parse(capsys):
    commands = [command.removesuffix("'") for command in commands_in(GUIDE) if "-m distributed.run" in command]
    sections = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)]
    entrypoints = [section["spec"]["entrypoint"] for section in sections if "spec" in section]
    assert (len(commands), len(entrypoints)) == (3, 1)
    for command in commands + entrypoints:
        config = parsed(command, capsys)
        if "auto" in command:
            assert (config.run.address, config.actors.rollout_resource) == ("auto", "rollout")
        if command.startswith("ray job submit") and "--resume" not in command:
            assert config.run.output_folder.is_absolute()


def test_a_wrong_key_in_a_run_is_found(capsys):
    with pytest.raises(ValueError, match=r"actors\.rollout_resources"):
        parsed(f"{RUN}--actors.rollout_resources rollout", capsys)


def test_ray_knows_its_commands_in_the_guide():
    commands = [command for command in commands_in(GUIDE) if command.startswith("ray ")]
    assert len(commands) >= 12
    for command in commands:
        assert list(problems_of_command(ray_cli, shlex.split(command)[1:])) == []
    assert list(problems_of_command(ray_cli, ["job", "stop", "--adress", "http://localhost:8265", "first"]))


def test_names_of_the_guide_are_those_of_the_manifest():
    assert DOCUMENTS["RayJob"]["metadata"]["name"] == "sequence-flows"
    image = pods(DOCUMENTS)["head"]["spec"]["containers"][0]["image"]
    labels = pods(DOCUMENTS)["head"]["metadata"]["labels"]
    assert {c["image"] for pod in pods(DOCUMENTS).values() for c in pod["spec"]["containers"]} == {image}
    assert f"docker build -t {image} ." in commands_in(GUIDE)
    assert f"app={labels['app']},ray.io/node-type=head" in GUIDE
    assert {"ray-head", "mlflow"} == {c["name"] for c in pods(DOCUMENTS)["head"]["spec"]["containers"]}


# ---- the image


def copied(folder: Path) -> None:
    """What `COPY . .` brings, by .dockerignore: all is left out but what it names."""
    lines = (ROOT / ".dockerignore").read_text().split()
    assert lines[0] == "*"
    for name in (line.removeprefix("!") for line in lines if line.startswith("!")):
        source = ROOT / name
        copy_one = shutil.copytree if source.is_dir() else shutil.copy
        copy_one(source, folder / name)


def test_the_image_has_what_a_run_needs(tmp_path):
    copied(tmp_path)
    code = "import learner; from distributed.run import main; assert main(['--print-config']) == 0; print(learner.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "learner" / "__init__.py")
    project = re.search(r'readme = "(.+)"', (ROOT / "pyproject.toml").read_text())
    assert project
    assert (tmp_path / project[1]).exists()


def test_versions_of_the_image_are_those_of_the_manifest_and_the_checks():
    ray_version = re.search(r'"ray\[default,tune,train\]==([\d.]+)"', DOCKERFILE)
    torch_version = re.search(r"torch==([\d.]+)", DOCKERFILE)
    assert ray_version
    assert torch_version
    assert DOCUMENTS["RayJob"]["spec"]["rayClusterSpec"]["rayVersion"] == ray_version[1]
    assert f"torch=={torch_version[1]}\n" in (ROOT / ".ci" / "run").read_text()
    least = re.search(r'"ray\[default,tune,train\]>=(\d+)\.(\d+)', (ROOT / "pyproject.toml").read_text())
    assert least
    assert tuple(map(int, ray_version[1].split(".")))[:2] >= tuple(map(int, least.groups()))
    user = re.search(r"useradd --uid (\d+).*\nUSER (\d+)", DOCKERFILE)
    assert user
    assert {str(pod["spec"]["securityContext"]["runAsUser"]) for pod in pods(DOCUMENTS).values()} == set(user.groups())


@pytest.mark.parametrize("path", [CLUSTER, KUBERAY, ROOT / "Dockerfile", ROOT / "docs" / "cluster.md"])
def test_modules_that_are_named_exist(path):
    named = set(re.findall(r"-m ((?:distributed|learner|actors)[\w.]*)", path.read_text()))
    assert named or path.name == "Dockerfile"
    assert all(importlib.util.find_spec(name) for name in named)
