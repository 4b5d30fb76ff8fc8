"""Model folders: what diffusers writes is read, what is unfit is named, what is exported diffusers reads."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from spin import models
from spin.errors import SpinError
from spin.store import digest_of, listing_of
from tests import tiny

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


EVERY_FAMILY = pytest.mark.parametrize("family", tiny.FAMILIES)
# Every part once that any family has.
WEIGHTED = {
    "sd1": ("unet", "vae", "text_encoder"), "sdxl": ("unet", "text_encoder_2"),
    "sd3-t5": ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
}  # fmt: skip
TOKENIZERS = {"sd1": ("tokenizer",), "sdxl": ("tokenizer_2",), "sd3-t5": ("tokenizer_3",)}
EVERY_WEIGHTED_PART = pytest.mark.parametrize(
    ("family", "part"), [(family, part) for family, parts in WEIGHTED.items() for part in parts]
)
EVERY_TOKENIZER = pytest.mark.parametrize(
    ("family", "part"), [(family, part) for family, parts in TOKENIZERS.items() for part in parts]
)


@pytest.fixture
def family() -> str:
    return "sd1"


@pytest.fixture
def base(made: Callable[[str], Path], family: str) -> Path:
    return made(family)


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "copy")


def stock(folder: Path) -> Any:
    """Return what diffusers loads from a folder; it wants to be told of an absent third text encoder."""
    absent = json.loads((folder / "model_index.json").read_text()).get("text_encoder_3") == [None, None]
    third: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None} if absent else {}
    return DiffusionPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True, **third)


def weights_file(folder: Path, part: str) -> Path:
    return folder / part / ("model.safetensors" if part.startswith("text_encoder") else WEIGHTS)


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


def prediction(model: models.Model, family: str = "sd1") -> torch.Tensor:
    latents = tiny.random_latents(2, 5, family)
    with torch.no_grad():
        return model.predict(model.denoiser, latents, torch.tensor([10, 900]), model.embed(["cat", ""]))


# --- check and load


@EVERY_FAMILY
def test_a_folder_that_diffusers_wrote_is_loaded_whole(base: Path) -> None:
    models.check(base)
    model, theirs = models.load(base, CPU), stock(base)
    modules = {name for name, part in theirs.components.items() if isinstance(part, torch.nn.Module)}
    assert {name for name, part in model.pipeline.components.items() if isinstance(part, torch.nn.Module)} == modules
    for name in modules:
        ours, wanted = getattr(model.pipeline, name), getattr(theirs, name).state_dict()
        assert ours.state_dict().keys() == wanted.keys()
        assert all(torch.equal(value, wanted[key]) for key, value in ours.state_dict().items())
        assert not ours.training
        assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert model.denoiser is getattr(model.pipeline, model.family.denoiser)
    assert model.vae is model.pipeline.vae
    assert model.scheduler_config["_class_name"] == type(theirs.scheduler).__name__


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3-t5"])
def test_half_precision_weights_are_loaded_in_float32(copy: Path) -> None:
    for path in copy.rglob("*.safetensors"):
        rewrite(path, lambda tensors: {name: value.half() for name, value in tensors.items()})
    model = models.load(copy, CPU)
    for part in model.pipeline.components.values():
        if isinstance(part, torch.nn.Module):
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
    assert torch.equal(before.embed(["cat"]).text, after.embed(["cat"]).text)


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
    ("part", "options", "message"),
    [
        ("unet", {"layers_per_block": 10**7}, "layers_per_block of at most 20 in {}/unet, got 10000000"),
        (
            "unet",
            {"transformer_layers_per_block": [[21], 1]},
            "transformer_layers_per_block of at most 20 in .+, got 21",
        ),
        ("vae", {"down_block_types": ["x"] * 21}, "down_block_types of at most 20 in {}/vae, got 21"),
        ("text_encoder", {"num_hidden_layers": 201}, "num_hidden_layers of at most 200 in .+, got 201"),
    ],
)
def test_more_layers_than_anyone_has(copy: Path, part: str, options: dict[str, Any], message: str) -> None:
    edit(copy / part / "config.json", lambda config: config.update(options))
    line = refusal(lambda: models.check(copy))
    assert re.fullmatch(f"expected {message.format(copy)}; mend the config", line), line


def test_a_division_by_zero_in_a_config(copy: Path) -> None:
    edit(copy / "unet" / "config.json", lambda config: config.update(norm_num_groups=0))
    assert refusal(lambda: models.load(copy, CPU)) == (
        f"expected a loadable diffusers pipeline, got {copy} (integer modulo by zero); export it again"
    )


def test_a_header_of_weights_that_is_too_long(copy: Path) -> None:
    (copy / "unet" / WEIGHTS).write_bytes((2**22 + 1).to_bytes(8, "little"))
    assert refusal(lambda: models.check(copy)) == (
        f"expected a header of at most 4194304 bytes in {copy}/unet/{WEIGHTS}, got one of 4194305; fetch it again"
    )


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusionInpaintPipeline", None])
def test_pipelines_of_another_family(copy: Path, name: str | None) -> None:
    edit(copy / "model_index.json", lambda index: index.update(_class_name=name))
    assert refusal(lambda: models.check(copy)) == (
        "expected a pipeline of class StableDiffusionPipeline or StableDiffusionXLPipeline or StableDiffusion3Pipeline "
        f"in {copy}/model_index.json, got {name}; choose another base_model"
    )


@pytest.mark.parametrize(
    ("family", "part", "entry", "got", "wanted"),
    [
        ("sd1", "unet", ["diffusers", "SD3Transformer2DModel"], "SD3Transformer2DModel", "UNet2DConditionModel"),
        ("sd1", "text_encoder", ["transformers", "T5EncoderModel"], "T5EncoderModel", "CLIPTextModel"),
        ("sd1", "vae", None, "None", "AutoencoderKL"),
        ("sd1", "tokenizer", "CLIPTokenizer", "None", "CLIPTokenizer"),
        ("sd1", "vae", [None, None], "None", "AutoencoderKL"),
        ("sdxl", "text_encoder_2", ["transformers", "CLIPTextModel"], "CLIPTextModel", "CLIPTextModelWithProjection"),
        ("sdxl", "text_encoder", [None, None], "None", "CLIPTextModel"),
        ("sd3", "transformer", ["diffusers", "UNet2DConditionModel"], "UNet2DConditionModel", "SD3Transformer2DModel"),
        ("sd3", "text_encoder_3", ["transformers", "CLIPTextModel"], "CLIPTextModel", "T5EncoderModel"),
        ("sd3-t5", "tokenizer_3", [None, None], "None", "T5Tokenizer"),
    ],
)
def test_parts_of_another_class(copy: Path, part: str, entry: object, got: str, wanted: str) -> None:
    edit(copy / "model_index.json", lambda index: index.update({part: entry}))
    pipeline = json.loads((copy / "model_index.json").read_text())["_class_name"]
    assert refusal(lambda: models.check(copy)) == (
        f"expected {part} of class {wanted} in {copy}/model_index.json, got {got}; a {pipeline} needs it"
    )


@pytest.mark.parametrize(
    ("family", "part"),
    [(family, part) for parts in (WEIGHTED, TOKENIZERS) for family in parts for part in parts[family]],
)
def test_a_missing_part(copy: Path, part: str) -> None:
    shutil.rmtree(copy / part)
    assert (
        refusal(lambda: models.check(copy))
        == f"expected the folder {copy / part}, got none; the pipeline is incomplete"
    )


def test_a_missing_scheduler(copy: Path) -> None:
    (copy / "scheduler" / "scheduler_config.json").unlink()
    assert "scheduler/scheduler_config.json, got none" in refusal(lambda: models.check(copy))


@EVERY_WEIGHTED_PART
def test_pickles_are_refused_even_beside_safetensors(copy: Path, part: str) -> None:
    (copy / part / "weights.bin").write_bytes(b"\x80\x04.")
    message = refusal(lambda: models.load(copy, CPU))
    assert message.startswith(f"expected safetensors weights, got the pickle {part}/weights.bin ({copy}); ")


@pytest.mark.parametrize("ending", models.PICKLES)
def test_pickles_of_every_kind_are_refused(copy: Path, ending: str) -> None:
    (copy / "unet" / f"weights{ending}").write_bytes(b"\x80\x04.")
    assert refusal(lambda: models.check(copy)).startswith("expected safetensors weights, got the pickle unet/weights")


@EVERY_WEIGHTED_PART
def test_missing_weight_files(copy: Path, part: str) -> None:
    for path in (copy / part).glob("*.safetensors"):
        path.unlink()
    message = refusal(lambda: models.check(copy))
    assert message == f"expected *.safetensors in {copy / part}, got none; export the pipeline as safetensors"


@EVERY_WEIGHTED_PART
def test_a_single_missing_weight_is_not_drawn_at_random(copy: Path, part: str) -> None:
    path = weights_file(copy, part)
    first = sorted(load_file(path))[0]
    rewrite(path, lambda tensors: {name: value for name, value in tensors.items() if name != first})
    class_name = json.loads((copy / "model_index.json").read_text())[part][1]
    assert f"(1 weights of {class_name} are missing, e.g. {first})" in refusal(lambda: models.load(copy, CPU))


@EVERY_WEIGHTED_PART
@pytest.mark.parametrize("damage", ["cut", "shape"])
def test_damaged_weights(copy: Path, part: str, damage: str) -> None:
    path = weights_file(copy, part)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        first = sorted(load_file(path))[0]
        rewrite(path, lambda tensors: tensors | {first: torch.zeros(3, 5)})
    assert refusal(lambda: models.load(copy, CPU)).startswith(f"expected a loadable diffusers pipeline, got {copy} (")


@EVERY_WEIGHTED_PART
@pytest.mark.parametrize("content", ["{", "[]", None])
def test_damaged_part_configs(copy: Path, part: str, content: str | None) -> None:
    config = copy / part / "config.json"
    config.unlink() if content is None else config.write_text(content)
    assert refusal(lambda: models.load(copy, CPU)).startswith(f"expected a loadable diffusers pipeline, got {copy} (")


@EVERY_TOKENIZER
def test_a_tokenizer_without_vocabulary(copy: Path, part: str) -> None:
    # transformers would make one for which every prompt is unknown
    (copy / part / "tokenizer.json").unlink()
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


@pytest.mark.parametrize(
    ("family", "folders"),
    [
        ("sd1", ["unet/*", "vae/*", "text_encoder/*", "tokenizer/*"]),
        (
            "sd3",
            ["transformer/*", "vae/*", "text_encoder/*", "tokenizer/*", "text_encoder_2/*", "tokenizer_2/*"],
        ),
    ],
)
def test_a_hub_download_is_the_familys_folders_without_pickles(
    base: Path, folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: object) -> str:
        asked.append({"name": name, **options})
        return str(base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert models.find("someone/some-model") == base
    index, whole = asked
    assert index == {"name": "someone/some-model", "allow_patterns": ["model_index.json"]}
    assert whole["name"] == "someone/some-model"
    assert {f"*{ending}" for ending in models.PICKLES} <= set(whole["ignore_patterns"])
    assert whole["allow_patterns"] == ["model_index.json", *folders, "scheduler/*"]


def test_a_hub_model_that_cannot_be_played_is_not_downloaded(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(copy / "model_index.json", lambda index: index.update(_class_name="FluxPipeline"))
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda _, allow_patterns: asked.append(allow_patterns) or str(copy)
    )
    assert "got FluxPipeline; choose another base_model" in refusal(lambda: models.find("someone/some-flux"))
    assert asked == [["model_index.json"]]


def test_a_hub_that_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, **_: object) -> str:
        raise LocalEntryNotFoundError(f"no {name}\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    message = refusal(lambda: models.find("someone/some-model"))
    assert "got 'someone/some-model' (LocalEntryNotFoundError)" in message


# --- export


@EVERY_FAMILY
def test_the_stock_pipeline_loads_an_export(base: Path, tmp_path: Path, family: str) -> None:
    model = models.load(base, CPU)
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.mul_(1.5)
    models.export(base, model.denoiser, tmp_path / "player")
    theirs = getattr(stock(tmp_path / "player"), model.family.denoiser).state_dict()
    wanted = model.denoiser.state_dict()
    assert theirs.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in theirs.items())
    before = models.load(base, CPU).denoiser.named_parameters()
    assert all(torch.equal(theirs[name], 1.5 * value) for name, value in before)
    assert torch.equal(prediction(models.load(tmp_path / "player", CPU), family), prediction(model, family))


@EVERY_FAMILY
def test_an_export_changes_nothing_but_the_denoisers_weights(base: Path, tmp_path: Path, family: str) -> None:
    denoiser = models.load(base, CPU).denoiser
    with torch.no_grad():
        next(denoiser.parameters()).add_(1)
    models.export(base, denoiser, tmp_path / "player")
    before, after = listing_of(base), listing_of(tmp_path / "player")
    assert before.keys() == after.keys()
    folder = "transformer" if family.startswith("sd3") else "unet"
    assert [name for name in before if before[name] != after[name]] == [f"{folder}/{WEIGHTS}"]


def test_equal_weights_have_equal_digests(base: Path, tmp_path: Path) -> None:
    unet = models.load(base, CPU).denoiser
    models.export(base, unet, tmp_path / "one")
    # Written from an export, in another process state, with gradients on: the same bytes.
    again = models.load(tmp_path / "one", CPU).denoiser.requires_grad_(True).train()
    models.export(tmp_path / "one", again, tmp_path / "two")
    assert digest_of(listing_of(tmp_path / "one")) == digest_of(listing_of(tmp_path / "two"))
    with torch.no_grad():
        again.conv_in.bias[0] += 1e-3
    models.export(base, again, tmp_path / "three")
    assert digest_of(listing_of(tmp_path / "three")) != digest_of(listing_of(tmp_path / "one"))


def test_an_unchanged_export_is_its_opponent(base: Path, tmp_path: Path) -> None:
    models.export(base, models.load(base, CPU).denoiser, tmp_path / "player")
    assert digest_of(listing_of(tmp_path / "player")) == digest_of(listing_of(base))


def test_shards_and_variants_of_the_opponent_do_not_linger(copy: Path, tmp_path: Path) -> None:
    unet = models.load(copy, CPU).denoiser
    (copy / "unet" / WEIGHTS).rename(copy / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    unet.save_pretrained(copy / "unet", max_shard_size="300KB")
    assert len(list((copy / "unet").glob("*-of-*.safetensors"))) > 1
    models.export(copy, models.load(copy, CPU).denoiser, tmp_path / "player")
    assert sorted(path.name for path in (tmp_path / "player" / "unet").iterdir()) == ["config.json", WEIGHTS]
    assert torch.equal(
        models.load(tmp_path / "player", CPU).denoiser.state_dict()["conv_in.weight"],
        unet.state_dict()["conv_in.weight"],
    )


# --- Model


def test_latents_shape(base: Path) -> None:
    model = models.load(base, CPU)
    # autoencoder 2^2 = 4 pixels per latent; the denoiser halves once more: multiples of 8
    assert model.scale_factor == 4
    assert model.latents_shape(32) == (4, 8, 8)
    assert model.latents_shape(8) == (4, 2, 2)


@pytest.mark.parametrize("family", ["sd3"])
def test_latents_shape_of_a_transformer(base: Path) -> None:
    model = models.load(base, CPU)
    # 4 pixels per latent, patches of 2; 12 positions along a side
    assert model.latents_shape(32) == (16, 8, 8)
    assert model.latents_shape(96) == (16, 24, 24)
    assert refusal(lambda: model.latents_shape(36)) == (
        "expected data.resolution to be a multiple of 8 for this model, got 36; set it to 32 or 40"
    )
    assert refusal(lambda: model.latents_shape(104)) == (
        "expected data.resolution of at most 96 for this model, got 104; lower it"
    )


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


@pytest.mark.parametrize("family", ["sd3"])
def test_latents_may_be_shifted(base: Path) -> None:
    model = models.load(base, CPU)
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    with torch.no_grad():
        # SD3's factors
        wanted = 1.5305 * (model.vae.encode(images).latent_dist.mean - 0.0609)
        torch.testing.assert_close(model.encode(images), wanted)
        pixels = model.vae.decode(wanted / 1.5305 + 0.0609).sample.clamp(-1, 1)
    shown = ((pixels + 1) * 127.5).permute(0, 2, 3, 1)
    assert float((model.decode(wanted).float() - shown).abs().max()) <= 0.5 + 1e-4


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
    short, long, longer = model.embed(["a", "a b c d e f g h i j k", "a b c d e f g h i j z"]).text
    assert short.shape == (12, 16)
    torch.testing.assert_close(long, longer, rtol=0, atol=1e-6)
    assert not torch.allclose(short, long)


@EVERY_FAMILY
def test_prompts_are_heard_as_the_stock_pipeline_encodes_them(base: Path, family: str) -> None:
    found, pipeline = models.load(base, CPU).embed(["cat", "", "a hat"]), stock(base)
    more: dict[str, Any] = {"prompt_2": None, "prompt_3": None} if family.startswith("sd3") else {}
    with torch.no_grad():
        encoded = pipeline.encode_prompt(
            prompt=["cat", "a hat"], device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=True, **more
        )
    text, empty, *pooled = encoded
    torch.testing.assert_close(found.text, torch.stack([text[0], empty[0], text[1]]))
    if pooled:
        torch.testing.assert_close(found.pooled, torch.stack([pooled[0][0], pooled[1][0], pooled[0][1]]))
    else:
        assert found.pooled is None


@pytest.mark.parametrize("family", ["sdxl"])
@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_prompt_of_sdxl_is_zeros_where_the_folder_says_so(copy: Path, zeros: bool) -> None:
    edit(copy / "model_index.json", lambda index: index.update(force_zeros_for_empty_prompt=zeros))
    empty, cat = (models.load(copy, CPU).embed([prompt]) for prompt in ("", "cat"))
    assert empty.pooled is not None
    assert empty.text.any() == empty.pooled.any() == (not zeros)
    assert cat.text.any()
    assert (cat.text.shape, empty.pooled.shape) == ((1, 12, 32), (1, 16))


@pytest.mark.parametrize("family", ["sdxl"])
def test_sdxl_is_told_the_size_of_the_image(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = models.load(base, CPU), {}
    forward = model.denoiser.forward
    monkeypatch.setattr(model.denoiser, "forward", lambda *a, **given: seen.update(given) or forward(*a, **given))
    prediction(model)
    # original height and width, crop from the top left, target height and width
    assert seen["added_cond_kwargs"]["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2


@pytest.mark.parametrize("family", ["sd3", "sd3-t5"])
def test_sd3_without_its_third_text_encoder_hears_zeros_there(base: Path, family: str) -> None:
    text = models.load(base, CPU).embed(["cat"]).text
    # 12 places of CLIP, 256 of T5
    assert text.shape == (1, 268, 32)
    assert text[:, :12].any()
    assert text[:, 12:].any() == (family == "sd3-t5")


@pytest.mark.parametrize(
    ("mode", "device", "items", "cc", "found", "expected"),
    [
        ("auto", "cuda", 2048, "", ["gcc"], True),
        ("auto", "cuda", 2048, "", ["clang"], True),
        ("auto", "cuda", 2048, "/opt/cc", [], True),
        ("auto", "cuda", 2048, "", [], False),
        ("auto", "cuda", 2047, "", ["gcc"], False),
        ("auto", "cpu", 2048, "", ["gcc"], False),
        ("on", "cpu", 1, "", ["g++"], True),
        ("off", "cuda", 2048, "", [], False),
    ],
)
def test_compiling_takes_a_compiler(
    mode: str,
    device: str,
    items: int,
    cc: str,
    found: list[str],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CC", cc)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in found else None)
    # Another test in this process may have given the logger a handler.
    monkeypatch.setattr(models.logger, "handlers", [caplog.handler])
    monkeypatch.setattr(models.logger, "propagate", False)

    with caplog.at_level("INFO", "spin"):
        assert models.compiles(mode, torch.device(device), items) is expected
    # It is said where a compiler is all that is missing.
    missed = (mode, device, items, cc, found) == ("auto", "cuda", 2048, "", [])
    assert [record.message for record in caplog.records] == (
        ["compile: auto goes without, there is no compiler (gcc, clang, cc or CC)"] if missed else []
    )


def test_compile_on_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    # A processor's networks are C++.
    monkeypatch.setenv("CC", "gcc")
    monkeypatch.setattr(shutil, "which", {}.get)

    with pytest.raises(
        SpinError, match=r"^expected a compiler for compile: on, got none of g\+\+, clang\+\+, c\+\+ and no CXX; "
    ):
        models.compiles("on", torch.device("cpu"), 1)
