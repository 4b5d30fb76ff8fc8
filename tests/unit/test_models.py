"""Model folders: what diffusers writes is read, what is unfit is named, what is exported diffusers reads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from spin import models
from spin.errors import SpinError
from spin.store import digest_of, listing_of
from tests import tiny

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "copy")


def refusal(what: Callable[[], object]) -> str:
    with pytest.raises(SpinError) as caught:
        what()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def prediction(model: models.Model) -> torch.Tensor:
    latents = tiny.random_latents(2, seed=5)
    with torch.no_grad():
        return model.unet(latents, torch.tensor([10, 900]), model.embed(["cat", ""])).sample


# --- check and load


def test_a_folder_that_diffusers_wrote_is_loaded_whole(base: Path) -> None:
    models.check(base)
    model, stock = models.load(base, CPU), StableDiffusionPipeline.from_pretrained(base)
    for ours, theirs in ((model.unet, stock.unet), (model.vae, stock.vae), (model.text_encoder, stock.text_encoder)):
        wanted = theirs.state_dict()
        assert ours.state_dict().keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in ours.state_dict().items())
        assert not ours.training
        assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert model.scheduler_config["beta_schedule"] == "scaled_linear"


def test_half_precision_weights_are_loaded_in_float32(copy: Path) -> None:
    for path in (copy / "unet" / WEIGHTS, copy / "vae" / WEIGHTS, copy / "text_encoder" / "model.safetensors"):
        rewrite(path, lambda tensors: {name: value.half() for name, value in tensors.items()})
    model = models.load(copy, CPU)
    for part in (model.unet, model.vae, model.text_encoder):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}


def test_the_names_of_the_first_sd15_files_are_understood(copy: Path) -> None:
    # The published SD-1.5 keeps old names: query, key, value, proj_attn in the autoencoder; text_model. in front of
    # the text encoder's, and its position_ids. They are not missing weights.
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, sample_size=32,
    )  # fmt: skip
    vae.save_pretrained(copy / "vae")
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def renamed(name: str) -> str:
        for new, before in old.items():
            name = name.replace(new, before)
        return name

    before = models.load(copy, CPU)
    rewrite(copy / "vae" / WEIGHTS, lambda tensors: {renamed(name): value for name, value in tensors.items()})
    assert "decoder.mid_block.attentions.0.query.weight" in load_file(copy / "vae" / WEIGHTS)
    rewrite(
        copy / "text_encoder" / "model.safetensors",
        lambda tensors: {
            **{f"text_model.{name.removeprefix('text_model.')}": value for name, value in tensors.items()},
            "text_model.embeddings.position_ids": torch.arange(12)[None],
        },
    )
    after = models.load(copy, CPU)
    images = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    assert torch.equal(before.encode(images), after.encode(images))
    assert torch.equal(before.embed(["cat"]), after.embed(["cat"]))


def test_the_fast_tokenizer_is_the_same_tokenizer(copy: Path) -> None:
    edit(copy / "model_index.json", lambda index: index.update(tokenizer=["transformers", "CLIPTokenizerFast"]))
    models.check(copy)


def test_no_model_index(tmp_path: Path) -> None:
    assert refusal(lambda: models.check(tmp_path)) == (
        f"expected a diffusers pipeline folder with model_index.json, got {tmp_path}; check base_model"
    )


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b"\xff\xfe{}"])
@pytest.mark.parametrize("file", ["model_index.json", "scheduler/scheduler_config.json"])
def test_files_that_hold_no_json_object(copy: Path, file: str, content: bytes) -> None:
    (copy / file).write_bytes(content)
    assert refusal(lambda: models.load(copy, CPU)) == (
        f"expected a JSON object in {copy / file}, got something else; export the pipeline again"
    )


@pytest.mark.parametrize(
    ("part", "entry", "got"),
    [
        ("unet", ["diffusers", "SD3Transformer2DModel"], "SD3Transformer2DModel"),
        ("text_encoder", ["transformers", "T5EncoderModel"], "T5EncoderModel"),
        ("vae", None, "None"),
        ("tokenizer", "CLIPTokenizer", "None"),
        ("vae", [None, None], "None"),
    ],
)
def test_parts_of_another_class(copy: Path, part: str, entry: object, got: str) -> None:
    edit(copy / "model_index.json", lambda index: index.update({part: entry}))
    wanted = models.PARTS[part]
    assert refusal(lambda: models.check(copy)) == (
        f"expected {part} of class {wanted} in {copy}/model_index.json, got {got}; SD-1.x pipelines are supported"
    )


@pytest.mark.parametrize("part", models.PARTS)
def test_a_missing_part(copy: Path, part: str) -> None:
    shutil.rmtree(copy / part)
    assert (
        refusal(lambda: models.check(copy))
        == f"expected the folder {copy / part}, got none; the pipeline is incomplete"
    )


def test_a_missing_scheduler(copy: Path) -> None:
    (copy / "scheduler" / "scheduler_config.json").unlink()
    assert "scheduler/scheduler_config.json, got none" in refusal(lambda: models.check(copy))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("ending", models.PICKLES)
def test_pickles_are_refused_even_beside_safetensors(copy: Path, part: str, ending: str) -> None:
    (copy / part / f"weights{ending}").write_bytes(b"\x80\x04.")
    message = refusal(lambda: models.load(copy, CPU))
    assert message.startswith(f"expected safetensors weights, got the pickle {part}/weights{ending} ({copy}); ")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_missing_weight_files(copy: Path, part: str) -> None:
    for path in (copy / part).glob("*.safetensors"):
        path.unlink()
    message = refusal(lambda: models.check(copy))
    assert message == f"expected *.safetensors in {copy / part}, got none; export the pipeline as safetensors"


@pytest.mark.parametrize(
    ("file", "class_name"),
    [
        (f"unet/{WEIGHTS}", "UNet2DConditionModel"),
        (f"vae/{WEIGHTS}", "AutoencoderKL"),
        ("text_encoder/model.safetensors", "CLIPTextModel"),
    ],
)
def test_a_single_missing_weight_is_not_drawn_at_random(copy: Path, file: str, class_name: str) -> None:
    first = sorted(load_file(copy / file))[0]
    rewrite(copy / file, lambda tensors: {name: value for name, value in tensors.items() if name != first})
    message = refusal(lambda: models.load(copy, CPU))
    assert f"(1 weights of {class_name} are missing, e.g. {first})" in message


@pytest.mark.parametrize("file", [f"unet/{WEIGHTS}", f"vae/{WEIGHTS}", "text_encoder/model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "shape"])
def test_damaged_weights(copy: Path, file: str, damage: str) -> None:
    path = copy / file
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        first = sorted(load_file(path))[0]
        rewrite(path, lambda tensors: tensors | {first: torch.zeros(3, 5)})
    assert refusal(lambda: models.load(copy, CPU)).startswith(f"expected a loadable diffusers pipeline, got {copy} (")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("content", ["{", "[]", None])
def test_damaged_part_configs(copy: Path, part: str, content: str | None) -> None:
    config = copy / part / "config.json"
    config.unlink() if content is None else config.write_text(content)
    assert refusal(lambda: models.load(copy, CPU)).startswith(f"expected a loadable diffusers pipeline, got {copy} (")


def test_a_tokenizer_without_vocabulary(copy: Path) -> None:
    # transformers would make one for which every prompt is unknown
    (copy / "tokenizer" / "tokenizer.json").unlink()
    assert "(the tokenizer has no vocabulary)" in refusal(lambda: models.load(copy, CPU))


# --- find


def test_find_a_folder(base: Path, tmp_path: Path) -> None:
    assert models.find(str(base)) == base
    assert models.find("./nowhere") == Path("nowhere")
    assert models.find("~/nowhere") == Path.home() / "nowhere"
    assert models.find("emoji").parts[-3:] == ("spin", "emoji", "base")
    assert models.find(str(tmp_path / "nowhere")) == tmp_path / "nowhere"


def test_find_refuses_other_addresses() -> None:
    assert refusal(lambda: models.find("https://example.org/model")).startswith(
        "expected a model folder or hub name, got 'https://example.org/model'"
    )


def test_a_hub_download_leaves_pickles_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = {}

    def snapshot_download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert models.find("someone/some-model") == tmp_path
    assert asked["name"] == "someone/some-model"
    assert {f"*{ending}" for ending in models.PICKLES} <= set(asked["ignore_patterns"])
    assert asked["allow_patterns"] == [
        "model_index.json", "unet/*", "vae/*", "text_encoder/*", "tokenizer/*", "scheduler/*",
    ]  # fmt: skip


def test_a_hub_that_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, **_: object) -> str:
        raise LocalEntryNotFoundError(f"no {name}\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    message = refusal(lambda: models.find("someone/some-model"))
    assert "got 'someone/some-model' (LocalEntryNotFoundError)" in message


# --- export


def test_the_stock_pipeline_loads_an_export(base: Path, tmp_path: Path) -> None:
    model = models.load(base, CPU)
    with torch.no_grad():
        for parameter in model.unet.parameters():
            parameter.mul_(1.5)
    models.export(base, model.unet, tmp_path / "player")
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "player")
    wanted = model.unet.state_dict()
    assert stock.unet.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in stock.unet.state_dict().items())
    before = models.load(base, CPU).unet.state_dict()
    assert torch.equal(stock.unet.state_dict()["conv_in.weight"], 1.5 * before["conv_in.weight"])
    assert torch.equal(prediction(models.load(tmp_path / "player", CPU)), prediction(model))


def test_an_export_changes_nothing_but_the_denoisers_weights(base: Path, tmp_path: Path) -> None:
    unet = models.load(base, CPU).unet
    with torch.no_grad():
        unet.conv_in.bias.add_(1)
    models.export(base, unet, tmp_path / "player")
    before, after = listing_of(base), listing_of(tmp_path / "player")
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == [f"unet/{WEIGHTS}"]


def test_equal_weights_have_equal_digests(base: Path, tmp_path: Path) -> None:
    unet = models.load(base, CPU).unet
    models.export(base, unet, tmp_path / "one")
    # Written from an export, in another process state, with gradients on: the same bytes.
    again = models.load(tmp_path / "one", CPU).unet.requires_grad_(True).train()
    models.export(tmp_path / "one", again, tmp_path / "two")
    assert digest_of(listing_of(tmp_path / "one")) == digest_of(listing_of(tmp_path / "two"))
    with torch.no_grad():
        again.conv_in.bias[0] += 1e-3
    models.export(base, again, tmp_path / "three")
    assert digest_of(listing_of(tmp_path / "three")) != digest_of(listing_of(tmp_path / "one"))


def test_an_unchanged_export_is_its_opponent(base: Path, tmp_path: Path) -> None:
    models.export(base, models.load(base, CPU).unet, tmp_path / "player")
    assert digest_of(listing_of(tmp_path / "player")) == digest_of(listing_of(base))


def test_shards_and_variants_of_the_opponent_do_not_linger(copy: Path, tmp_path: Path) -> None:
    unet = models.load(copy, CPU).unet
    (copy / "unet" / WEIGHTS).rename(copy / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    unet.save_pretrained(copy / "unet", max_shard_size="300KB")
    assert len(list((copy / "unet").glob("*-of-*.safetensors"))) > 1
    models.export(copy, models.load(copy, CPU).unet, tmp_path / "player")
    assert sorted(path.name for path in (tmp_path / "player" / "unet").iterdir()) == ["config.json", WEIGHTS]
    assert torch.equal(
        models.load(tmp_path / "player", CPU).unet.state_dict()["conv_in.weight"], unet.state_dict()["conv_in.weight"]
    )


# --- Model


def test_latents_shape(base: Path) -> None:
    model = models.load(base, CPU)
    # autoencoder 2^2 = 4 pixels per latent; the denoiser halves once more: multiples of 8
    assert model.scale_factor == 4
    assert model.latents_shape(32) == (4, 8, 8)
    assert model.latents_shape(8) == (4, 2, 2)


@pytest.mark.parametrize(("resolution", "one", "two"), [(33, 32, 40), (36, 32, 40), (4, 8, 16), (63, 56, 64)])
def test_resolutions_that_do_not_fit(base: Path, resolution: int, one: int, two: int) -> None:
    model = models.load(base, CPU)
    assert refusal(lambda: model.latents_shape(resolution)) == (
        f"expected data.resolution to be a multiple of 8 for this model, got {resolution}; set it to {one} or {two}"
    )


def test_latents_are_the_scaled_mean_of_the_posterior(base: Path) -> None:
    model = models.load(base, CPU)
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    with torch.no_grad():
        # AutoencoderKL's default scaling_factor, SD-1.x's
        wanted = 0.18215 * model.vae.encode(images).latent_dist.mean
    torch.testing.assert_close(model.encode(images), wanted)
    assert model.encode(images).shape == (2, 4, 8, 8)
    assert torch.equal(model.encode(images), model.encode(images))


def test_decoded_images_are_rounded_to_8_bits(base: Path) -> None:
    model = models.load(base, CPU)
    latents = tiny.random_latents(2, seed=6)
    with torch.no_grad():
        wanted = ((model.vae.decode(latents / 0.18215).sample.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1)
    images = model.decode(latents)
    assert (images.dtype, images.shape) == (torch.uint8, (2, 32, 32, 3))
    assert float((images.float() - wanted).abs().max()) <= 0.5 + 1e-4


def test_prompts_are_padded_and_cut_to_one_length(base: Path) -> None:
    model = models.load(base, CPU)
    # 12 tokens with start and end: ten letters are heard
    short, long, longer = model.embed(["a", "a b c d e f g h i j k", "a b c d e f g h i j z"])
    assert short.shape == (12, 16)
    torch.testing.assert_close(long, longer, rtol=0, atol=1e-6)
    assert not torch.allclose(short, long)
