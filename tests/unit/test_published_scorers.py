"""The published scorers, small, against plain forward passes and the numbers of the authors' own packages.

The weights are by formula (``tests/reference.py``) under the authors' names, so their way to ours is tested too.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BlipVisionModel,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers.models.blip.modeling_blip_text import BlipTextModel

from spin.errors import SpinError
from spin.scorers import aesthetic, hpsv2, image_reward
from spin.scorers.aesthetic import Aesthetic
from spin.scorers.clip import Towers, processed
from spin.scorers.convert import from_image_reward, from_open_clip
from spin.scorers.head import filled, head, value
from spin.scorers.hpsv2 import Hps, cleaned
from spin.scorers.image_reward import ImageReward
from spin.scorers.pickscore import PickScore
from spin.scorers.pixels import centre_squares, wholes_in_squares
from spin.weights import network
from tests import reference, tiny
from tests.reference import GOLDEN

CPU = torch.device("cpu")
PICTURES = [reference.picture(*size, number) for number, size in enumerate(reference.PICTURES)]
PROMPTS = ["a", "b", "c"]
TOLERANCE = 2e-5


class Given:
    """Stands for a tokenizer: the prompts a, b, c have these tokens."""

    def __init__(self, tokens: list[list[int]]):
        self.tokens = dict(zip(PROMPTS, tokens, strict=True))

    def __call__(self, texts: list[str], **_: object) -> Any:
        ids = torch.tensor([self.tokens[text] for text in texts])
        words = SimpleNamespace(input_ids=ids, attention_mask=(ids != 0).long())
        words.to = lambda _: words
        return words


@pytest.fixture(scope="module")
def open_clip() -> reference.Tensors:
    return reference.waves(GOLDEN["open_clip"]["shapes"])


@pytest.fixture(scope="module")
def hps(open_clip: reference.Tensors) -> Hps:
    text, vision = reference.OPEN_CLIP["text"], reference.OPEN_CLIP["vision"]
    config = hpsv2.config_of(
        text_width=text["width"], text_layers=text["layers"], text_heads=text["heads"], width=vision["width"],
        layers=vision["layers"], heads=vision["width"] // vision["head_width"], patch=vision["patch_size"],
        embed=reference.OPEN_CLIP["embed_dim"], side=vision["image_size"], vocabulary=text["vocab_size"],
        context=text["context_length"],
    )  # fmt: skip
    model = network(CLIPModel, config, from_open_clip(open_clip), "a small ViT")
    towers = Towers(model, Given(reference.TOKENS), lambda images: wholes_in_squares(images, vision["image_size"]), CPU)
    return Hps("hpsv2_0", towers)


def test_hps_is_open_clips_cosine(hps: Hps, open_clip: reference.Tensors) -> None:
    found = hps.score(PICTURES, PROMPTS)
    assert (found.dtype, found.shape) == (torch.float32, (3,))
    torch.testing.assert_close(found, torch.tensor(GOLDEN["open_clip"]["cosines"]), rtol=0, atol=TOLERANCE)
    pixels = wholes_in_squares(PICTURES, 28)
    plain = [reference.open_clip_cosine(open_clip, p, t) for p, t in zip(pixels, reference.TOKENS, strict=True)]
    torch.testing.assert_close(found, torch.tensor(plain), rtol=0, atol=TOLERANCE)


def test_hps_reads_prompts_as_open_clip_does(hps: Hps) -> None:
    """Its tokenizer mends texts first; transformers' does not."""
    wanted = {
        "dog&amp;amp;cat": "dog&cat",
        "\u201cquoted\u201d it\u2019s": '"quoted" it\'s',
        "caf\u00c3\u00a9": "caf\u00e9",
        "A plain one, 8k": "A plain one, 8k",
    }
    assert {prompt: cleaned(prompt) for prompt in wanted} == wanted
    heard: list[str] = []

    def listen(texts: list[str], **options: Any) -> Any:
        heard.extend(texts)
        return Given(reference.TOKENS)(["a"] * len(texts), **options)

    Hps("x", Towers(hps.clip.model, listen, hps.clip.pixels, CPU)).score(PICTURES[:1], ["dog&amp;cat"])
    assert heard == ["dog&cat"]


def test_hps_has_no_scale(hps: Hps) -> None:
    before = hps.score(PICTURES, PROMPTS)
    hps.clip.model.logit_scale += 1
    assert torch.equal(hps.score(PICTURES, PROMPTS), before)
    hps.clip.model.logit_scale -= 1


