"""Manifests as they are rendered: fields, security, one version of Ray, real commands."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml

import offtower
from offtower.cli import app
from offtower.config import parse_config
from tests.cluster.kustomize import documents, render

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
FOLDERS = (
    *("overlays/cpu", "overlays/gpu", "overlays/dev"),
    *("jobs/train", "jobs/train-gpu", "jobs/evaluate", "ray-serve"),
)
"""What is applied, below `cluster/kubernetes`."""
SCHEMA = json.loads((Path(__file__).parent / "schema.json").read_text(encoding="utf-8"))
KUBERNETES = "1.34"


@cache
def rendered(folder: str) -> tuple[dict[str, Any], ...]:
    return tuple(render(CLUSTER / "kubernetes" / folder))


def everything() -> Iterator[tuple[str, dict[str, Any]]]:
    for folder in FOLDERS:
        for document in rendered(folder):
            yield f"{folder}: {document['kind']} {document['metadata']['name']}", document


def check(document: dict[str, Any]) -> None:
    """Check a resource of KubeRay by its fields, pods and others by Kubernetes' schemas."""
    if document["apiVersion"] == "ray.io/v1":
        schema = {"$ref": f"#/$defs/{document['kind']}", "$defs": SCHEMA["$defs"]}
        jsonschema.Draft202012Validator(schema).validate(document)
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    for name, template in pods(document):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}}
        kubernetes_validate.validate({**pod, "spec": template["spec"]}, KUBERNETES, strict=True)


def ray_cluster(document: dict[str, Any]) -> dict[str, Any] | None:
    """The specification of a RayCluster, or of the one that a job or a service starts."""
    spec: dict[str, Any] = document["spec"] if document["apiVersion"] == "ray.io/v1" else {}
    if document["kind"] == "RayCluster":
        return spec
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig")


def ray_clusters() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, document in everything():
        spec = ray_cluster(document)
        if spec is not None:
            yield name, spec


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]


