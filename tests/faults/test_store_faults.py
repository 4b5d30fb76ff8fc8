"""The store behind a faulty network and a failing server: work is done late, or refused in one line; never half."""

import hashlib
import io
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, tzinfo
from pathlib import Path

import pytest
from urllib3.connection import HTTPConnection
from urllib3.exceptions import NewConnectionError

from pipelines.laptop import Laptop
from spin.errors import SpinError
from spin.presets import preset
from spin.run import Run
from spin.stages import Place
from spin.store import ARRIVALS, PATIENT, Store
from tests.faults.promises import Bucket, broken
from tests.faults.proxy import Answer, Fault, Hidden, Proxy, Request, after, cut, first, flip, flip_upload, says, slow
from tests.integration.test_run import index

pytestmark = pytest.mark.integration
NUMBER = iter(range(1000))


@pytest.fixture
def proxy(laptop_servers: Laptop) -> Iterator[Proxy]:
    proxy = Proxy(laptop_servers.s3_endpoint)
    yield proxy
    proxy.refuse()


@pytest.fixture
def store(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("SPIN_CACHE", str(tmp_path / "cache"))
    # Other tests, where nothing arrives late, do not wait.
    monkeypatch.setattr("spin.store.ARRIVALS", ARRIVALS)
    store = Store(f"s3://spin/faulty-{next(NUMBER)}", proxy.endpoint)
    store.check()
    return store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights").write_bytes(bytes(range(256)) * 4000)
    (folder / "config.json").write_text("{}")
    return folder


def sound(store: Store) -> bool:
    return broken(Bucket(store._client, store.bucket, store.prefix.rstrip("/"))) == []


def there_and_back(store: Store, folder: Path) -> None:
    ref = store.put_folder(folder)
    store.write_json("runs/r/train.progress.json", {"parts": [ref.model_dump()]})
    assert store.read_json("runs/r/train.progress.json") == {"parts": [ref.model_dump()]}
    assert same(store.get(ref), folder)


def same(one: Path, other: Path) -> bool:
    return all((one / path).read_bytes() == (other / path).read_bytes() for path in ("unet/weights", "config.json"))


def none(_: Request, forward: Callable[[], Answer]) -> Answer:
    return forward()


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(SpinError) as refused:
        act()
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(first(3, says(503, "SlowDown")), id="503"),
        pytest.param(first(3, says(500, "InternalError")), id="500"),
        pytest.param(slow(0.3), id="slow"),
    ],
)
def test_a_struggling_server_costs_time_alone(store: Store, proxy: Proxy, folder: Path, fault: Fault) -> None:
    proxy.fault = fault
    there_and_back(store, folder)
    proxy.fault = none
    assert sound(store)


def completed_unheard() -> Fault:
    """Let the server put the parts of an upload together, and lose its first answer."""
    lost: list[str] = []

    def decide(request: Request, forward: Callable[[], Answer]) -> Answer:
        answer = forward()
        if request.method == "POST" and "uploadId" in request.path and not lost:
            lost.append(request.path)
            answer.send = 0
        return answer

    return decide


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lambda: first(1, says(503, "SlowDown"), "POST"), id="begin"),
        pytest.param(lambda: after(1, says(503, "SlowDown"), "POST", 1), id="complete"),
        pytest.param(lambda: first(2, says(500, "InternalError"), "PUT"), id="parts"),
        pytest.param(completed_unheard, id="answer-lost"),
    ],
)
def test_a_file_in_parts_outlasts_a_struggling_server(
    store: Store, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[], Fault]
) -> None:
    monkeypatch.setattr("spin.store.PART_BYTES", 5 * 2**20)
    (tmp_path / "large").write_bytes(bytes(range(256)) * 2**12 * 11)
    proxy.fault = fault()
    ref = store.put_file(tmp_path / "large")
    assert "POST" in {request.method for request in proxy.seen}
    proxy.fault = none
    assert store.get(ref).read_bytes() == (tmp_path / "large").read_bytes()
    assert sound(store)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lambda: first(2, cut, "GET"), id="cut"),
        pytest.param(lambda: first(1, flip, "GET"), id="corrupted"),
        pytest.param(lambda: Hidden(1.5), id="read-after-write-delay"),
    ],
)
def test_what_comes_broken_is_fetched_again(
    store: Store, proxy: Proxy, folder: Path, fault: Callable[[], Fault]
) -> None:
    proxy.fault = fault()
    ref = store.put_folder(folder)
    assert same(store.get(ref), folder)
    proxy.fault = none
    assert sound(store)


def test_an_outage_of_seconds_costs_nothing(store: Store, proxy: Proxy, folder: Path) -> None:
    proxy.refuse_for(4)
    there_and_back(store, folder)
    assert sound(store)


