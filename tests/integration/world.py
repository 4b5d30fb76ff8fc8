"""A tiny world on real servers: models, images and the stages of a run, each in fractions of a second."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from minio import Minio

from pipelines.laptop import REGION, Laptop
from spin.__main__ import main
from spin.run import Index, Run
from spin.stages import Place
from spin.stages.generate import generate
from spin.stages.prepare import prepare
from spin.stages.score import score
from spin.stages.train import train
from spin.store import Store
from tests import tiny

BUCKET, PREFIX = "spin", "tests"
EXPERIMENT = "tests"


def minio_of(servers: Laptop) -> Minio:
    host = servers.s3_endpoint.removeprefix("http://")
    return Minio(host, servers.access_key, servers.secret_key, secure=False, region=REGION)


@dataclass(frozen=True)
class World:
    """The servers, a base model, a judge, and a folder of images."""

    servers: Laptop
    base: Path
    judge: Path
    images: Path

    @property
    def store_uri(self) -> str:
        return f"s3://{BUCKET}/{PREFIX}"

    def store(self) -> Store:
        return Store(self.store_uri, self.servers.s3_endpoint)

    def minio(self) -> Minio:
        """Return a client that does to the store what its own code never would."""
        return minio_of(self.servers)

    def names(self, prefix: str = "") -> set[str]:
        """Return the names of all objects below ``prefix`` in the store."""
        found = self.minio().list_objects(BUCKET, f"{PREFIX}/{prefix}", recursive=True)
        return {str(item.object_name).removeprefix(f"{PREFIX}/") for item in found}

    def documents(self, run_key: str) -> dict[str, bytes]:
        """Return the run's documents, byte for byte."""
        client, documents = self.minio(), {}
        for name in self.names(f"runs/{run_key}/"):
            with client.get_object(BUCKET, f"{PREFIX}/{name}") as answer:
                documents[name.removeprefix(f"runs/{run_key}/")] = answer.read()
        return documents

    def copy(self, run_key: str, new_key: str) -> None:
        """Give the run a second run key."""
        store = self.store()
        for name in self.documents(run_key):
            store.write_json(f"runs/{new_key}/{name}", store.read_json(f"runs/{run_key}/{name}"))

    def run(self, run_key: str) -> Run:
        return Run(self.store(), run_key)

    def place(self, run_key: str, tracking_uri: str = "") -> Place:
        return Place(run_key, self.store_uri, self.servers.s3_endpoint, tracking_uri, EXPERIMENT)

    def command(self, command: str, run_key: str, *arguments: str) -> list[str]:
        """Return the arguments of ``python -m spin`` for one command on a run, without tracking."""
        place = (f"--store-uri={self.store_uri}", f"--store-endpoint={self.servers.s3_endpoint}", "--tracking-uri=")
        return [command, f"--run-key={run_key}", *place, *arguments]

    def spin(self, command: str, run_key: str, *arguments: str) -> None:
        """Run one command of ``python -m spin`` to its good end, in this process."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["spin", *self.command(command, run_key, *arguments)])
            with pytest.raises(SystemExit) as ended:
                main()
        assert not ended.value.code

    def prepare(self, place: Place, **training: object) -> Index:
        options = tiny.overrides(self.judge, **training)
        return prepare(place, "emoji-cpu", str(self.base), str(self.images), options, iterations=2)

    def play(self, place: Place, iterations: int, shards: int = 1, **training: object) -> dict[str, Index]:
        """Run every stage but register; return the indexes by stage, in the order that they were made in."""
        made = [self.prepare(place, **training), score(place, 0).index]
        for iteration in range(1, iterations + 1):
            made += [generate(place, iteration, shard, shards) for shard in range(shards)]
            made += [train(place, iteration, shards), score(place, iteration).index]
        return {index.stage: index for index in made}
