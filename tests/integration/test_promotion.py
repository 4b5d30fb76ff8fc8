"""From challenger to champion and back, in a real registry."""

import base64
import hmac
import json
import queue
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from spin.errors import SpinError
from spin.run import Index
from spin.stages.promote import promote, rollback
from spin.stages.register import register
from spin.tracking import Registry
from tests.integration.conftest import Played
from tests.integration.world import World

pytestmark = pytest.mark.integration

# Two or three prompts and random weights: a policy that any player passes, and one that none does.
OPEN: dict[str, Any] = {"fewest_prompts": 1, "better": {}, "win_rate": 0, "not_worse": {"clip_score": 1e6}}
SHUT: dict[str, Any] = {"fewest_prompts": 1, "better": {"clip_score": 1e6}}


class Registered:
    """The players of the finished run under a registered model of their own."""

    def __init__(self, world: World, name: str):
        self.world, self.name = world, name
        world.copy("played", name)
        self.client = MlflowClient(world.servers.mlflow_uri, world.servers.mlflow_uri)
        self.uri = world.servers.mlflow_uri
        self.place = world.place(name, self.uri)

    def register(self, policy: dict[str, Any], iterations: int = 2) -> Index:
        return register(self.place, self.name, iterations, policy)

    def champion(self) -> str:
        return str(self.client.get_registered_model(self.name).aliases.get("champion", ""))

    def tags(self, version: str) -> dict[str, str]:
        tags: dict[str, str] = self.client.get_model_version(self.name, version).tags
        return tags


@pytest.fixture
def registered(world: World, played: Played, request: pytest.FixtureRequest) -> Registered:
    assert played
    return Registered(world, re.sub(r"[^a-z0-9]+", "-", request.node.name)[-60:].strip("-"))


def test_a_passed_gate_only_recommends(registered: Registered) -> None:
    index = registered.register(OPEN)
    assert index.facts["gate"]["outcome"] == "passed"
    assert index.facts["gate"]["against"] == "the base"
    tags = registered.tags(index.facts["version"])
    assert tags["spin.gate"] == "passed"
    assert tags["spin.gate_reason"].startswith("against the base: clip_score ")
    assert '"fewest_prompts":1' in tags["spin.gate_policy"]
    assert registered.champion() == ""


def test_an_automatic_gate_promotes_what_passes(registered: Registered) -> None:
    index = registered.register(SHUT | {"promote": "automatic"})
    assert (index.facts["gate"]["outcome"], registered.champion()) == ("failed", "")
    index = registered.register(OPEN | {"promote": "automatic"})
    assert registered.champion() == index.facts["version"]
    assert "gate: against the base" in registered.tags(index.facts["version"])["spin.promoted"]


def test_a_challenger_is_judged_against_the_champion(registered: Registered) -> None:
    challenger = registered.register(OPEN).facts["version"]
    rival = "2" if challenger == "1" else "1"
    promote(registered.uri, registered.name, "to be beaten", rival)
    gate = registered.register(SHUT).facts["gate"]
    assert (gate["outcome"], gate["against"]) == ("failed", f"champion version {rival}")
    promote(registered.uri, registered.name, "the better one")
    gate = registered.register(OPEN | {"confidence": 0.9}).facts["gate"]
    assert (gate["outcome"], gate["reason"]) == ("champion", f"it is champion version {challenger} already")
    # What the gate said before it became champion stays to be read.
    assert registered.tags(challenger)["spin.gate"] == "failed"


def rival_of(registered: Registered) -> tuple[str, str]:
    """Make a player of another run champion; return that run's key and the version."""
    other = f"{registered.name[:50]}-other"
    registered.world.copy("played", other)
    rival = register(registered.world.place(other, registered.uri), registered.name, 2, OPEN).facts["version"]
    promote(registered.uri, registered.name, "of another run", rival)
    return other, rival


def test_a_champion_of_another_store_cannot_be_compared(registered: Registered) -> None:
    _, rival = rival_of(registered)
    registered.client.set_model_version_tag(registered.name, rival, "spin.scores_digest", "0" * 64)
    gate = registered.register(OPEN | {"promote": "automatic"}).facts["gate"]
    assert gate["outcome"] == "incomparable"
    assert gate["reason"] == f"champion version {rival} has no scores in this store; promote by hand"
    assert registered.champion() == rival