@pytest.mark.timeout(900)
def test_an_outage_of_a_minute_costs_nothing(store: Store, proxy: Proxy, folder: Path) -> None:
    """Neither a store operation within a stage, nor a stage that starts in the middle of it."""
    place = Place("outage", store.uri, store.endpoint)
    proxy.refuse_for(60)
    began = time.monotonic()
    with ThreadPoolExecutor(2) as both:
        running = both.submit(store.put_folder, folder)
        starting = both.submit(place.open)
        ref, run = running.result(), starting.result()
    assert 55 < time.monotonic() - began < 150
    assert same(run.store.get(ref), folder)
    assert sound(store)


def test_an_index_that_shows_up_late_is_waited_for(store: Store, proxy: Proxy) -> None:
    proxy.fault = Hidden(1.5)
    run = Run(store, "late")
    config, made = preset("emoji-cpu"), index("prepare", {})
    run.begin(config)
    run.finish(made)
    assert run.config() == config
    assert run.need("prepare", "train") == made
    for document in ("run", "prepare"):
        store.remove_json(f"runs/late/{document}.json")


def test_a_minute_is_within_its_patience() -> None:
    retries, waits = PATIENT, 0.0
    for _ in range(int(PATIENT.total or 0)):
        retries = retries.increment("GET", "/", error=NewConnectionError(HTTPConnection("s3"), "refused"))
        waits += retries.get_backoff_time()
    assert 60 < waits < 180


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((400, "ExpiredToken"), "S3 keys that may use this bucket, got ExpiredToken"),
        ((403, "AccessDenied"), "S3 keys that may use this bucket, got AccessDenied"),
        ((507, "XMinioStorageFull"), "expected room in the bucket, got XMinioStorageFull"),
        ((404, "NoSuchBucket"), "expected the bucket 'spin', got none"),
        ((418, "Teapot"), "got Teapot"),
    ],
)
def test_what_stays_is_one_line_and_nothing_is_half_there(
    store: Store, proxy: Proxy, folder: Path, answer: tuple[int, str], words: str
) -> None:
    # The first file arrives, the second does not.
    proxy.fault = after(1, says(*answer), "PUT")
    assert words in refusal(lambda: store.put_folder(folder))
    proxy.fault = none
    assert sound(store)
    there_and_back(store, folder)


@pytest.mark.parametrize("minutes", [-20, 20])
def test_a_wrong_clock_is_named(
    laptop_servers: Laptop, folder: Path, monkeypatch: pytest.MonkeyPatch, minutes: int
) -> None:
    """The real server refuses what is signed at another time, also where its answer cannot say why."""

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Wrong":
            return cls.fromtimestamp(time.time() + 60 * minutes, tz)

    store = Store(f"s3://spin/faulty-{next(NUMBER)}", laptop_servers.s3_endpoint)
    with monkeypatch.context() as patch:
        patch.setattr("spin.store.datetime", Wrong)
        patch.setattr("minio.time.datetime", Wrong)
        for act in (store.check, lambda: store.put_folder(folder), lambda: store.read_json("runs/r/run.json")):
            line = refusal(act)
            found = re.fullmatch(
                r"expected clocks that agree, got \w+ from a server whose clock is (\d+) s (ahead|behind) \(.+\); "
                "synchronise this node's clock",
                line,
            )
            assert found, line
            assert abs(int(found[1]) - 60 * abs(minutes)) < 30
            assert found[2] == ("behind" if minutes > 0 else "ahead")
    store.check()
    there_and_back(store, folder)


def put(store: Store, key: str, data: bytes) -> str:
    """Put what a user brings, and return its address."""
    store._client.put_object(store.bucket, store.prefix + key, io.BytesIO(data), len(data))
    return f"{store.uri}/{key}"


@pytest.mark.parametrize(
    "fault",
    [pytest.param(lambda: reads(first(2, cut)), id="cut"), pytest.param(lambda: reads(first(1, flip)), id="corrupted")],
)
def test_a_users_file_that_comes_broken_is_fetched_again(
    store: Store, proxy: Proxy, fault: Callable[[], Fault]
) -> None:
    uri = put(store, "data/a.txt", b"a caption that is long")
    proxy.fault = fault()
    folder = store.download(f"{store.uri}/data")
    assert (folder / "a.txt").read_bytes() == b"a caption that is long"
    assert [path.name for path in folder.iterdir()] == ["a.txt"]
    assert store.download(uri).read_bytes() == b"a caption that is long"


def reads(fault: Fault) -> Fault:
    """Return ``fault`` for what is read, and for no listing."""

    def decide(request: Request, forward: Callable[[], Answer]) -> Answer:
        return fault(request, forward) if request.method == "GET" and "?" not in request.path else forward()

    return decide