def test_the_real_size_is_open_clips() -> None:
    with torch.device("meta"):
        model = CLIPModel(hpsv2.vit_h_14_config())
    # 986.11 M is what open_clip 3.3's ViT-H-14 has.
    assert sum(weight.numel() for weight in model.parameters()) == 986_109_441
    assert model.config.vision_config.hidden_size // model.config.vision_config.num_attention_heads == 80


def test_another_network_is_refused_in_one_line(open_clip: reference.Tensors) -> None:
    with pytest.raises(
        SpinError, match=r"^expected weights of a ViT-H, got others: .+ is \[.+\], not \[.+\]"
    ) as caught:
        network(CLIPModel, hpsv2.vit_h_14_config(), from_open_clip(open_clip), "a ViT-H")
    assert "\n" not in str(caught.value)


def small_clip(folder: Path) -> Towers:
    tiny.judge(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    model, words = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    return Towers(model, words, processed(processor), CPU)


def test_pickscore_is_the_logit_of_transformers(tmp_path: Path) -> None:
    towers = small_clip(tmp_path)
    prompts = ["a red hat", "dog", "0123456789 abcdefg"]
    found = PickScore(towers).score(PICTURES, prompts)
    model = CLIPModel.from_pretrained(tmp_path).eval()
    words = CLIPTokenizer.from_pretrained(tmp_path)(
        prompts, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    )
    pixels = CLIPImageProcessorPil.from_pretrained(tmp_path)(PICTURES, return_tensors="pt").pixel_values
    with torch.no_grad():
        wanted = model(input_ids=words.input_ids, pixel_values=pixels).logits_per_image.diagonal()
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
    # The scale is the network's own, not 100.
    assert towers.scale == pytest.approx(float(model.logit_scale.detach().exp()), rel=1e-6)
    assert towers.scale != pytest.approx(100, rel=0.1)


def test_half_precision_is_near_and_still_returns_float32(tmp_path: Path) -> None:
    whole = PickScore(small_clip(tmp_path)).score(PICTURES, ["a", "b", "c"])
    towers = small_clip(tmp_path)
    half = PickScore(Towers(towers.model, towers.tokenizer, towers.pixels, CPU, torch.bfloat16))
    found = half.score(PICTURES, ["a", "b", "c"])
    assert found.dtype == torch.float32
    assert not torch.equal(found, whole)
    torch.testing.assert_close(found, whole, rtol=0, atol=0.5)


def mlp_weights(width: int) -> reference.Tensors:
    return reference.waves({name: tuple(tensor.shape) for name, tensor in head(width).state_dict().items()})


def test_the_head_is_one_affine_map() -> None:
    """Five linear layers with nothing in between: published weights collapse to 768 numbers and one."""
    state = mlp_weights(768)
    slope, offset = torch.eye(768, dtype=torch.float64), torch.zeros(768, dtype=torch.float64)
    for layer in ("0", "2", "4", "6", "7"):
        weight, bias = state[f"{layer}.weight"].double(), state[f"{layer}.bias"].double()
        slope, offset = weight @ slope, weight @ offset + bias
    features = torch.from_numpy(np.sin(np.arange(3 * 768)).reshape(3, 768)).float()
    wanted = (features.double() @ slope.T + offset).squeeze(-1).float()
    torch.testing.assert_close(value(filled(head(768), state, "x"), features), wanted, rtol=0, atol=TOLERANCE)


def test_aesthetic_is_the_head_of_the_unit_embedding() -> None:
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=12, hidden_act="quick_gelu",
    )  # fmt: skip
    shapes = {k: tuple(v.shape) for k, v in CLIPVisionModelWithProjection(config).state_dict().items()}
    vision = network(CLIPVisionModelWithProjection, config, reference.waves(shapes), "a small CLIP")
    mlp = filled(head(12), mlp_weights(12), "x")
    found = Aesthetic(vision, mlp, CPU).score(PICTURES, PROMPTS)
    with torch.no_grad():
        embedded = vision(pixel_values=centre_squares(PICTURES, 28)).image_embeds
        unit = embedded / embedded.pow(2).sum(-1, keepdim=True).sqrt()
        assert not torch.allclose(value(mlp, unit), value(mlp, embedded))
        torch.testing.assert_close(found, value(mlp, unit), rtol=0, atol=TOLERANCE)
    assert torch.equal(found, Aesthetic(vision, mlp, CPU).score(PICTURES, ["other"] * 3))
    assert found.dtype == torch.float32


def test_a_head_of_another_width_is_refused() -> None:
    with pytest.raises(SpinError, match="expected the head of x: five linear layers, the first from 768"):
        filled(head(768), mlp_weights(12), "x")


def test_the_aesthetic_network_is_openais_vit_l_14() -> None:
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(aesthetic.vit_l_14_config())
    assert sum(weight.numel() for weight in model.parameters()) == 303_966_208