@pytest.mark.parametrize(
    ("section", "option", "value", "told"),
    [
        ("generate", "num_inference_steps", 7, "was scored with another generate.num_inference_steps; promote by hand"),
        ("train", "learning_rate", 1e-7, ""),
        ("score", "sheet_prompts", 3, ""),
        ("score", "max_prompts", 9999, ""),
        ("train", "optimizer", 1, "is of a run that this version cannot read (expected"),
    ],
)
def test_a_champion_is_compared_unless_it_was_drawn_or_judged_otherwise(
    registered: Registered, section: str, option: str, value: object, told: str
) -> None:
    other, rival = rival_of(registered)
    store = registered.world.store()
    document = store.read_json(f"runs/{other}/run.json")
    document["config"][section][option] = value
    store.write_json(f"runs/{other}/run.json", document)
    gate = registered.register(OPEN).facts["gate"]
    assert gate["against"] == f"champion version {rival}"
    assert gate["outcome"] == ("incomparable" if told else "passed"), gate
    if told:
        assert gate["reason"].startswith(f"champion version {rival} {told}")


class Cut(Exception):
    """The connection, at some call."""


@pytest.mark.parametrize("call", range(3))
def test_a_rollback_that_was_cut_short_is_given_again(
    registered: Registered, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered.register(OPEN)
    promote(registered.uri, registered.name, "first", "1")
    promote(registered.uri, registered.name, "second", "2")
    with monkeypatch.context() as patch:
        cut_at(call, patch)
        with pytest.raises(Cut):
            rollback(registered.uri, registered.name, "bad")
    done = rollback(registered.uri, registered.name, "bad")
    assert (done["champion"], registered.champion()) == ("1", "1")
    assert "spin.rolled_back" in registered.tags("2")
    assert "spin.rolled_back" not in registered.tags("1")
    with pytest.raises(SpinError, match="expected an earlier champion"):
        rollback(registered.uri, registered.name, "further")


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("call", range(3))
def test_a_promotion_that_was_cut_short_leaves_a_way_back(
    registered: Registered, call: int, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered.register(OPEN)
    promote(registered.uri, registered.name, "first", "1")
    with monkeypatch.context() as patch:
        cut_at(call, patch)
        with pytest.raises(Cut):
            promote(registered.uri, registered.name, "second", "2")
    if again:
        promote(registered.uri, registered.name, "second", "2")
        assert registered.champion() == "2"
    if registered.champion() == "2":
        assert rollback(registered.uri, registered.name, "bad")["champion"] == "1"
    with pytest.raises(SpinError, match="expected an earlier champion"):
        rollback(registered.uri, registered.name, "further")
    assert registered.champion() == "1"


def cut_at(call: int, patch: pytest.MonkeyPatch) -> None:
    """Let what changes the registry fail from its ``call``-th time on, counted from 0."""
    calls = iter(range(100))
    for name in ("point", "tag", "set_champions"):
        real = getattr(Registry, name)

        def change(*given: Any, real: Any = real) -> None:
            if next(calls) >= call:
                raise Cut
            real(*given)

        patch.setattr(Registry, name, change)


@dataclass
class Receiver:
    """A server that keeps what is posted to it."""

    url: str
    posts: "queue.Queue[tuple[Message, bytes]]"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    posts: queue.Queue[tuple[Message, bytes]] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posts.put((self.headers, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Receiver(f"http://127.0.0.1:{server.server_port}/hooks/champion", posts)
        server.shutdown()


def signature(secret: str, headers: Message, body: bytes) -> str:
    """Return what docs/registry.md says that ``X-MLflow-Signature`` is."""
    signed = f"{headers['X-MLflow-Delivery-Id']}.{headers['X-MLflow-Timestamp']}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(secret.encode(), signed, "sha256").digest()).decode()


def test_a_webhook_hears_who_is_champion(registered: Registered, receiver: Receiver) -> None:
    client = registered.client
    hook = client.create_webhook("champion", receiver.url, ["model_version_alias.created"], secret="known to both")
    try:
        challenger = registered.register(OPEN).facts["version"]
        promote(registered.uri, registered.name, "the webhook is told")
        heard = []
        for _ in range(2):
            headers, body = receiver.posts.get(timeout=30)
            assert headers["X-MLflow-Signature"] == signature("known to both", headers, body)
            assert headers["X-MLflow-Signature"] != signature("guessed", headers, body)
            assert abs(time.time() - int(headers["X-MLflow-Timestamp"])) < 60
            post = json.loads(body)
            assert (post["entity"], post["action"]) == ("model_version_alias", "created")
            heard.append(post["data"])
        aliases = ("challenger", "champion")
        wanted = [{"name": registered.name, "alias": alias, "version": challenger} for alias in aliases]
        assert sorted(heard, key=lambda data: data["alias"]) == wanted
    finally:
        client.delete_webhook(hook.webhook_id)


def test_promotion_by_hand_and_the_way_back(registered: Registered) -> None:
    registered.register(SHUT)
    challenger = registered.client.get_registered_model(registered.name).aliases["challenger"]
    other = "2" if challenger == "1" else "1"
    done = promote(registered.uri, registered.name, "the sheet looks better")
    assert (done["champion"], done["before"], done["gate"]) == (challenger, "", "failed")
    assert "the sheet looks better" in registered.tags(challenger)["spin.promoted"]
    promote(registered.uri, registered.name, "second thoughts", other)
    assert registered.champion() == other
    done = rollback(registered.uri, registered.name, "hands look wrong")
    assert (done["champion"], done["before"]) == (challenger, other)
    assert registered.champion() == challenger
    assert "hands look wrong" in registered.tags(other)["spin.rolled_back"]
    with pytest.raises(SpinError, match=r"^expected an earlier champion of .+, got none"):
        rollback(registered.uri, registered.name, "further")
    assert registered.champion() == challenger


def test_a_champion_that_was_set_in_the_ui_can_be_returned_to(registered: Registered) -> None:
    registered.register(OPEN)
    registered.client.set_registered_model_alias(registered.name, "champion", "1")
    promote(registered.uri, registered.name, "by the command", "2")
    assert rollback(registered.uri, registered.name, "back")["champion"] == "1"
    # And one that took the place of a promoted one is left.
    promote(registered.uri, registered.name, "again", "2")
    registered.client.set_registered_model_alias(registered.name, "champion", "1")
    assert rollback(registered.uri, registered.name, "back")["champion"] == "2"


def test_what_was_rolled_back_does_not_return_by_itself(registered: Registered) -> None:
    challenger = registered.register(OPEN).facts["version"]
    promote(registered.uri, registered.name, "first", "2" if challenger == "1" else "1")
    promote(registered.uri, registered.name, "second", challenger)
    rollback(registered.uri, registered.name, "bad")
    index = registered.register(OPEN | {"promote": "automatic"})
    assert index.facts["gate"]["outcome"] == "passed"
    assert registered.champion() != challenger


@pytest.mark.parametrize(
    ("version", "reason", "line"),
    [
        ("9", "because", "expected version 9 of 'tiny-player', got none"),
        ("x", "because", "expected version x of 'tiny-player', got none"),
        ("", " ", "expected a reason that others can read later, got none; set --reason"),
    ],
)
def test_wrong_promotions_are_told(world: World, played: Played, version: str, reason: str, line: str) -> None:
    with pytest.raises(SpinError) as refused:
        promote(world.servers.mlflow_uri, played.model_name, reason, version)
    assert str(refused.value).startswith(line)


def test_an_unknown_model_is_told(world: World) -> None:
    with pytest.raises(SpinError, match=r"^expected the alias challenger of 'nobody', got none"):
        promote(world.servers.mlflow_uri, "nobody", "because")
    with pytest.raises(SpinError, match=r"^expected an earlier champion of 'nobody', got none"):
        rollback(world.servers.mlflow_uri, "nobody", "because")


def test_another_server_does_not_know_what_the_first_was_told(registered: Registered) -> None:
    """The index in the store says that it is registered; this server says that it is not."""
    first = registered.register(OPEN)
    for version in first.facts["versions"].values():
        registered.client.delete_model_version(registered.name, version)
    again = registered.register(OPEN)
    assert again.facts["version"] not in ("", *first.facts["versions"].values())
    assert registered.tags(again.facts["version"])["spin.digest"] == again.outputs["model"].digest


def test_a_wrong_policy_registers_nothing(registered: Registered) -> None:
    with pytest.raises(SpinError, match=r"^expected a known option of the gate, got 'beter'"):
        registered.register({"beter": {}})
    assert registered.world.run(registered.name).find("register") is not None, "the copied one"
    assert not registered.client.search_registered_models(f"name = '{registered.name}'")


def test_commands_are_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "registry.md").read_text()
    for words in ("spin-diffusion promote", "spin-diffusion rollback", "spin-diffusion report", "mlflow models serve"):
        assert words in page
