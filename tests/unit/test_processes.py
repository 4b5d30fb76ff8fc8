"""What a pod says that is one of several, and whose fellows do not come."""

import socket

import pytest

from spin import processes
from spin.errors import SpinError


def test_pods_that_do_not_come_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"NNODES": 2, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in meeting.items():
        monkeypatch.setenv(f"PET_{name}", str(value))
    monkeypatch.setattr(processes, "SECONDS_TO_MEET", 1)
    with pytest.raises(SpinError, match=r"expected 2 pods to meet within 1 s, got .*; see why the others"):
        processes.spread(1, print)


def test_a_pod_leads_by_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert (processes.rank(), processes.node_count()) == (0, 1)
    monkeypatch.setenv("PET_NODE_RANK", "1")
    monkeypatch.setenv("PET_NNODES", "2")
    assert (processes.rank(), processes.node_count()) == (1, 2)
    monkeypatch.setenv("RANK", "0")
    assert processes.rank() == 0