@pytest.mark.parametrize("parts", [1, 3])
def test_a_users_file_that_stays_broken_is_refused_and_not_kept(
    store: Store, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    monkeypatch.setattr("spin.store.ARRIVALS", (0.01,))
    monkeypatch.setattr("spin.store.PART_BYTES", 5 * 2**20)
    data = b"caption" * (10 if parts == 1 else 2**21)
    store._client.put_object(store.bucket, f"{store.prefix}b.txt", io.BytesIO(data), len(data), part_size=5 * 2**20)
    proxy.fault = reads(flip)
    assert "got other bytes" in refusal(lambda: store.download(f"{store.uri}/b.txt"))
    assert not list((tmp_path / "cache" / "downloads").glob("*/*"))
    proxy.fault = none
    assert store.download(f"{store.uri}/b.txt").read_bytes() == data


def test_a_users_name_that_no_disk_holds_is_one_line(store: Store, proxy: Proxy) -> None:
    """S3 allows 1,024 bytes, and a file beside a folder of its name; the server behind the proxy does not."""
    for name in ("n" * 300, "a.txt/b"):
        put(store, "odd/a.txt", b"x")

        def odd(request: Request, forward: Callable[[], Answer], name: str = name) -> Answer:
            if "list-type" in request.path:
                answer = forward()
                item = answer.body[answer.body.index(b"<Contents>") : answer.body.index(b"</Contents>") + 11]
                body = answer.body.replace(item, item + item.replace(b"/a.txt", b"/" + name.encode()))
                return Answer(200, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))], body)
            if name not in request.path:
                return forward()
            tag = hashlib.md5(b"x").hexdigest()
            return Answer(200, [("ETag", f'"{tag}"'), ("Content-Length", "1")], b"x")

        proxy.fault = odd
        line = refusal(lambda: store.download(f"{store.uri}/odd"))
        assert re.fullmatch(r"expected a name that a disk can hold, got .+ \(.+\); rename it", line), line
        assert name in line
        proxy.fault = none


def test_a_damaged_object_stays_refused(
    store: Store, proxy: Proxy, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ref = store.put_folder(folder)
    monkeypatch.setattr("spin.store.ARRIVALS", (0.01,))
    for fault, words in ((flip, "damaged"), (cut, "expected an S3 server, got"), (Hidden(0), "")):
        proxy.fault = fault
        if words:
            assert words in refusal(lambda: store.get(ref))
            assert not list((tmp_path / "cache").glob("*/*"))
    assert same(store.get(ref), folder)


def test_damage_on_the_way_up_is_found_at_once(store: Store, proxy: Proxy, folder: Path) -> None:
    proxy.fault = first(1, flip_upload, "PUT")
    there_and_back(store, folder)
    proxy.fault = none
    assert sound(store)


def test_damage_on_the_way_up_that_stays_is_refused(
    store: Store, proxy: Proxy, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spin.store.ARRIVALS", (0.01,))
    proxy.fault = flip_upload
    assert "to arrive whole, got another digest" in refusal(lambda: store.put_folder(folder))
    proxy.fault = none
    assert sound(store), "a folder without a listing is no folder"


def test_what_was_damaged_is_not_trusted_for_being_there(
    store: Store, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt is refused, and has no right to remove what it left; the second one sends it again."""
    (tmp_path / "scores").write_bytes(b"per-image scores")

    def keeps_what_is_damaged(request: Request, forward: Callable[[], Answer]) -> Answer:
        return (
            says(403, "AccessDenied")(request, forward) if request.method == "DELETE" else flip_upload(request, forward)
        )

    with monkeypatch.context() as patch:
        patch.setattr("spin.store.ARRIVALS", (0.01,))
        proxy.fault = keeps_what_is_damaged
        assert "to arrive whole, got another digest" in refusal(lambda: store.put_file(tmp_path / "scores"))
        proxy.fault = none
        assert not sound(store), "the damage is there"
        assert store.get(store.put_file(tmp_path / "scores")).read_bytes() == b"per-image scores"
        assert sound(store)


def test_what_stays_damaged_is_removed(
    store: Store, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spin.store.ARRIVALS", (0.01,))
    (tmp_path / "scores").write_bytes(b"scores that never arrive whole")
    proxy.fault = flip_upload
    refusal(lambda: store.put_file(tmp_path / "scores"))
    proxy.fault = none
    assert sound(store)


@pytest.mark.parametrize("create", [True, False])
def test_a_document_that_was_damaged_is_sent_again(store: Store, proxy: Proxy, create: bool) -> None:
    proxy.fault = first(1, lambda request, forward: flip_upload(request, forward), "PUT")
    (store.create_json if create else store.write_json)("runs/r/train.json", {"facts": 1})
    assert store.read_json("runs/r/train.json") == {"facts": 1}


@pytest.mark.parametrize("size", [0, 7, 5 * 2**20, 5 * 2**20 + 1, 11 * 2**20])
def test_tags_are_those_of_the_server(
    store: Store, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Nothing whole is read back to be sure; files in parts too."""
    monkeypatch.setattr("spin.store.PART_BYTES", 5 * 2**20)
    (tmp_path / "file").write_bytes(bytes(size))
    store.put_file(tmp_path / "file")
    assert "GET" not in {request.method for request in proxy.seen[1:]}
