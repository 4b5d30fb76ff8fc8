"""Public files: fetched once, checked, and nothing left of a fault."""

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from spin.download import download
from spin.errors import SpinError


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """Give a folder and the address that it is served at."""
    monkeypatch.setenv("SPIN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "home"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_file_is_fetched_once(home: tuple[Path, str]) -> None:
    folder, address = home
    (folder / "a+b.txt").write_text("one")
    path = download(f"{address}/a%2Bb.txt")
    assert (path.name, path.read_text()) == ("a+b.txt", "one")
    (folder / "a+b.txt").write_text("two")
    assert download(f"{address}/a%2Bb.txt").read_text() == "one"
    # A digest is another question.
    digest = hashlib.sha256(b"two").hexdigest()
    assert download(f"{address}/a%2Bb.txt", digest).read_text() == "two"


def test_what_is_refused(home: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, address = home
    (folder / "a.txt").write_text("one")
    with pytest.raises(SpinError, match=r"with digest 000000000000, got 7692c3ad3540; it has changed"):
        download(f"{address}/a.txt", "0" * 64)
    with pytest.raises(SpinError, match="got status 404"):
        download(f"{address}/b.txt")
    with pytest.raises(SpinError, match=r"expected a file, got .*Connection refused"):
        download("http://127.0.0.1:9/a.txt")
    monkeypatch.setattr("spin.download.MOST_BYTES", 2)
    with pytest.raises(SpinError, match="expected at most 2 bytes"):
        download(f"{address}/a.txt")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