@pytest.fixture(scope="module")
def reward() -> ImageReward:
    sizes, state = reference.BLIP, from_image_reward(reference.waves(GOLDEN["image_reward"]["shapes"]))
    parts = {
        part: {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}
        for part in ("vision", "text", "head")
    }
    assert sum(map(len, parts.values())) == len(state)
    vision = image_reward.vision_config(
        hidden_size=sizes["vision"], intermediate_size=4 * sizes["vision"], num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["vision_heads"], patch_size=sizes["patch"], image_size=sizes["side"],
    )  # fmt: skip
    text = image_reward.text_config(
        vocab_size=sizes["words"], hidden_size=sizes["text"], intermediate_size=4 * sizes["text"],
        num_hidden_layers=sizes["layers"], num_attention_heads=sizes["text_heads"], max_position_embeddings=40,
        encoder_hidden_size=sizes["vision"],
    )  # fmt: skip
    return ImageReward(
        network(BlipVisionModel, vision, parts["vision"], "x"),
        network(BlipTextModel, text, parts["text"], "x", add_pooling_layer=False),
        filled(head(sizes["text"]), parts["head"], "x"),
        Given(reference.WORDS),
        CPU,
    )


def test_image_reward_is_that_of_the_authors(reward: ImageReward) -> None:
    found = reward.score(PICTURES, PROMPTS)
    assert (found.dtype, found.shape) == (torch.float32, (3,))
    torch.testing.assert_close(found, torch.tensor(GOLDEN["image_reward"]["rewards"]), rtol=0, atol=TOLERANCE)
    state = reference.waves(GOLDEN["image_reward"]["shapes"])
    pixels = centre_squares(PICTURES, reference.BLIP["side"])
    plain = [reference.image_reward(state, p, words) for p, words in zip(pixels, reference.WORDS, strict=True)]
    torch.testing.assert_close(found, torch.tensor(plain), rtol=0, atol=TOLERANCE)


def test_image_reward_looks_at_both(reward: ImageReward) -> None:
    found = reward.score(PICTURES, PROMPTS)
    assert (reward.score(PICTURES, ["b", "c", "a"]) - found).abs().min() > 100 * TOLERANCE
    assert (reward.score(PICTURES[::-1], PROMPTS)[[0, 2]] - found[[0, 2]]).abs().min() > 100 * TOLERANCE


@pytest.mark.parametrize("batch", [1, 2])
def test_published_scores_do_not_depend_on_the_batch(
    hps: Hps, reward: ImageReward, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    whole = [scorer.score(PICTURES, PROMPTS) for scorer in (hps, reward)]
    for module in ("spin.scorers.clip", "spin.scorers.image_reward"):
        monkeypatch.setattr(f"{module}.BATCH", batch)
    for scorer, wanted in zip((hps, reward), whole, strict=True):
        torch.testing.assert_close(scorer.score(PICTURES, PROMPTS), wanted, rtol=0, atol=TOLERANCE)


def test_image_reward_hears_35_tokens(reward: ImageReward, tmp_path: Path) -> None:
    """33 words between the first and the last token; the 34th is not heard, the 33rd is."""
    heard: list[torch.Tensor] = []
    tokenizer = tiny.bert_tokenizer(tmp_path)

    def listen(texts: list[str], **options: Any) -> Any:
        words = tokenizer(texts, **options)
        heard.append(words.input_ids)
        return words

    class Text(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: object) -> Any:
            return SimpleNamespace(last_hidden_state=torch.zeros(*input_ids.shape, reference.BLIP["text"]))

    deaf = ImageReward(reward.vision, Text(), reward.mlp, listen, CPU)
    deaf.score(PICTURES[:2], [" ".join(f"W{i}" for i in range(60)), "w1"])
    assert heard[0].shape == (2, 35)
    assert heard[0][0].tolist() == [2, *range(5, 38), 3]
    assert heard[0][1].tolist() == [2, 6, 3, *[0] * 32]


def test_image_reward_has_blips_sizes() -> None:
    with torch.device("meta"):
        vision = BlipVisionModel(image_reward.vision_config())
        text = BlipTextModel(image_reward.text_config(), add_pooling_layer=False)
    assert (vision.config.layer_norm_eps, text.config.layer_norm_eps) == (1e-6, 1e-12)
    # BLIP-large's ViT at 224 px and patch 16; BERT-base with two more words and cross-attention to 1024 numbers.
    count = [sum(weight.numel() for weight in part.parameters()) for part in (vision, text)]
    assert count == [
        303_301_632,
        30524 * 768 + 512 * 768 + 2 * 768 + 12 * (7_087_872 + 2 * 590_592 + 2 * 787_200 + 1536),
    ]
