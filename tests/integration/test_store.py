"""The object store against a real S3 server."""

import hashlib
import io
import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from minio import Minio
from pydantic import ValidationError

from spin.errors import SpinError
from spin.store import Ref, Store, digest_of
from tests.integration.world import BUCKET, PREFIX, World

pytestmark = pytest.mark.integration


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of one's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPIN_CACHE", str(folder))
    return folder


@pytest.fixture
def store(world: World, cache: Path) -> Store:
    assert not cache.exists()
    return world.store()


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def tamper(world: World, name: str, data: bytes) -> None:
    world.minio().put_object(BUCKET, f"{PREFIX}/{name}", io.BytesIO(data), len(data))


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refusal(action: object, *arguments: object) -> str:
    """Call and return the one line that it is refused with."""
    with pytest.raises(SpinError) as refused:
        action(*arguments)
    line = str(refused.value)
    assert re.fullmatch(r"expected .+, got .+; .+", line), line
    return line


def test_file_comes_back_under_its_digest(store: Store, cache: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "file that comes back")
    ref = store.put_file(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert ref == Ref(kind="file", digest=digest, size=20, uri=f"{store.uri}/objects/{digest}")
    got = store.get(ref)
    assert got.read_bytes() == path.read_bytes()
    assert files(cache) == [f"files/{digest}"]


def test_folder_comes_back_under_the_digest_of_its_listing(store: Store, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write(folder / "a.txt", "one")
    write(folder / "deep" / "er" / "b ä.txt", "two")
    write(folder / "empty", "")
    listing = {
        name: {"digest": hashlib.sha256(text.encode()).hexdigest(), "size": len(text)}
        for name, text in (("a.txt", "one"), ("deep/er/b ä.txt", "two"), ("empty", ""))
    }
    ref = store.put_folder(folder)
    assert (ref.kind, ref.digest, ref.size) == ("folder", digest_of(listing), 6)
    assert store.read_json(f"folders/{ref.digest}.json") == listing
    got = store.get(ref)
    assert files(got) == files(folder)
    assert all((got / name).read_bytes() == (folder / name).read_bytes() for name in listing)
    assert files(cache) == [f"folders/{ref.digest}/{name}" for name in sorted(listing)]


def test_digest_depends_on_content_and_paths_alone(store: Store, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, names in ((one, ("x", "y")), (other, ("y", "x"))):
        for name in names:
            write(folder / name, f"content of {name}")
    assert store.put_folder(one) == store.put_folder(other)
    (other / "x").rename(other / "z")
    assert store.put_folder(other).digest != store.put_folder(one).digest


def test_same_content_is_sent_once(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder = write(tmp_path / "once.txt", "sent once"), tmp_path / "folder"
    write(folder / "a", "sent once, in a folder")
    first = store.put_file(path), store.put_folder(folder)

    def send(*_: object, **__: object) -> None:
        raise AssertionError("sent again")

    monkeypatch.setattr(Minio, "fput_object", send)
    monkeypatch.setattr(Minio, "put_object", send)
    assert (store.put_file(path.rename(tmp_path / "twin.txt")), store.put_folder(folder)) == first


def test_interrupted_folder_is_sent_again(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    for name in "abc":
        write(folder / name, f"interrupted {name}")
    send, sent = Minio.fput_object, []

    def fail_at_second(self: Minio, bucket: str, name: str, path: str, **options: Any) -> object:
        sent.append(name)
        if len(sent) == 2:
            raise KeyboardInterrupt
        return send(self, bucket, name, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Minio, "fput_object", fail_at_second)
        with pytest.raises(KeyboardInterrupt):
            store.put_folder(folder)
    digest = sent[0].split("/")[-2]
    assert store.read_json(f"folders/{digest}.json") is None
    assert "got none or another" in refusal(store.get, Ref(kind="folder", digest=digest, size=1, uri="s3://x"))
    assert files(store.get(store.put_folder(folder))) == ["a", "b", "c"]


def test_cached_object_is_not_fetched_again(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refs = store.put_file(write(tmp_path / "f" / "x", "cached")), store.put_folder(tmp_path / "f")
    first = [store.get(ref) for ref in refs]

    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("fetched again")

    monkeypatch.setattr(Minio, "fget_object", fetch)
    monkeypatch.setattr(Minio, "get_object", fetch)
    assert [store.get(ref) for ref in refs] == first


def test_tampered_file_is_refused(world: World, store: Store, cache: Path, tmp_path: Path) -> None:
    ref = store.put_file(write(tmp_path / "a", "to be tampered with"))
    tamper(world, f"objects/{ref.digest}", b"to be tampered WITH")
    line = refusal(store.get, ref)
    assert ref.digest[:12] in line
    assert "damaged" in line
    assert not list(cache.glob("*/*"))


def test_tampered_folder_is_refused(world: World, store: Store, cache: Path, tmp_path: Path) -> None:
    write(tmp_path / "f" / "a", "good")
    write(tmp_path / "f" / "b", "to be tampered with in its folder")
    ref = store.put_folder(tmp_path / "f")
    tamper(world, f"folders/{ref.digest}/b", b"bad")
    line = refusal(store.get, ref)
    assert f"folders/{ref.digest}/b" in line
    assert "damaged" in line
    assert not list(cache.glob("*/*"))


@pytest.mark.parametrize("content", [b'{"a": {"digest": "0", "size": 1}}', b"{}", b"no JSON", b"\xff\xfe", b""])
def test_tampered_listing_is_refused(world: World, store: Store, cache: Path, tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "f" / "a", "whose listing is tampered with")
    ref = store.put_folder(tmp_path / "f")
    tamper(world, f"folders/{ref.digest}.json", content)
    assert "damaged" in refusal(store.get, ref)
    assert not list(cache.glob("*/*"))
    tamper(world, f"folders/{ref.digest}.json", json.dumps({}).encode())


@pytest.mark.parametrize("path", ["../outside", "a/../../outside", "/tmp/outside", ".."])
def test_listing_never_leads_out_of_the_cache(
    world: World, store: Store, cache: Path, tmp_path: Path, path: str
) -> None:
    listing = {path: {"digest": hashlib.sha256(b"evil").hexdigest(), "size": 4}}
    digest = digest_of(listing)
    tamper(world, f"folders/{digest}.json", json.dumps(listing).encode())
    line = refusal(store.get, Ref(kind="folder", digest=digest, size=4, uri=f"{store.uri}/folders/{digest}"))
    assert "plain paths" in line
    assert repr(path) in line
    assert not list(cache.glob("*/*"))
    assert not list(tmp_path.rglob("*outside*"))


@pytest.mark.parametrize("digest", ["../../../../etc/passwd", "/etc/hostname", "", "a" * 63, "A" * 64, "a" * 64 + "\n"])
def test_a_digest_is_no_path(digest: str) -> None:
    with pytest.raises(ValidationError, match="digest"):
        Ref(kind="file", digest=digest, size=1, uri="s3://spin/objects/x")


@pytest.mark.parametrize(
    "entry",
    [
        {"digest": "../../../../etc/passwd", "size": 4},
        {"digest": "/etc/hostname", "size": 4},
        {"digest": "a" * 64, "size": "4"},
        {"digest": "a" * 64, "size": 4, "more": 1},
        {"digest": "a" * 64},
        "a",
    ],
)
def test_a_listing_names_digests_alone(world: World, store: Store, cache: Path, entry: object) -> None:
    listing = {"a.txt": entry}
    ref = Ref(kind="folder", digest=digest_of(listing), size=4, uri=f"{store.uri}/folders/{digest_of(listing)}")
    tamper(world, f"folders/{ref.digest}.json", json.dumps(listing).encode())
    for read in (store.get, lambda ref: store.part(ref, "a.txt")):
        assert "digests and sizes" in refusal(read, ref)
    assert not list(cache.glob("*/*"))


@pytest.mark.parametrize("left", [b"", b"short"])
def test_what_a_crash_left_in_the_cache_is_fetched_again(store: Store, tmp_path: Path, left: bytes) -> None:
    """A machine that loses its power keeps names, and not always what was written under them."""
    write(tmp_path / "f" / "a", "whole before the crash")
    file, folder = store.put_file(tmp_path / "f" / "a"), store.put_folder(tmp_path / "f")
    for read in (lambda: store.get(file), lambda: store.get(folder) / "a", lambda: store.part(folder, "a")):
        path = read()
        path.write_bytes(left)
        assert read().read_text() == "whole before the crash"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_missing_object_is_refused(store: Store, cache: Path, kind: str) -> None:
    digest = hashlib.sha256(kind.encode()).hexdigest()
    line = refusal(store.get, Ref(kind=kind, digest=digest, size=1, uri=f"{store.uri}/{kind}s/{digest}"))
    assert digest in line
    assert not list(cache.glob("*/*"))


def test_json_is_none_where_there_is_none(store: Store) -> None:
    assert store.read_json("runs/none/run.json") is None
    value = {"text": "ä\n", "number": 0.1, "nothing": None, "list": [1, {"deep": True}]}
    store.write_json("runs/some/run.json", value)
    assert store.read_json("runs/some/run.json") == value


def test_damaged_json_is_refused(world: World, store: Store) -> None:
    tamper(world, "runs/damaged/run.json", b'{"config": ')
    line = refusal(store.read_json, "runs/damaged/run.json")
    assert f"{store.uri}/runs/damaged/run.json" in line


def test_prefixes_keep_stores_apart(world: World, cache: Path, tmp_path: Path) -> None:
    one = Store(f"s3://{BUCKET}/{PREFIX}/one", world.servers.s3_endpoint)
    other = Store(f"s3://{BUCKET}/{PREFIX}/other/", world.servers.s3_endpoint)
    ref = one.put_file(write(tmp_path / "a", "in one prefix only"))
    assert one.get(ref).read_text() == "in one prefix only"
    cached = cache / "files" / ref.digest
    cached.unlink()
    assert "got none" in refusal(other.get, ref)


def test_check_passes_where_the_store_can_be_used(store: Store) -> None:
    store.check()


def test_no_server_is_refused_soon(world: World) -> None:
    endpoint = f"http://127.0.0.1:{closed_port()}"
    started = time.monotonic()
    line = refusal(Store(world.store_uri, endpoint).check)
    assert time.monotonic() - started < 15
    assert endpoint in line
    assert "store_endpoint" in line


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_keys_are_refused(world: World, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "wrong")
    store = world.store()
    for line in (refusal(store.check), refusal(store.read_json, "x.json"), refusal(store.write_json, "x.json", {})):
        assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in line
        assert "wrong" not in line


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
@pytest.mark.parametrize("value", [None, ""])
def test_missing_keys_are_refused(world: World, monkeypatch: pytest.MonkeyPatch, name: str, value: str | None) -> None:
    monkeypatch.delenv(name)
    if value is not None:
        monkeypatch.setenv(name, value)
    assert "got none" in refusal(world.store)


def test_missing_bucket_is_refused(world: World) -> None:
    store = Store("s3://no-such-bucket/tests", world.servers.s3_endpoint)
    for line in (refusal(store.check), refusal(store.read_json, "x.json")):
        assert "'no-such-bucket'" in line
        assert "create it" in line


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "spin",
        "s3://",
        "s3://X",
        "s3://spin/../mlflow",
        "s3://spin//a",
        "s3://spin/a b",
        "http://spin",
        "s3://spin\n",
    ],
)
def test_bad_store_uri_is_refused(world: World, uri: str) -> None:
    line = refusal(Store, uri, world.servers.s3_endpoint)
    assert repr(uri) in line
    assert "store_uri" in line


@pytest.mark.parametrize("uri", ["s3://1.2.3.4", "s3://spin.-x", "s3://spin/./a"])
def test_store_uri_that_only_the_client_refuses(world: World, uri: str) -> None:
    store = Store(uri, world.servers.s3_endpoint)
    line = refusal(store.read_json, "x.json")
    assert repr(uri) in line
    assert "store_uri" in line


@pytest.mark.parametrize(
    "endpoint",
    ["", "127.0.0.1:9000", "ftp://127.0.0.1", "http://", "http://127.0.0.1:9000/path", "http://host:port",
     "http://host:99999", "http://[::1", "http://a b:9000", "http://host:9000?x", "http://user:key@host:9000"],
)  # fmt: skip
def test_bad_endpoint_is_refused(world: World, endpoint: str) -> None:
    assert "store_endpoint" in refusal(Store, world.store_uri, endpoint)


def test_other_kind_of_server_is_refused(world: World) -> None:
    line = refusal(Store(world.store_uri, world.servers.mlflow_uri).check)
    assert world.servers.mlflow_uri in line
