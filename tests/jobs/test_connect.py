"""Connecting to Ray, and refusing jobs that Ray would wait for forever."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offtower.errors import ClusterError, MissingExtraError, RunError
from offtower.jobs import resources
from offtower.jobs.connect import absolute, check_address, connect
from offtower.jobs.resources import Node, ResourceRequest, require

GIB = 2.0**30


def test_a_request_that_fits_is_not_refused() -> None:
    nodes = [Node("a", 4, 0, GIB), Node("b", 2, 0, GIB)]
    assert ResourceRequest(6).fits(nodes)
    assert ResourceRequest(1, cpus=4).fits(nodes)


@pytest.mark.parametrize(
    "request_",
    [
        ResourceRequest(7),
        ResourceRequest(2, cpus=4),  # six CPUs in all, but no second node with four
        ResourceRequest(1, cpus=1, gpus=1),
        ResourceRequest(2, memory=1.1 * GIB),
    ],
)
def test_a_request_without_room_is_refused_with_the_numbers(request_: ResourceRequest) -> None:
    nodes = [Node("a", 4, 0, GIB), Node("b", 2, 0, GIB)]
    assert not request_.fits(nodes)
    text = request_.refusal(nodes)
    assert f"asked  {request_.num_workers * request_.cpus:g} CPU" in text
    assert "there  6 CPUs, 0 GPUs on 2 nodes" in text
    assert "a: 4 CPUs" in text and "b: 2 CPUs" in text
    assert f"room for {request_.total_capacity(nodes)} of the workers" in text


def test_fractions_of_a_gpu_are_shared() -> None:
    node = Node("a", 8, 1, GIB)
    assert node.workers(1, 0.25) == 4
    assert node.workers(1, 0.1) == 8  # the CPUs end first
    assert node.workers(0.1, 0.0) == 80


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 12), st.integers(1, 5))
def test_capacity_counts_whole_workers_by_node(cpus: list[int], workers: int, each: int) -> None:
    """Against placing the workers one by one."""
    left, placed = list(cpus), 0
    for i in range(len(left)):
        while left[i] >= each and placed < workers:
            left[i] -= each
            placed += 1
    nodes = [Node(str(i), c, 0, 0.0) for i, c in enumerate(cpus)]
    assert ResourceRequest(workers, cpus=each).total_capacity(nodes) == placed


@pytest.mark.parametrize("bad", [0, -1])
def test_no_worker_is_refused(bad: int) -> None:
    with pytest.raises(ClusterError, match="at least one worker"):
        ResourceRequest(bad)


@pytest.mark.parametrize("address", ["local", "auto", "10.0.0.1:6379", "ray://head:10001"])
def test_known_addresses_pass(address: str) -> None:
    assert check_address(address) == address


@pytest.mark.parametrize("address", ["", "head", "http://head:8265", "head:port", "ray://"])
def test_other_addresses_are_refused_with_the_forms(address: str) -> None:
    with pytest.raises(ClusterError, match="HOST:PORT"):
        check_address(address)


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with pytest.raises(ClusterError, match="no Ray cluster answers"), connect(address):
            pass


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"offtower\[ray\]"):
        resources.import_ray()


def test_paths_become_absolute_and_addresses_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("logs/mine") == str(tmp_path.resolve() / "logs/mine")
    assert absolute(Path("/a/../b")) == "/b"
    assert absolute("s3://bucket/log") == "s3://bucket/log"


@pytest.mark.ray
def test_a_connected_process_keeps_its_cluster(ray_cluster: str) -> None:
    ray = pytest.importorskip("ray")
    with connect("local") as cluster:
        assert not cluster.started
        assert cluster.address == ray_cluster
    assert ray.is_initialized()


@pytest.mark.ray
def test_resources_are_compared_with_the_cluster(ray_cluster: str) -> None:
    assert sum(node.cpus for node in require(ResourceRequest(2))) == 4
    with pytest.raises(RunError, match=r"asked  6 CPUs, 0 GPUs\n  there  4 CPUs, 0 GPUs on 1 node"):
        require(ResourceRequest(3, cpus=2))
    with pytest.raises(ClusterError, match=r"has not grown in 1 s"):
        require(ResourceRequest(1, gpus=1), wait=1.0)
