"""What the store promises at any moment, whatever was killed: a list of the promises that are broken."""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from minio import Minio

from spin.run import Index
from spin.store import Ref, digest_of


class Bucket:
    """Read-only access below a prefix that shares no code with the store; what an object is named by is read once."""

    def __init__(self, client: Minio, bucket: str, prefix: str):
        self.client, self.bucket, self.prefix = client, bucket, prefix
        self.known: dict[str, str] = {}

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every object, by name."""
        found = self.client.list_objects(self.bucket, f"{self.prefix}/", recursive=True)
        return {str(item.object_name).removeprefix(f"{self.prefix}/"): int(item.size or 0) for item in found}

    def read(self, name: str) -> bytes:
        with self.client.get_object(self.bucket, f"{self.prefix}/{name}") as answer:
            return answer.read()

    def digest(self, name: str) -> str:
        # Objects never change, so each is read once however often the store is looked at.
        if name not in self.known:
            self.known[name] = hashlib.sha256(self.read(name)).hexdigest()
        return self.known[name]


def broken(bucket: Bucket) -> list[str]:
    """Return a line per broken promise, none for a sound store.

    - An object's name is the digest of what it holds; so is a folder's listing.
    - What a listing names is there, whole.
    - What an index or a checkpoint's word names is there, of the size that it says.
    """
    sizes = bucket.sizes()
    names = set(sizes)
    lines = [
        f"{name} holds {bucket.digest(name)}"
        for name in names
        if name.startswith("objects/") and bucket.digest(name) != name.removeprefix("objects/")
    ]
    for name in names:
        if re.fullmatch(r"(parts/)?folders/[^/]+\.json", name):
            lines += _listing(bucket, name, names)
        if name.startswith("runs/") and not name.endswith(("/run.json", "/mlflow.json", "/shards.json")):
            refs = _refs(name, bucket.read(name))
            lines += [f"{name} names {line}" for ref in refs for line in _unlike(bucket, name, ref, sizes)]
    return sorted(lines)


def _listing(bucket: Bucket, name: str, names: set[str]) -> Iterator[str]:
    folder, listing = name.removesuffix(".json"), json.loads(bucket.read(name))
    if digest_of(listing) != folder.rpartition("/")[2]:
        yield f"{name} holds the listing {digest_of(listing)}"
    for path, entry in listing.items():
        if f"{folder}/{path}" not in names:
            yield f"{name} lists {path}, which is not there"
        elif bucket.digest(f"{folder}/{path}") != entry["digest"]:
            yield f"{name} lists {path} with another digest"


def _refs(name: str, data: bytes) -> list[Ref]:
    document: dict[str, Any] = json.loads(data)
    if name.endswith(".progress.json"):
        return [Ref.model_validate(part) for part in document["parts"]]
    return list(Index.model_validate(document).outputs.values())


def _unlike(bucket: Bucket, document: str, ref: Ref, sizes: dict[str, int]) -> Iterator[str]:
    name = f"objects/{ref.digest}" if ref.kind == "file" else f"folders/{ref.digest}.json"
    if "/score" in document and document.endswith(".progress.json"):
        name = f"parts/{name}"
    if name not in sizes:
        yield f"{name}, which is not there"
        return
    size = sizes[name]
    if ref.kind == "folder":
        size = sum(sizes.get(f"{name.removesuffix('.json')}/{path}", 0) for path in json.loads(bucket.read(name)))
    if size != ref.size:
        yield f"{name} of {ref.size} bytes, which has {size}"
