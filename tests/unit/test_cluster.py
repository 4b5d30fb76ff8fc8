"""Which nodes a pod may start on, by Kubernetes' own rules."""

import pytest

from spin.cluster import ACCELERATOR, Need, Node, fitting, obstacles, room, tolerated
from spin.errors import SpinError

TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
GIB = 2**30


def node(name: str = "a", **changes: object) -> Node:
    values = {
        "labels": {"pool": "gpu", "kubernetes.io/arch": "amd64"},
        "taints": [TAINT],
        "allocatable": {"cpu": 16.0, "memory": 128.0 * GIB, ACCELERATOR: 4.0},
    }
    return Node(name, **(values | changes))  # type: ignore[arg-type]


def need(**changes: object) -> Need:
    values = {
        "amounts": {"cpu": 8.0, "memory": 64.0 * GIB, ACCELERATOR: 1.0},
        "selector": {"pool": "gpu"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    }
    return Need(**(values | changes))  # type: ignore[arg-type]


# https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/
@pytest.mark.parametrize(
    ("toleration", "expected"),
    [
        ({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}, True),
        ({"key": "nvidia.com/gpu", "operator": "Exists"}, True),
        ({"operator": "Exists"}, True),
        ({"key": "nvidia.com/gpu", "operator": "Equal", "value": "present", "effect": "NoSchedule"}, True),
        ({"key": "nvidia.com/gpu", "value": "present"}, True),
        ({"key": "nvidia.com/gpu", "value": "absent"}, False),
        ({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": "other", "operator": "Exists"}, False),
        ({"value": "present"}, False),
    ],
)
def test_tolerations(toleration: dict[str, str], expected: bool) -> None:
    assert tolerated(TAINT, [toleration]) is expected


def test_a_preference_keeps_nobody_away() -> None:
    assert tolerated(TAINT | {"effect": "PreferNoSchedule"}, [])


def test_a_node_that_fits() -> None:
    assert fitting([node("a"), node("b", ready=False)], need()) == [node("a")]


@pytest.mark.parametrize(
    ("wanted", "expected"), [({"cpu": 8.0}, 4), ({"cpu": 8.0, ACCELERATOR: 4.0}, 2), ({"cpu": 9.0, "memory": 0.0}, 2)]
)
def test_room_for_pods_on_nodes(wanted: dict[str, float], expected: int) -> None:
    assert room([node("a"), node("b")], need(amounts=wanted)) == expected


@pytest.mark.parametrize(
    ("changed", "wanted", "expected"),
    [
        ({"ready": False}, {}, "is not ready"),
        ({"labels": {}}, {}, "has no label pool"),
        ({"labels": {"pool": "cpu"}}, {}, "has pool=cpu, not gpu"),
        ({}, {"tolerations": []}, "has the taint nvidia.com/gpu=present:NoSchedule"),
        ({}, {"amounts": {ACCELERATOR: 8.0}}, "has 4 nvidia.com/gpu, not 8"),
        ({}, {"amounts": {"memory": 256.0 * GIB}}, "has 128 GiB memory, not 256 GiB"),
        ({}, {"architecture": "arm64"}, "is amd64, and the image is arm64"),
    ],
)
def test_each_obstacle_is_named(changed: dict[str, object], wanted: dict[str, object], expected: str) -> None:
    assert obstacles(node(**changed), need(**wanted)) == [expected]


def test_the_nearest_node_is_named() -> None:
    far = node("far", labels={}, taints=[], allocatable={})
    near = node("near", labels={"pool": "gpu40"})

    with pytest.raises(SpinError, match=r"none of 2 \(nearest is near: has pool=gpu40, not gpu\); change gpu_pool"):
        fitting([far, near], need())
    with pytest.raises(SpinError, match="got none at all"):
        fitting([], need())
