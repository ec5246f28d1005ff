"""Manifests: strict YAML, no field unknown to KubeRay, one version of Ray, real commands."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

import offtower
from offtower.cli import app
from offtower.config import parse_config

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
SCHEMA = json.loads((Path(__file__).parent / "schema.json").read_text(encoding="utf-8"))


class StrictLoader(yaml.SafeLoader):
    """Refuses duplicate keys, which YAML readers otherwise accept silently."""


def _mapping(loader: StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    duplicates = {key for key in keys if keys.count(key) > 1}
    if duplicates:
        raise yaml.YAMLError(f"{node.start_mark}: duplicate keys: {sorted(duplicates)}")
    return loader.construct_mapping(node, deep=True)


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def documents(path: Path) -> list[dict[str, Any]]:
    found = list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=StrictLoader))
    assert found and all(isinstance(one, dict) for one in found), path
    return found


def check(document: dict[str, Any]) -> None:
    schema = {"$ref": f"#/$defs/{document['kind']}", "$defs": SCHEMA["$defs"]}
    jsonschema.Draft202012Validator(schema).validate(document)


def ray_clusters() -> Iterator[tuple[str, dict[str, Any]]]:
    """Specs of RayClusters, and of the clusters of RayJobs."""
    for path in KUBERAY:
        for document in documents(path):
            if document["kind"] == "RayCluster":
                yield path.name, document["spec"]
            elif document["kind"] == "RayJob":
                yield path.name, document["spec"]["rayClusterSpec"]


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_every_field_is_known_and_typed(path: Path) -> None:
    for document in documents(path):
        check(document)


def test_there_are_jobs_to_train_and_evaluate_and_a_long_lived_cluster() -> None:
    kinds = {(d["kind"], d["metadata"]["name"]) for path in KUBERAY for d in documents(path)}
    assert {
        ("RayJob", "offtower-train"),
        ("RayJob", "offtower-evaluate"),
        ("RayCluster", "offtower"),
    } <= kinds
    (spec,) = [s for name, s in ray_clusters() if name == "raycluster.yaml"]
    assert spec["gcsFaultToleranceOptions"]["redisAddress"].startswith("offtower-redis:")
    assert spec["authOptions"] == {"mode": "token", "secretName": "offtower-token"}


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
    (cluster,) = [
        d for d in documents(CLUSTER / "kuberay/raycluster.yaml") if d["kind"] == "RayCluster"
    ]
    check(cluster)
    change(cluster)
    with pytest.raises(jsonschema.ValidationError, match=words):
        check(cluster)


def test_a_duplicate_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("kind: A\nkind: B\n")
    with pytest.raises(yaml.YAMLError, match="duplicate keys"):
        documents(tmp_path / "twice.yaml")


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
        rf"^offtower:{re.escape(offtower.__version__)}-ray{re.escape(version)}-(cpu|cuda)$"
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


def test_heads_run_no_worker_and_every_pod_mounts_the_volume() -> None:
    for name, spec in ray_clusters():
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", name
        assert spec["authOptions"]["mode"] == "token", name
        assert spec["autoscalerOptions"]["version"] == "v2", name
        for group in groups(spec):
            pod = group["template"]["spec"]
            volumes = {volume["name"] for volume in pod["volumes"]}
            for container in pod["containers"]:
                mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
                assert set(mounts) <= volumes
                assert mounts["data"] == "/data"
                # Kubernetes can reclaim what exceeds the request.
                assert container["resources"]["limits"] == container["resources"]["requests"]


def parse(command: list[str]) -> dict[str, Any]:
    """Parse a command by the real command line."""
    assert command[0] == "offtower"
    group = typer.main.get_command(app)
    verb = group.commands[command[1]]  # type: ignore[attr-defined]
    with verb.make_context(command[1], command[2:]) as context:
        return dict(context.params)


def commands() -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    for path in KUBERAY:
        for document in documents(path):
            if document["kind"] == "RayJob":
                yield path.name, document["spec"], shlex.split(document["spec"]["entrypoint"])


def test_commands_parse_and_their_workers_fit() -> None:
    found = list(commands())
    assert {command[1] for _, _, command in found} == {"train", "evaluate"}
    for name, spec, command in found:
        given = parse(command)
        assert given["ray"] == "auto", name
        workers = int(str(given["workers"]).split("-")[-1])
        room = 0
        for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            by_cpu = float(limits["cpu"]) // float(given["worker_cpus"])
            memory = float(given.get("worker_memory") or 0.0)
            # Ray's memory resource excludes the object store.
            gib = float(limits["memory"].removesuffix("Gi")) - 1.0
            by_memory = gib * 0.95 // memory if memory else by_cpu
            room += group["maxReplicas"] * int(min(by_cpu, by_memory))
        assert room >= workers, name


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(Exception, match="--wrokers"):
        parse(["offtower", "evaluate", "run", "--wrokers", "2"])


def test_train_and_evaluate_use_one_configuration() -> None:
    (config,) = [d for d in documents(CLUSTER / "kuberay/storage.yaml") if d["kind"] == "ConfigMap"]
    parsed = parse_config(yaml.safe_load(config["data"]["config.yaml"]))
    (evaluated,) = [c for _, _, c in commands() if c[1] == "evaluate"]
    assert str(parsed.run_directory) == evaluated[2]
    assert all(str(p).startswith("/data/") for p in (parsed.data.train, parsed.run_directory))


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


def test_the_container_file_copies_existing_files() -> None:
    lines = (CLUSTER / "Containerfile").read_text().replace("\\\n", " ").splitlines()
    stages = {line.split()[-1] for line in lines if re.match(r"FROM .* AS ", line)}
    assert {"compiler-cpu", "compiler-cuda", "wheel"} == stages
    for line in lines:
        if line.startswith("COPY --from="):
            assert line.split()[1].removeprefix("--from=") in stages
        elif line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source


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
