"""The object store: content-addressed objects and small JSON documents in any S3, through the ``minio`` client.

Layout below the store's uri ``s3://bucket/prefix``::

    objects/<sha256>                  one file
    folders/<sha256>/<path>           the files of a folder; the digest is that of its sorted listing
    folders/<sha256>.json             the listing, written last: a folder is complete or absent
    runs/<run key>/...json            indexes (``spin/run.py``)
    parts/folders/...                 folders again, of unfinished score stages

Objects are immutable and named by what they hold, so writing twice is harmless and a reader verifies what it gets.
"""

import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar
from xml.etree.ElementTree import ParseError

import urllib3
from minio import Minio
from minio.error import InvalidResponseError, S3Error, ServerError
from minio.helpers import DictType
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from spin.disk import room_in
from spin.errors import DamagedError, SpinError, cause

logger = logging.getLogger("spin")
SOON = urllib3.Retry(
    total=4,
    backoff_factor=0.5,
    status_forcelist=[500, 502, 503, 504],
    # POST too: a large file begins and ends with one.
    allowed_methods=None,
)
"""Until the server has answered once: a wrong address is refused within seconds."""
PATIENT = SOON.new(total=9, backoff_max=30)
"""From then on: a server that is away for a minute, or two, costs no work."""
ARRIVALS = (1.0, 4.0, 10.0)
"""Seconds to wait before what came damaged, or what a slow server does not show yet, is asked for again."""
FULL = ("InsufficientStorage", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull")
MOST_SECONDS_APART = 5 * 60
"""Servers refuse requests whose clock is 5 to 15 minutes off."""
TAKEN, CONFLICT = "PreconditionFailed", "ConditionalRequestConflict"
PART_BYTES = 64 * 2**20
"""Larger files go up in parts of this size."""
UNFIT = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
"""What a disk says of names that it cannot hold, alone or beside others."""
ENDPOINT = re.compile(r"(?P<scheme>(?i:https?))://(?P<host>(?:[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>\d{1,5}))?)/?")

Found = TypeVar("Found")
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""A SHA-256 in hex. It names a file, here and in the store, so it is nothing else."""


class Entry(BaseModel):
    """A file in a folder's listing."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    digest: Digest
    size: int


class Ref(BaseModel):
    """The address of an object: its kind, SHA-256 and size in bytes; ``uri`` is for people and for MLflow."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["file", "folder"]
    digest: Digest
    size: int
    uri: str


def digest_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def etag_of(path: Path, part_bytes: int) -> str:
    """Return the tag that S3 gives a file: its MD5, or that of its parts' MD5s and their number."""
    with path.open("rb") as stream:
        parts = [hashlib.md5(part).digest() for part in iter(lambda: stream.read(part_bytes), b"")] or [
            hashlib.md5(b"").digest()
        ]
    return parts[0].hex() if len(parts) == 1 else f"{hashlib.md5(b''.join(parts)).hexdigest()}-{len(parts)}"


def canonical(value: Any) -> bytes:
    """Return the one JSON form of ``value`` that digests are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value, in hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


def seconds_ahead(date: str | None) -> float:
    """Return how far a server's clock is ahead of this one, by the ``Date`` of the answer that has just come."""
    return (parsedate_to_datetime(date) - datetime.now(UTC)).total_seconds() if date else 0.0


def listing_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return ``{path: {digest, size}}`` for the regular files below ``folder``."""
    return {
        path.relative_to(folder).as_posix(): {"digest": digest_of_file(path), "size": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _document(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode()


def _md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def bytes_at(path: Path) -> int:
    """Return the size of a file, or of all files below a folder; -1: there is nothing."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else -1


def awaited(find: Callable[[], Found | None]) -> Found | None:
    """Return what ``find`` finds, for as long as a slow server may not show it yet; ``None``: it is not there."""
    for pause in ARRIVALS:
        if (found := find()) is not None:
            return found
        time.sleep(pause)
    return find()


def _cache() -> Path:
    base = os.environ.get("SPIN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "spin-diffusion")
    return Path(base).expanduser()


def _cached(path: Path, size: int) -> bool:
    """Return whether a file or folder is there, of the size that it should have; what a crash left of it is removed."""
    if (found := bytes_at(path)) == size:
        return True
    if found >= 0:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return False


@contextmanager
def _arriving(target: Path) -> Iterator[Path]:
    """Give a path to fetch a file or folder to; move it to ``target`` once it is whole, leave nothing of a fault."""
    with room_in(_cache(), "SPIN_CACHE"):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".part-"))
        try:
            yield scratch / target.name
            try:
                (scratch / target.name).replace(target)
            except OSError:
                # Another process was faster; its copy is as good.
                if not target.exists():
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _named(uri: str) -> Iterator[None]:
    """Name the file of a user whose name this machine cannot give it."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNFIT:
            raise
        raise SpinError(f"expected a name that a disk can hold, got {uri!r} ({error.strerror}); rename it") from None


def kept(name: str, fetch: Callable[[Path], None]) -> Path:
    """Return the local path of a public file, kept in ``SPIN_CACHE`` as ``name``; ``fetch`` writes it once."""
    target = _cache() / "public" / name
    if not target.is_file():
        with _arriving(target) as part:
            fetch(part)
    return target


def addresses(uri: str, endpoint: str) -> tuple[re.Match[str], re.Match[str]]:
    """Return the parts of a store's two addresses.

    Raises:
        SpinError: one is malformed.
    """
    match = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/([\w.=-]+(?:/[\w.=-]+)*))?/?", uri)
    if not match or ".." in uri:
        raise SpinError(f"expected a store uri like s3://bucket/prefix, got {uri!r}; set store_uri")
    address = ENDPOINT.fullmatch(endpoint)
    if not address or int(address["port"] or 0) > 65535:
        raise SpinError(f"expected an S3 endpoint like http://host:9000, got {endpoint!r}; set store_endpoint")
    return match, address


class Store:
    """A bucket and prefix of an S3 server.

    Args:
        uri: ``s3://bucket`` or ``s3://bucket/prefix``.
        endpoint: ``http://host:port`` or ``https://host``. Keys come from ``AWS_ACCESS_KEY_ID`` and
            ``AWS_SECRET_ACCESS_KEY``.

    Raises:
        SpinError: malformed addresses, missing or refused keys, no such bucket, no server.
    """

    def __init__(self, uri: str, endpoint: str):
        match, address = addresses(uri, endpoint)
        keys = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
        if not all(keys):
            raise SpinError(
                "expected S3 keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, got none; set them, or on a cluster "
                "put them into the secret named by store_secret"
            )
        self.uri, self.endpoint = uri.rstrip("/"), endpoint
        self.bucket, self.prefix = match[1], f"{match[2]}/" if match[2] else ""
        self._host, self._secure = address["host"], address["scheme"].lower() == "https"
        self._keys = keys
        self._client = self._connect(SOON)

    def _connect(self, retries: urllib3.Retry) -> Minio:
        return Minio(
            self._host,
            access_key=self._keys[0],
            secret_key=self._keys[1],
            secure=self._secure,
            region=os.environ.get("AWS_DEFAULT_REGION", "us-east-1"),
            http_client=urllib3.PoolManager(
                timeout=urllib3.Timeout(connect=10, read=120),
                maxsize=10,
                cert_reqs="CERT_REQUIRED",
                ca_certs=os.environ.get("SSL_CERT_FILE"),
                retries=retries,
            ),
        )

    @contextmanager
    def _errors(self, uri: str = "") -> Iterator[None]:
        """Say what went wrong at ``uri``, by default the store's own."""
        setting, uri = (f"correct {uri}", uri) if uri else ("set store_uri", self.uri)
        bucket, where = uri.removeprefix("s3://").partition("/")[0], f"({self.endpoint}, {uri})"
        try:
            yield
        except S3Error as error:
            if error.code == "NoSuchBucket":
                raise SpinError(f"expected the bucket {bucket!r}, got none {where}; create it, or {setting}") from None
            if error.code in FULL:
                raise SpinError(
                    f"expected room in the bucket, got {error.code} {where}; free or add space and start the run again "
                    "with the same run key"
                ) from None
            refused = error.code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "ExpiredToken")
            ahead = seconds_ahead(error.response.headers.get("Date"))
            # An answer to HEAD has no body, so that it cannot say why.
            if error.code == "RequestTimeTooSkewed" or (refused and abs(ahead) > MOST_SECONDS_APART):
                raise SpinError(
                    f"expected clocks that agree, got {error.code} from a server whose clock is {abs(ahead):.0f} s "
                    f"{'ahead' if ahead > 0 else 'behind'} {where}; synchronise this node's clock"
                ) from None
            if refused:
                raise SpinError(
                    f"expected S3 keys that may use this bucket, got {error.code} {where}; check AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY"
                ) from None
            raise SpinError(
                f"expected an answer from S3, got {error.code}: {error.message} {where}; try again"
            ) from None
        except (urllib3.exceptions.HTTPError, InvalidResponseError, ServerError, ParseError) as error:
            raise SpinError(
                f"expected an S3 server, got {cause(error)} {where}; check store_endpoint and the network"
            ) from None
        except ValueError as error:
            # The client's own check of names, before anything is sent.
            raise SpinError(f"expected names that S3 allows, got {uri!r} ({error}); {setting}") from None

    def check(self, known: bool = False) -> None:
        """Make sure that the bucket exists and that the keys may read it; from then on, outlast an outage.

        ``known``: the server has answered in this pipeline before, so that its address is no mistake.
        """
        with self._errors():
            try:
                found = self._client.bucket_exists(self.bucket)
            except (urllib3.exceptions.HTTPError, ServerError):
                if not known:
                    raise
                logger.warning("S3 at %s does not answer; trying again for a minute or two", self.endpoint)
                self._client = self._connect(PATIENT)
                found = self._client.bucket_exists(self.bucket)
            if not found:
                raise SpinError(
                    f"expected the bucket {self.bucket!r}, got none ({self.endpoint}, {self.uri}); create it, or set "
                    "store_uri"
                )
        self._client = self._connect(PATIENT)

    def below(self, folder: str) -> "Store":
        """Return the store in a folder of this one, over the same connections."""
        inner = Store(f"{self.uri}/{folder}", self.endpoint)
        inner._client = self._client
        return inner

    def probe(self) -> float:
        """Put, read back and remove a small object; return how far the server's clock is ahead of this one, in seconds.

        Raises:
            SpinError: the keys may not do one of these, or other bytes come back.
        """
        key, data = f"{self.prefix}preflight/{uuid.uuid4().hex}", uuid.uuid4().bytes
        with self._errors():
            self._client.put_object(self.bucket, key, io.BytesIO(data), len(data))
            with self._client.get_object(self.bucket, key) as response:
                got, date = response.read(), response.headers.get("Date")
            ahead = seconds_ahead(date)
            self._client.remove_object(self.bucket, key)
        if got != data:
            raise SpinError(f"expected the bytes that were put, got others ({self.endpoint}); look at the S3 server")
        return ahead

    def sizes(self, uri: str) -> dict[str, int]:
        """Return the sizes in bytes of the files at or below ``s3://bucket/path``, by their path below it.

        Raises:
            SpinError: there is nothing.
        """
        path, found = self._below(uri)
        return {name.removeprefix(path).lstrip("/"): int(item.size or 0) for name, item in found.items()}

    def begin_of(self, uri: str, most: int, path: Path) -> None:
        """Write the first ``most`` bytes of the file ``s3://bucket/path`` to ``path``."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        with self._errors(uri), self._client.get_object(bucket, key, 0, most) as response:
            path.write_bytes(response.read())

    def _below(self, uri: str) -> tuple[str, dict[str, Any]]:
        """Return the path of ``s3://bucket/path`` and the objects at or below it, by name."""
        bucket, _, path = uri.removeprefix("s3://").rstrip("/").partition("/")
        with self._errors(uri):
            found = {
                str(item.object_name): item
                for item in self._client.list_objects(bucket, prefix=path, recursive=True)
                # Consoles make empty objects that stand for folders.
                if not str(item.object_name).endswith("/")
                and (item.object_name == path or not path or str(item.object_name).startswith(f"{path}/"))
            }
        if not found:
            raise SpinError(f"expected a file or folder, got nothing at {uri} ({self.endpoint}); correct the path")
        return path, found

    def read_json(self, key: str) -> Any:
        """Return the JSON document at ``key``, or ``None`` where there is none."""
        found: Any = None

        def fault() -> str:
            nonlocal found
            try:
                response = self._client.get_object(self.bucket, self.prefix + key)
            except S3Error as error:
                if error.code != "NoSuchKey":
                    raise
                return ""
            try:
                found = json.loads(response.read())
            except ValueError:
                return f"expected JSON at {self.uri}/{key}, got something else; the store is damaged"
            finally:
                response.close()
                response.release_conn()
            return ""

        self._until_whole(fault)
        return found

    def write_json(self, key: str, value: Any) -> None:
        """Write a small JSON document in one request: it is there whole or not at all."""
        data = _document(value)

        def fault() -> str:
            sent = self._client.put_object(
                self.bucket, self.prefix + key, io.BytesIO(data), len(data), content_type="application/json"
            )
            return self._document_fault(key, data, str(sent.etag))

        self._until_whole(fault)

    def _document_fault(self, key: str, data: bytes, tag: str) -> str:
        if tag == _md5(data) or self._holds(key, hashlib.sha256(data).hexdigest()):
            return ""
        return f"expected {self.uri}/{key} to arrive whole, got another digest; check the network"

    def create_json(self, key: str, value: Any) -> bool:
        """Write a small JSON document where there is none; of several at once, one does. Return whether it was this.

        A server that knows no condition on writes lets the last one win.
        """
        data = _document(value)
        headers: DictType = {"Content-Type": "application/json", "If-None-Match": "*"}
        pauses = iter(ARRIVALS)
        with self._errors():
            while True:
                try:
                    # The client has no public way to make a condition.
                    sent = self._client._put_object(self.bucket, self.prefix + key, data, headers)
                    if self._document_fault(key, data, str(sent.etag)):
                        # It is this one's, so that nobody else's is written over.
                        self.write_json(key, value)
                    return True
                except S3Error as error:
                    if error.code == "NotImplemented":
                        self.write_json(key, value)
                        return True
                    if error.code == TAKEN:
                        return False
                    # A conflict says nothing of who was first.
                    if error.code != CONFLICT or (pause := next(pauses, None)) is None:
                        raise
                    time.sleep(pause)

    def remove_json(self, key: str) -> None:
        """Remove the JSON document at ``key``, if there is one."""
        with self._errors():
            self._client.remove_object(self.bucket, self.prefix + key)

    def put_file(self, path: Path) -> Ref:
        """Store a file under its digest; an object that is there already is not sent again."""
        digest = digest_of_file(path)
        key = f"objects/{digest}"
        with self._errors():
            if not self._stands(key, path.stat().st_size, etag_of(path, PART_BYTES), digest):
                self._send(key, path, digest)
        return Ref(kind="file", digest=digest, size=path.stat().st_size, uri=f"{self.uri}/{key}")

    def put_folder(self, folder: Path) -> Ref:
        """Store a folder's files, then its listing; the digest is the listing's."""
        listing = listing_of(folder)
        digest = digest_of(listing)
        key = f"folders/{digest}"
        with self._errors():
            document = _document(listing)
            if not self._stands(f"{key}.json", len(document), _md5(document), hashlib.sha256(document).hexdigest()):
                for path, entry in listing.items():
                    self._send(f"{key}/{path}", folder / path, entry["digest"])
                self.write_json(f"{key}.json", listing)
        size = sum(entry["size"] for entry in listing.values())
        return Ref(kind="folder", digest=digest, size=size, uri=f"{self.uri}/{key}")

    def get(self, ref: Ref) -> Path:
        """Return the local path of an object, fetched once into ``SPIN_CACHE`` and verified against its digest.

        Raises:
            SpinError: the object is missing or is not what its digest says.
        """
        target = _cache() / f"{ref.kind}s" / ref.digest
        if _cached(target, ref.size):
            return target
        with _arriving(target) as part:
            if ref.kind == "file":
                self._fetch(f"objects/{ref.digest}", part, ref.digest)
            else:
                for path, entry in self._listing(ref).items():
                    self._fetch(f"folders/{ref.digest}/{path}", part / path, entry.digest)
        return target

    def part(self, ref: Ref, path: str) -> Path:
        """Return the local path of one file of a folder, verified; the folder itself is not fetched.

        Raises:
            SpinError: as ``get``; or the folder has no such file.
        """
        whole = _cache() / "folders" / ref.digest
        if _cached(whole, ref.size) and (whole / path).is_file():
            return whole / path
        entry = self._listing(ref).get(path)
        if entry is None:
            raise SpinError(f"expected {path} in {ref.uri}, got none; the store is damaged")
        target = _cache() / "files" / entry.digest
        if not _cached(target, entry.size):
            with _arriving(target) as part:
                self._fetch(f"folders/{ref.digest}/{path}", part, entry.digest)
        return target

    def _listing(self, ref: Ref) -> dict[str, Entry]:
        listing: Any = None

        def fault() -> str:
            nonlocal listing
            listing = self.read_json(f"folders/{ref.digest}.json")
            whole = listing is not None and digest_of(listing) == ref.digest
            return "" if whole else f"expected the listing of {ref.uri}, got none or another; the store is damaged"

        self._until_whole(fault)
        try:
            entries = TypeAdapter(dict[str, Entry]).validate_python(listing)
        except ValidationError:
            raise SpinError(
                f"expected digests and sizes in the listing of {ref.uri}, got others; the store is damaged"
            ) from None
        for path in entries:
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise SpinError(f"expected plain paths in {ref.uri}, got {path!r}; the store is damaged")
        return entries

    def download(self, uri: str) -> Path:
        """Return the local path of any file or folder of this server, ``s3://bucket/path``: a user's data or model.

        What was fetched is kept in ``SPIN_CACHE`` until it changes on the server.

        Raises:
            SpinError: there is nothing at ``uri``, or a name in it leaves the folder.
        """
        bucket, _, path = uri.removeprefix("s3://").rstrip("/").partition("/")
        if ".." in PurePosixPath(path).parts:
            raise SpinError(f"expected a plain path, got {uri}; write it without '..'")
        found = self._below(uri)[1]
        tags = {name: str(item.etag) for name, item in found.items()}
        target = (
            _cache() / "downloads" / digest_of([self.endpoint, bucket, path, tags]) / PurePosixPath(path or bucket).name
        )
        with _named(uri):
            if _cached(target, sum(int(item.size or 0) for item in found.values())):
                return target
        with _arriving(target.parent) as part:
            for name, item in found.items():
                inside = PurePosixPath(name.removeprefix(path).lstrip("/"))
                if ".." in inside.parts:
                    raise SpinError(f"expected plain file names under {uri}, got {name!r}; rename it")
                with _named(f"s3://{bucket}/{name}"):
                    self._fetch_tagged(bucket, name, part / target.name / inside, item, part.parent / "coming")
        return target

    def _fetch_tagged(self, bucket: str, name: str, path: Path, item: Any, coming: Path) -> None:
        """Fetch a user's file by way of ``coming``; it is compared with the tag that the server lists it under."""
        uri, tag = f"s3://{bucket}/{name}", str(item.etag)

        def fault() -> str:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._client.fget_object(bucket, name, str(path), tmp_file_path=str(coming))
            if path.stat().st_size == item.size and self._may_be(bucket, name, path, tag):
                return ""
            return (
                f"expected {uri} as the server lists it, got other bytes; check the network, and start again once "
                "nobody writes to it"
            )

        self._until_whole(fault, uri)

    def _may_be(self, bucket: str, name: str, path: Path, tag: str) -> bool:
        """Return whether a file of the right size has this tag, or the tag says nothing of what is in it."""
        found, size = re.fullmatch(r"[0-9a-f]{32}(?:-(\d+))?", tag), path.stat().st_size
        if not found:
            return True
        part_bytes = size + 1
        if found[1]:
            part_bytes = int(self._client.stat_object(bucket, name, extra_query_params={"partNumber": "1"}).size or 0)
            if not 0 < part_bytes < size or -(-size // part_bytes) != int(found[1]):
                # The server does not say what parts it came in.
                return True
        if etag_of(path, part_bytes) == tag:
            return True
        # With keys of the server's own it is no MD5.
        headers = self._client.stat_object(bucket, name).metadata or {}
        return "kms" in str(headers.get("x-amz-server-side-encryption", ""))

    def remove(self, ref: Ref) -> None:
        """Remove a folder that nothing refers to any more; its listing goes first, so that it is never half there."""
        key = f"folders/{ref.digest}"
        with self._errors():
            listing = self.read_json(f"{key}.json") or {}
            for name in (f"{key}.json", *(f"{key}/{path}" for path in listing)):
                self._client.remove_object(self.bucket, self.prefix + name)

    def _send(self, key: str, path: Path, digest: str) -> None:
        """Upload a file; what the server has is compared with what was meant, as not every server checks what came."""

        def fault() -> str:
            try:
                sent = self._client.fput_object(self.bucket, self.prefix + key, str(path), part_size=PART_BYTES).etag
            except S3Error as error:
                # Its parts were put together, and the answer was lost.
                if error.code != "NoSuchUpload":
                    raise
                sent = None
            tag = etag_of(path, PART_BYTES)
            if sent == tag or self._stands(key, path.stat().st_size, tag, digest):
                return ""
            return f"expected {self.uri}/{key} to arrive whole, got another digest; check the network"

        try:
            self._until_whole(fault)
        except DamagedError:
            # Who may not remove it leaves it: it is not trusted for being there.
            with suppress(S3Error, urllib3.exceptions.HTTPError):
                self._client.remove_object(self.bucket, self.prefix + key)
            raise

    def _stands(self, key: str, size: int, tag: str, digest: str) -> bool:
        """Return whether an object is there, and is what it should be."""
        try:
            found = self._client.stat_object(self.bucket, self.prefix + key)
        except S3Error as error:
            if error.code in ("NoSuchKey", "NoSuchObject"):
                return False
            raise
        # With keys of its own (SSE-KMS) a server's tag says nothing: what it holds is read then.
        return found.size == size and (found.etag == tag or self._holds(key, digest))

    def _holds(self, key: str, digest: str) -> bool:
        response = self._client.get_object(self.bucket, self.prefix + key)
        try:
            found = hashlib.sha256()
            for data in response.stream(2**20):
                found.update(data)
            return found.hexdigest() == digest
        finally:
            response.close()
            response.release_conn()

    def _fetch(self, key: str, path: Path, digest: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)

        def fault() -> str:
            try:
                self._client.fget_object(self.bucket, self.prefix + key, str(path))
            except S3Error as error:
                if error.code != "NoSuchKey":
                    raise
                return f"expected the object {self.uri}/{key}, got none; the store is damaged"
            got = digest_of_file(path)
            return (
                f"expected {self.uri}/{key} with digest {digest[:12]}, got {got[:12]}; the store is damaged"
                if got != digest
                else ""
            )

        self._until_whole(fault)

    def _until_whole(self, fault: Callable[[], str], uri: str = "") -> None:
        """Call ``fault`` until it has moved something whole, some seconds apart; raise its last word otherwise."""
        for pause in (*ARRIVALS, None):
            with self._errors(uri):
                try:
                    word = fault()
                except (urllib3.exceptions.ProtocolError, urllib3.exceptions.ReadTimeoutError, ParseError):
                    # An answer came broken, which the client does not ask for again by itself.
                    if pause is None:
                        raise
                    word = "cut"
            if not word:
                return
            if pause is None:
                raise DamagedError(word)
            time.sleep(pause)
