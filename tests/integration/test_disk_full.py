"""A full disk: one line that names the folder, nothing half there, and the run goes on once there is room."""

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from spin.disk import room_in
from spin.errors import SpinError
from spin.stages.generate import generate
from spin.stages.train import train
from tests.integration.conftest import Played
from tests.integration.world import World

pytestmark = pytest.mark.integration
SMALL = 100_000
LARGE = 64 * 2**20


@contextmanager
def full(kind: str, folder: Path) -> Iterator[None]:
    """Leave ``folder`` room for ``SMALL`` bytes, or for files of that size, within the block; room is made after it."""
    if kind == "limit":
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(folder), "-o"]
    if os.geteuid() or subprocess.run([*mount, f"size={SMALL}"], capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a disk")
    try:
        yield
    finally:
        subprocess.run([*mount, f"remount,size={LARGE}"], check=True)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    yield folder
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(SpinError) as refused:
        act()
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("kind", ["disk", "limit"])
def test_a_full_cache_holds_nothing_half(
    world: World, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    wanted = os.urandom(3 * SMALL)
    (tmp_path / "object").write_bytes(wanted)
    ref = world.store().put_file(tmp_path / "object")
    monkeypatch.setenv("SPIN_CACHE", str(folder))
    with full(kind, folder):
        line = refusal(lambda: world.store().get(ref))
        assert not [path for path in folder.rglob("*") if path.is_file()]
    assert line.startswith(f"expected room on the disk of {folder}, got '")
    assert "set SPIN_CACHE to another folder, and start the run again with the same run key" in line
    assert world.store().get(ref).read_bytes() == wanted


@pytest.mark.parametrize("kind", ["disk", "limit"])
def test_a_full_scratch_disk_costs_the_time_since_the_last_checkpoint(
    world: World, played: Played, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    place = world.place(f"disk-full-{kind}")
    world.prepare(place)
    generate(place, 1)
    world.store().get(world.run(place.run_key).need("prepare", "").outputs["base"])
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with full(kind, folder):
        line = refusal(lambda: train(place, 1))
        assert not list(folder.iterdir())
    assert line.startswith(f"expected room on the disk of {folder}, got '")
    assert "set TMPDIR to another folder" in line
    assert world.run(place.run_key).find("iteration-001/train") is None
    assert train(place, 1).outputs == played.indexes["iteration-001/train"].outputs


@pytest.mark.parametrize("kind", ["disk", "limit"])
def test_every_library_says_it_so_that_it_is_known(folder: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 500, 3), "uint8")

    def plain() -> None:
        (folder / "plain").write_bytes(noise.tobytes())

    def table() -> None:
        pq.write_table(pa.table({"noise": noise.ravel()}), folder / "table.parquet")

    def picture() -> None:
        Image.fromarray(noise).save(folder / "picture.png")

    def tensors() -> None:
        save_file({"noise": torch.from_numpy(noise)}, folder / "noise.safetensors")

    with full(kind, folder):
        for write in (plain, table, picture, tensors):
            with pytest.raises(SpinError, match=r"^expected room on the disk of "), room_in(folder, "TMPDIR"):
                write()
            for path in folder.iterdir():
                path.unlink()


def test_other_faults_pass() -> None:
    with pytest.raises(OSError, match="broken pipe"), room_in(Path("/"), "TMPDIR"):
        raise OSError("broken pipe")