def pods(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and templates of the pods of a resource."""
    spec = ray_cluster(document)
    if spec is not None:
        for group in groups(spec):
            yield group.get("groupName", "head"), group["template"]
        if "submitterPodTemplate" in document["spec"]:
            yield "submitter", document["spec"]["submitterPodTemplate"]
    elif document["kind"] in ("Deployment", "StatefulSet"):
        yield "pod", document["spec"]["template"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_field_is_known_and_typed(folder: str) -> None:
    for document in rendered(folder):
        check(document)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", FOLDERS)
def test_the_renderer_gives_what_kustomize_gives(folder: str) -> None:
    command = ["kubectl", "kustomize", str(CLUSTER / "kubernetes" / folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    given = {(d["kind"], d["metadata"]["name"]): d for d in yaml.safe_load_all(done.stdout)}
    assert given == {(d["kind"], d["metadata"]["name"]): d for d in rendered(folder)}


def test_what_there_is() -> None:
    kinds = {(d["kind"], d["metadata"]["name"]) for _, d in everything()}
    assert {
        ("RayJob", "offtower-train"),
        ("RayJob", "offtower-train-gpu"),
        ("RayJob", "offtower-evaluate"),
        ("RayCluster", "offtower"),
        ("RayService", "offtower-ray-serve"),
        ("Deployment", "offtower-serve"),
        ("NetworkPolicy", "offtower"),
        ("PodDisruptionBudget", "offtower-serve"),
    } <= kinds
    (spec,) = [s for name, s in ray_clusters() if name == "overlays/cpu: RayCluster offtower"]
    assert spec["gcsFaultToleranceOptions"]["redisAddress"].startswith("offtower-redis:")
    assert spec["authOptions"] == {"mode": "token", "secretName": "offtower-token"}
    for _, claim in everything():
        if claim["kind"] == "PersistentVolumeClaim":
            assert claim["spec"]["storageClassName"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["spec"].update(rayVerson="2.60.0"), "rayVerson"),
        (lambda d: d["spec"]["headGroupSpec"].pop("template"), "template"),
        (lambda d: d["spec"]["autoscalerOptions"].update(version="v3"), "v3"),
        (
            lambda d: d["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0].update(cpu=1),
            "cpu",
        ),
        (lambda d: d["spec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}), "0"),
    ],
)
def test_the_check_refuses_mistakes(change: Any, words: str) -> None:
    (found,) = [d for d in rendered("overlays/cpu") if d["kind"] == "RayCluster"]
    cluster = copy.deepcopy(found)
    change(cluster)
    with pytest.raises(
        (jsonschema.ValidationError, kubernetes_validate.ValidationError), match=words
    ):
        check(cluster)


def test_a_duplicate_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("kind: A\nkind: B\n")
    with pytest.raises(yaml.YAMLError, match="duplicate keys"):
        documents(tmp_path / "twice.yaml")


def test_pods_keep_to_the_restricted_standard() -> None:
    """Pod Security Standards, profile "restricted"; and what a cluster's rules may ask for."""
    count = 0
    for name, document in everything():
        for pod, template in pods(document):
            spec, where = template["spec"], f"{name}, {pod}"
            assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "offtower", where
            security = spec["securityContext"]
            assert security["runAsNonRoot"] is True and security["runAsUser"] > 0, where
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}, where
            for key in ("hostNetwork", "hostPID", "hostIPC"):
                assert key not in spec, where
            for volume in spec.get("volumes", []):
                assert "hostPath" not in volume, where
            if pod != "submitter":
                assert security["fsGroup"] > 0, where
                assert spec["terminationGracePeriodSeconds"] >= 60, where
                assert "kubernetes.io/arch" in spec["nodeSelector"], where
            if pod != "head":
                assert spec["automountServiceAccountToken"] is False, where
            for container in spec["containers"]:
                inner = container["securityContext"]
                assert inner["allowPrivilegeEscalation"] is False, where
                assert inner["capabilities"] == {"drop": ["ALL"]}, where
                assert set(container["resources"]) == {"limits", "requests"}, where
                assert not [e for e in container.get("env", []) if "TOKEN" in e["name"]], where
                count += 1
        if document["kind"] in ("RayJob", "RayCluster", "RayService"):
            queue = document["metadata"]["labels"].get("kueue.x-k8s.io/queue-name")
            assert queue == (None if name.startswith("overlays/dev") else "offtower")
            spec = ray_cluster(document)
            assert spec is not None
            security = spec["autoscalerOptions"]["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
    assert count > 20


def test_network_policies_and_budgets_select_the_pods() -> None:
    for folder in ("overlays/cpu", "overlays/gpu", "overlays/dev"):
        found = rendered(folder)
        labels = [t["metadata"]["labels"] for d in found for _, t in pods(d)]
        labels += [{"ray.io/cluster": "offtower", "ray.io/node-type": "head"}]  # By KubeRay.
        for document in found:
            selector = document["spec"].get("podSelector") if "spec" in document else None
            if document["kind"] == "PodDisruptionBudget":
                selector = document["spec"]["selector"]
            if selector is not None:
                wanted = selector["matchLabels"].items()
                assert any(wanted <= one.items() for one in labels), document["metadata"]["name"]
            if document["kind"] == "NetworkPolicy":
                assert all(rule.get("from") for rule in document["spec"]["ingress"])


def test_jobs_on_gpus_have_several_for_each_node_shared_memory_and_nccl() -> None:
    (job,) = rendered("jobs/train-gpu")
    (cluster,) = [d for d in rendered("overlays/gpu") if d["kind"] == "RayCluster"]
    for document in (job, cluster):
        spec = ray_cluster(document)
        assert spec is not None
        pod = spec["workerGroupSpecs"][-1]["template"]["spec"]
        (container,) = pod["containers"]
        assert int(container["resources"]["limits"]["nvidia.com/gpu"]) > 1
        assert container["image"].endswith("-cuda")
        assert {e["name"] for e in container["env"]} >= {"NCCL_SOCKET_IFNAME", "NCCL_DEBUG"}
        (shared,) = [v for v in pod["volumes"] if v["name"] == "shared-memory"]
        assert shared["emptyDir"] == {"medium": "Memory", "sizeLimit": "32Gi"}
        assert [t["key"] for t in pod["tolerations"]] == ["nvidia.com/gpu"]


def test_the_servers_of_the_manifests_take_their_options() -> None:
    for folder in ("overlays/cpu", "overlays/dev"):
        (deployment,) = [d for d in rendered(folder) if d["kind"] == "Deployment"]
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        given = parse(container["command"])
        mounts = {m["mountPath"] for m in container["volumeMounts"]}
        for key in ("run", "spool", "token_file", "tls_cert", "tls_key"):
            assert any(str(given[key]).startswith(mount) for mount in mounts), key
        assert given["port"] == container["ports"][0]["containerPort"]
        grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        stop = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert grace > given["grace"] + stop
    (service,) = rendered("ray-serve")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    assert application["import_path"] == "offtower.jobs.serve:application"
    from offtower.jobs.serve import ServeArguments

    ServeArguments(**application["args"])


def test_one_version_of_ray_everywhere() -> None:
    """In images, rayVersion, the container file, the tested pin and the minimum version."""
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    version = pinned[1]
    least = re.search(r'"ray\[[a-z,]+\]>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text())
    assert least is not None
    assert version.startswith(f"{least[1]}.")
    container = (CLUSTER / "Containerfile").read_text()
    assert re.findall(r"^ARG RAY_VERSION=(\S+)$", container, re.MULTILINE) == [version]
    tag = re.compile(
        rf"^(?:registry.example.com/)?offtower:{re.escape(offtower.__version__)}-ray{re.escape(version)}-(cpu|cuda)$"
    )
    for name, spec in ray_clusters():
        assert spec["rayVersion"] == version, name
        for group in groups(spec):
            for container_spec in group["template"]["spec"]["containers"]:
                assert tag.match(container_spec["image"]), (name, container_spec["image"])
    up = documents(CLUSTER / "ray-up.yaml")[0]
    assert tag.match(up["docker"]["image"])
    for image in re.findall(r"-t (offtower:\S+)", container):
        assert tag.match(image)


def test_heads_run_no_worker_and_pods_mount_what_they_name() -> None:
    for name, spec in ray_clusters():
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", name
        assert spec["authOptions"]["mode"] == "token", name
        assert spec["autoscalerOptions"]["version"] == "v2", name
        for group in groups(spec):
            pod = group["template"]["spec"]
            volumes = {volume["name"] for volume in pod["volumes"]}
            for container in pod["containers"]:
                mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
                assert set(mounts) == volumes, name
                assert mounts["runs"] == "/data"
                # Kubernetes can reclaim what exceeds the request.
                assert container["resources"]["limits"] == container["resources"]["requests"]


DRAIN, STOP = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "RAY_JOB_STOP_WAIT_TIME_S"


def test_pods_outlive_the_checkpoint_of_a_drained_node() -> None:
    """Ray drains a node on SIGTERM; its workers hear of it within seconds and write checkpoints."""
    for name, document in everything():
        spec = ray_cluster(document)
        if spec is None:
            continue
        for group in groups(spec):
            pod = group["template"]["spec"]
            given = {one["name"]: one["value"] for one in pod["containers"][0].get("env", [])}
            head = "groupName" not in group
            if head and document["kind"] == "RayService":
                continue
            seconds = int(given[STOP if head else DRAIN])
            assert 60 <= seconds <= pod["terminationGracePeriodSeconds"] - 20, name
    package = Path(str(metadata.distribution("ray").locate_file("ray")))
    for variable, module in ((DRAIN, "_private/ray_constants.py"), (STOP, "dashboard")):
        files = (
            [package / module] if module.endswith(".py") else (package / module).rglob("job*.py")
        )
        assert any(variable in file.read_text(encoding="utf-8") for file in files), variable
    head = documents(CLUSTER / "ray-up.yaml")[0]["head_start_ray_commands"][-1]
    assert f"{STOP}=" in head


def parse(command: list[str]) -> dict[str, Any]:
    """Parse a command by the real command line."""
    assert command[0] == "offtower"
    group = typer.main.get_command(app)
    verb = group.commands[command[1]]  # type: ignore[attr-defined]
    with verb.make_context(command[1], command[2:]) as context:
        return dict(context.params)


def commands() -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    for name, document in everything():
        if document["kind"] == "RayJob":
            yield name, document["spec"], shlex.split(document["spec"]["entrypoint"])


def test_commands_parse_and_their_workers_fit() -> None:
    found = list(commands())
    assert [command[1] for _, _, command in found] == ["train", "train", "evaluate"]
    for name, spec, command in found:
        given = parse(command)
        assert given["ray"] == "auto", name
        workers = int(str(given["workers"]).split("-")[-1])
        room = 0
        for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            fits = [float(limits["cpu"]) // float(given["worker_cpus"])]
            if memory := float(given.get("worker_memory") or 0.0):
                # Ray's memory resource excludes the object store.
                fits.append((float(limits["memory"].removesuffix("Gi")) - 1.0) * 0.95 // memory)
            if gpus := int(given.get("worker_gpus") or 0):
                fits.append(int(limits["nvidia.com/gpu"]) // gpus)
            room += group["maxReplicas"] * int(min(fits))
        assert room >= workers, name


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(Exception, match="--wrokers"):
        parse(["offtower", "evaluate", "run", "--wrokers", "2"])


def test_train_and_evaluate_use_one_configuration() -> None:
    (evaluated,) = [c for _, _, c in commands() if c[1] == "evaluate"]
    for folder, root in (("overlays/cpu", "s3://"), ("overlays/dev", "/data/")):
        (config,) = [d for d in rendered(folder) if d["kind"] == "ConfigMap"]
        parsed = parse_config(yaml.safe_load(config["data"]["config.yaml"]))
        assert str(parsed.run_directory) == evaluated[2]
        assert str(parsed.data.train).startswith(root)


def test_the_cluster_file_matches_the_schema_of_ray() -> None:
    found = [f for f in metadata.files("ray") or [] if f.name == "ray-schema.json"]
    schema = json.loads(Path(str(found[0].locate())).read_text())
    (document,) = documents(CLUSTER / "ray-up.yaml")
    jsonschema.validate(document, schema)
    document["avaliable_node_types"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)
    heads = document["available_node_types"][document["head_node_type"]]
    assert heads["resources"] == {"CPU": 0}


def test_the_container_file_copies_existing_files_and_runs_commands() -> None:
    """As far as a machine without a daemon can tell."""
    text = (CLUSTER / "Containerfile").read_text()
    # A comment between continued lines is no part of the command.
    lines = re.sub(r"\n\s*#[^\n]*(?=\n)", "", text).replace("\\\n", " ").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    stages = {line.split()[-1] for line in lines if re.match(r"FROM .* AS ", line)}
    assert {"compiler-cpu", "compiler-cuda", "wheel"} == stages
    declared = {line.split()[1].split("=")[0] for line in lines if line.startswith("ARG ")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in lines:
        if line.startswith("COPY --from="):
            assert line.split()[1].removeprefix("--from=") in stages
        elif line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
        elif line.startswith("FROM ") and "compiler-$" not in line:
            # A tag, and room for a digest.
            assert re.match(r"FROM docker\.io/[\w./-]+:\S+\$\{\w+_DIGEST\}", line), line
        elif line.startswith("RUN "):
            subprocess.run(["sh", "-n", "-c", line.removeprefix("RUN ")], check=True)
            for asked in re.findall(r"offtower-\*\.whl\)\[([\w,]+)\]", line):
                assert set(asked.split(",")) <= set(extras)
        assert set(re.findall(r"\$\{(\w+)", line)) <= declared, line
    last = lines[max(n for n, line in enumerate(lines) if line.startswith("FROM ")) :]
    assert [line for line in last if line.startswith("USER ")] == ["USER 1000:100"]


TORCH_CUDA = {"2.13.0": "13.0"}
"""CUDA of its wheel for Linux in pip's default index, whose Requires-Dist names cuda-toolkit."""


def container_arguments() -> dict[str, str]:
    """Arguments of the container file with their defaults."""
    text = (CLUSTER / "Containerfile").read_text()
    found = re.findall(r"^ARG (\w+)=(.*)$", text, re.MULTILINE)
    return {name: value.strip('"') for name, value in found}


def test_cuda_of_the_kernels_is_that_of_the_torch_wheel() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    (torch,) = [line.removeprefix("torch==") for line in pins if line.startswith("torch==")]
    assert container_arguments()["CUDA_VERSION"] == TORCH_CUDA[torch]


def test_the_programs_of_the_container_file_pass_on_this_build_alone() -> None:
    """With torch for CPUs: the image for CPUs is accepted, one for GPUs and another Ray are not."""
    text = (CLUSTER / "Containerfile").read_text().replace("\\\n", " ")
    programs = re.findall(r'python -c "([^"]+)"', text)
    assert len(programs) == 2

    def run(**changes: str) -> None:
        for program in programs:
            for name, value in {**container_arguments(), **changes}.items():
                program = program.replace(f"${{{name}}}", value)
            assert "${" not in program
            exec(program, {})

    run()
    changes: list[dict[str, str]] = [{"RAY_VERSION": "2.59.0"}]
    if "+cpu" in metadata.version("torch"):
        changes.append({"VARIANT": "cuda"})
    for change in changes:
        with pytest.raises(AssertionError):
            run(**change)


FAKE_RAY = """#!/bin/sh
if [ "$2" = status ]; then
  echo "Job '$3' $STATUS"
else
  printf "%s\\n" "$RAY_API_SERVER_ADDRESS" "$@"
  exit "$SUBMITTED"
fi
"""


def fake_ray(tmp_path: Path, status: str = "succeeded", submitted: int = 0) -> dict[str, str]:
    """An environment whose `ray` prints its arguments, and the status of a job."""
    (tmp_path / "ray").write_text(FAKE_RAY)
    (tmp_path / "ray").chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    return {"PATH": path, "STATUS": status, "SUBMITTED": str(submitted)}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["train", "a.yaml", "--workers", "2"], ["--ray", "auto"]),
        (["tune", "a.yaml", "--workers", "2"], ["--ray", "auto"]),
        (["evaluate", "/data/runs/a", "--ray", "local", "--workers", "2"], []),
        (["doctor"], []),
    ],
)
def test_submitting(tmp_path: Path, given: list[str], expected: list[str]) -> None:
    done = subprocess.run(
        [CLUSTER / "submit.sh", *given],
        env=fake_ray(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    said = done.stdout.splitlines()
    assert said[:3] == ["http://127.0.0.1:8265", "job", "submit"]
    assert json.loads(said[said.index("--runtime-env-json") + 1])["excludes"]
    command = said[said.index("--") + 1 :]
    assert command == ["offtower", *given, *expected]


@pytest.mark.parametrize(
    ("status", "submitted", "code"),
    [("was stopped", 0, 1), ("failed", 0, 1), ("failed", 3, 3), ("succeeded", 0, 0)],
)
def test_the_exit_code_is_that_of_the_job(
    tmp_path: Path, status: str, submitted: int, code: int
) -> None:
    done = subprocess.run(
        [CLUSTER / "submit.sh", "train", "a.yaml"],
        env=fake_ray(tmp_path, status, submitted),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert (f"{status}\n" in done.stderr) == (code == 1)


def test_submitting_nothing_prints_the_usage(tmp_path: Path) -> None:
    done = subprocess.run(
        [CLUSTER / "submit.sh"], env=fake_ray(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "cluster/submit.sh train" in done.stderr
