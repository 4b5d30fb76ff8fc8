"""Where scorers' weights come from, what is refused, and what converting the authors' files leaves."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from spin.__main__ import app
from spin.config import WeightsConfig
from spin.errors import SpinError
from spin.scorers import aesthetic, convert, image_reward
from spin.scorers.convert import from_image_reward, from_open_clip, unpickled
from spin.scoring import _common_weights
from spin.store import digest_of_file
from spin.weights import Part, Weights, digest_of_weights, network, read
from tests import reference, tiny
from tests.reference import GOLDEN


def folder_of(path: Path, **tensors: torch.Tensor) -> Path:
    path.mkdir(parents=True)
    save_file(tensors or {"a": torch.zeros(2)}, path / "model.safetensors")
    return path


def pinned(folder: Path, scorer: str = "pickscore", **more: str) -> Weights:
    return Weights({scorer: WeightsConfig(source=str(folder), **more)})


def refusal(weights: Weights, scorer: str = "pickscore") -> str:
    with pytest.raises(SpinError) as caught:
        weights.folder(scorer)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("expected ")
    assert ";" in message
    return message


def test_a_folder_with_the_right_digest(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "w")
    digest = digest_of_weights(folder)
    weights = pinned(folder, digest=digest)
    assert weights.folder("pickscore") == folder
    assert weights.digests == {"pickscore": digest}


def test_the_digest_is_that_of_what_is_loaded(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "w")
    digest = digest_of_weights(folder)
    (folder / "README.md").write_text("hello")
    assert digest_of_weights(folder) == digest
    (folder / "vocab.json").write_text("{}")
    other = digest_of_weights(folder)
    assert other != digest
    assert f"expected weights with digest {digest[:12]}, got {other[:12]}" in refusal(pinned(folder, digest=digest))


def test_weights_of_another_scorer_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "w")
    (folder / "scorer.json").write_text(json.dumps({"scorer": "hpsv2_1"}))
    assert "expected weights of hpsv2_0, got those of hpsv2_1" in refusal(pinned(folder, "hpsv2_0"), "hpsv2_0")
    assert pinned(folder, "hpsv2_1").folder("hpsv2_1") == folder


def test_what_is_not_there(tmp_path: Path) -> None:
    assert "python -m spin convert-weights hpsv2_0 FOLDER" in refusal(Weights(), "hpsv2_0")
    assert "got nothing at" in refusal(pinned(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "HPS_v2_compressed.pt").write_bytes(b"\x80\x04.")
    assert "expected model.safetensors in" in refusal(pinned(tmp_path / "empty"))
    assert "there is no store here" in refusal(Weights({"pickscore": WeightsConfig(source="s3://b/p")}))


def test_s3_is_fetched_by_the_store(tmp_path: Path) -> None:
    folder, asked = folder_of(tmp_path / "w"), []

    def fetch(uri: str) -> Path:
        asked.append(uri)
        return folder

    weights = Weights({"pickscore": WeightsConfig(source="s3://models/pickscore")}, fetch)
    assert weights.folder("pickscore") == folder
    assert asked == ["s3://models/pickscore"]


def test_parts_of_the_hub_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {"o/model": folder_of(tmp_path / "model"), "o/words": tmp_path / "words"}
    folders["o/words"].mkdir()
    (folders["o/words"] / "vocab.json").write_text("{}")
    (folders["o/words"] / "model.safetensors").write_bytes(b"another")
    monkeypatch.setattr(Part, "fetch", lambda part: folders[part.repo])
    parts = (Part("o/model", "c0ffee", ("model.safetensors",)), Part("o/words", "c0ffee", ("vocab.json",)))
    weights = Weights()
    found = weights.folder("pickscore", parts)
    assert sorted(path.name for path in found.iterdir()) == ["model.safetensors", "vocab.json"]
    assert (found / "model.safetensors").read_bytes() == (folders["o/model"] / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("measure", "find"), [("clip_score", Weights.judge), ("frechet_distance", Weights.features)])
def test_judge_and_image_model_are_found_alike_and_their_digests_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measure: str, find: Callable[[Weights, str], str]
) -> None:
    folder, asked = folder_of(tmp_path / "w"), []
    monkeypatch.setattr(Part, "fetch", lambda part, _: asked.append((part.repo, part.revision)) or folder)
    for name in (str(folder), "s3://models/w", "someone/w@c0ffee", "someone/w"):
        weights = Weights({}, lambda uri: asked.append(uri) or folder)
        assert find(weights, name) == str(folder)
        assert weights.digests == {measure: digest_of_weights(folder)}
    assert asked == ["s3://models/w", ("someone/w", "c0ffee"), ("someone/w", "main")]


@pytest.mark.parametrize(
    ("part", "measure", "find"),
    [("judge", "clip_score", Weights.judge), ("features", "frechet_distance", Weights.features)],
)
def test_emoji_is_in_the_package(part: str, measure: str, find: Callable[[Weights, str], str]) -> None:
    weights = Weights()
    found = Path(find(weights, "emoji"))
    assert found.parts[-3:] == ("spin", "emoji", part)
    assert weights.digests == {measure: digest_of_weights(found)}
    # What can be nothing but a folder is left to whoever loads it: that knows the option to name.
    assert find(weights, "./nowhere") == "./nowhere"


def test_real_images_are_measured_with_the_weights_of_the_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[str] = []
    monkeypatch.setattr("spin.scoring.forget", lambda _, stage: forgotten.append(stage))
    weights = {"clip_score": "a", "frechet_distance": "b"}
    parts = [SimpleNamespace(run=None, stage=f"shard {n}", facts={"weights": weights}) for n in range(2)]
    assert _common_weights(parts, {"frechet_distance": "b"}) == _common_weights(parts, {}) == weights
    assert not forgotten
    with pytest.raises(SpinError, match=r"^expected real images scored with the weights of the first shard, got oth"):
        _common_weights(parts, {"frechet_distance": "c"})
    assert forgotten == ["shard 0", "shard 1"]


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(SpinError, match=r"expected intact weights, got a damaged model\.safetensors"):
        read(tmp_path)


class Harm:
    def __reduce__(self) -> object:
        return Path.touch, (Path("harm"),)


def test_a_pickle_that_does_something_is_refused_and_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, write in {"torch.pt": lambda path: torch.save({"a": Harm()}, path),
                        "plain.pt": lambda path: path.write_bytes(pickle.dumps(Harm())),
                        "junk.pt": lambda path: path.write_bytes(b"junk")}.items():  # fmt: skip
        write(tmp_path / name)
        with pytest.raises(SpinError, match="expected a file of plain weights") as caught:
            unpickled(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(SpinError, match="expected tensors by name"):
        unpickled(tmp_path / "list.pt")


@pytest.fixture
def hps_file(tmp_path: Path) -> Path:
    path = tmp_path / "HPS.pt"
    torch.save({"state_dict": {k: v.half() for k, v in reference.waves(GOLDEN["open_clip"]["shapes"]).items()}}, path)
    return path


def test_converting_by_the_command(hps_file: Path, tmp_path: Path) -> None:
    words = tmp_path / "words"
    words.mkdir()
    (words / "vocab.json").write_text("{}")
    digest, target = digest_of_file(hps_file), tmp_path / "out" / "hps"
    arguments = ["convert-weights", "hpsv2_0", str(target), "--original", str(hps_file), "--rest", str(words)]
    found = CliRunner().invoke(app, [*arguments, "--digest", digest], catch_exceptions=False)
    assert json.loads(found.stdout) == {"source": str(target), "digest": digest_of_weights(target)}
    assert sorted(path.name for path in target.iterdir()) == ["model.safetensors", "scorer.json", "vocab.json"]
    assert json.loads((target / "scorer.json").read_text()) == {"scorer": "hpsv2_0", "original": digest}
    tensors = load_file(target / "model.safetensors")
    wanted = from_open_clip(torch.load(hps_file)["state_dict"])
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[k], wanted[k].float()) for k in tensors)


def test_a_conversion_that_fails_leaves_nothing(hps_file: Path, tmp_path: Path) -> None:
    digest, target = digest_of_file(hps_file), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"not a tensor")
    for scorer, options, message in (
        ("hpsv2_0", {}, "expected --digest, got none"),
        ("hpsv2_1", {}, "with digest c57a38fb4a2f, got"),
        ("hpsv2_0", {"digest": "0" * 64}, "with digest 000000000000, got"),
        ("pickscore", {"digest": digest}, "expected one of hpsv2_0, hpsv2_1, image_reward, aesthetic, got 'pickscore'"),
        ("image_reward", {"digest": digest, "rest": tmp_path / "nowhere"}, "expected BERT's vocabulary"),
        ("hpsv2_0", {"digest": digest, "rest": tmp_path / "empty"}, "expected CLIP's tokenizer in .*empty, got none"),
        ("aesthetic", {"digest": digest, "rest": tmp_path / "empty"}, "expected intact weights, got none in .*empty"),
        ("aesthetic", {"digest": digest, "rest": tmp_path / "damaged"}, "expected intact weights, got a damaged"),
    ):
        with pytest.raises(SpinError, match=message) as refused:
            convert.convert(scorer, target, hps_file, **options)
        assert "\n" not in str(refused.value)
        assert not target.exists()
        assert not list(tmp_path.glob(".part-*"))
    target.mkdir()
    with pytest.raises(SpinError, match="expected a new folder"):
        convert.convert("hpsv2_0", target, hps_file, digest)


def test_image_rewards_tokenizer_comes_along(tmp_path: Path) -> None:
    tiny.bert_tokenizer(tmp_path / "bert")
    state = {f"{k}": v for k, v in reference.waves(GOLDEN["image_reward"]["shapes"]).items()}
    # What the authors' file has and nothing uses.
    state |= {"blip.vision_proj.weight": torch.zeros(2, 2), "blip.text_encoder.embeddings.position_ids": torch.zeros(1)}
    torch.save(state, tmp_path / "ImageReward.pt")
    target = tmp_path / "out"
    convert.convert("image_reward", target, tmp_path / "ImageReward.pt", digest_of_file(tmp_path / "ImageReward.pt"),
                    tmp_path / "bert")  # fmt: skip
    from transformers import BertTokenizer

    words = BertTokenizer.from_pretrained(target)
    assert words.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [105, 106]
    assert words("W3 w4")["input_ids"] == [2, 8, 9, 3]
    assert load_file(target / "model.safetensors").keys() == from_image_reward(state).keys()


def test_published_weights_have_the_networks_names() -> None:
    """Every weight of the real networks has a name in the authors' files, by the same rules as the small ones."""
    from transformers import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    small = from_image_reward(reference.waves(GOLDEN["image_reward"]["shapes"]))
    with torch.device("meta"):
        wanted = {f"vision.{k}" for k in BlipVisionModel(image_reward.vision_config()).state_dict()}
        wanted |= {f"text.{k}" for k in BlipTextModel(image_reward.text_config(), add_pooling_layer=False).state_dict()}

    def kinds(names: set[str]) -> set[str]:
        return {".".join("N" if part.isdigit() else part for part in name.split(".")) for name in names}

    assert kinds({name for name in small if not name.startswith("head.")}) == kinds(wanted)


def test_the_wrong_network_is_named(tmp_path: Path) -> None:
    from transformers import CLIPVisionModelWithProjection

    folder = folder_of(tmp_path / "w", **{"visual_projection.weight": torch.zeros(3, 3)})
    with pytest.raises(SpinError, match=r"expected weights of x, got others: vision_model.+ is none, not \[") as caught:
        network(CLIPVisionModelWithProjection, aesthetic.vit_l_14_config(), read(folder), "x")
    assert "\n" not in str(caught.value)
