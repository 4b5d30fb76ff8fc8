"""Sampling against diffusers' own pipeline, and an image's independence of everything but its prompt and noise."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from spin import models
from spin.budget import passes_per_image
from spin.config import GenerateConfig
from spin.diffusion import process_of
from spin.errors import SpinError
from spin.families import Conditioning
from spin.models import Model
from spin.sampling import (
    SOLVERS,
    autocast,
    batches,
    decode,
    fast_precision,
    roundtrip,
    sample_latents,
    shard_batches,
    solver,
)
from spin.seeding import noise_of
from tests import tiny

CPU = torch.device("cpu")
PROMPTS = ["red cat", "a hat", "0", "dog, blue"]
TOLERANCE = 5e-4
"""Absolute, in float32, of latents of up to 50 (an untrained denoiser leaves the first noise at its full scale).
Both sides do the same sums, in another grouping and memory layout; a wrong step, guidance or schedule shows a
hundredfold (see the tests that expect a difference)."""


@pytest.fixture(scope="module")
def base(made: Callable[[str], Path]) -> Path:
    return made("sd1")


@pytest.fixture(scope="module")
def model(base: Path) -> Model:
    return models.load(base, CPU)


def noise(*names: object, family: str = "sd1") -> torch.Tensor:
    return torch.stack([noise_of(tiny.latents_shape(family), str(name)) for name in names])


def config(**options: object) -> GenerateConfig:
    return GenerateConfig.model_validate(
        {"num_inference_steps": 3, "guidance_scale": 3.5, "batch_size": 4, "seed": 0, **options}
    )


def stock(folder: Path, prompts: list[str], start: torch.Tensor, steps: int, guidance: float) -> torch.Tensor:
    """Return the latents of the stock pipeline, a diffusion's with DPM-Solver++ in place of the folder's scheduler."""
    absent = json.loads((folder / "model_index.json").read_text()).get("text_encoder_3") == [None, None]
    third: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None} if absent else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **third)
    if not hasattr(pipeline, "transformer"):
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompts, latents=start, num_inference_steps=steps, guidance_scale=guidance, height=tiny.RESOLUTION,
        width=tiny.RESOLUTION, output_type="latent",
    ).images  # fmt: skip


def equals_stock(folder: Path, family: str, steps: int, guidance: float) -> None:
    start = noise(*PROMPTS, family=family)
    ours = sample_latents(
        models.load(folder, CPU), PROMPTS, start, config(num_inference_steps=steps, guidance_scale=guidance), "fp32"
    )
    torch.testing.assert_close(ours, stock(folder, PROMPTS, start, steps, guidance), rtol=0, atol=TOLERANCE)
    assert ours.dtype == torch.float32
    assert float((ours - start).abs().max()) > 200 * TOLERANCE


@pytest.mark.parametrize(("steps", "guidance"), [(20, 3.5), (3, 3.5), (3, 1.0), (1, 7.5)])
def test_latents_are_those_of_the_stock_pipeline(base: Path, steps: int, guidance: float) -> None:
    equals_stock(base, "sd1", steps, guidance)


@pytest.mark.parametrize("guidance", [3.5, 1.0])
@pytest.mark.parametrize("family", tiny.FAMILIES[1:])
def test_latents_of_every_family_are_those_of_its_stock_pipeline(
    made: Callable[[str], Path], family: str, guidance: float
) -> None:
    equals_stock(made(family), family, 6, guidance)


def test_sdxl_may_compare_with_the_encoded_empty_prompt(made: Callable[[str], Path], tmp_path: Path) -> None:
    equals_stock(tiny.base(tmp_path / "base", "sdxl", force_zeros_for_empty_prompt=False), "sdxl", 3, 3.5)
    start = noise(*PROMPTS, family="sdxl")
    one, other = (
        sample_latents(models.load(folder, CPU), PROMPTS, start, config(), "fp32")
        for folder in (tmp_path / "base", made("sdxl"))
    )
    assert float((one - other).abs().max()) > 20 * TOLERANCE


def test_a_flow_may_be_shifted_by_resolution(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(made("sd3"), tmp_path / "base")
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.7, max_shift=2.0).save_pretrained(
        folder / "scheduler"
    )
    equals_stock(folder, "sd3", 4, 3.5)


def test_a_flow_draws_no_noise_of_its_own(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(made("sd3"), tmp_path / "base")
    FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True).save_pretrained(folder / "scheduler")
    start = noise(*PROMPTS, family="sd3")
    one, other = (
        sample_latents(models.load(folder, CPU), PROMPTS, start, config(), "fp32") for folder in (folder, made("sd3"))
    )
    assert torch.equal(one, other)


def test_a_folder_with_the_scheduler_of_sd15(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "pndm")
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
        set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    pipeline_index = (folder / "model_index.json").read_text()
    (folder / "model_index.json").write_text(pipeline_index.replace("DPMSolverMultistepScheduler", "PNDMScheduler"))
    start = noise(*PROMPTS)
    ours = sample_latents(models.load(folder, CPU), PROMPTS, start, config(), "fp32")
    torch.testing.assert_close(ours, stock(folder, PROMPTS, start, 3, 3.5), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_draws_what_diffusers_draws(model: Model, base: Path, name: str) -> None:
    start, options = noise(*PROMPTS), {"num_inference_steps": 5, "solver": name}
    found = sample_latents(model, PROMPTS, start, config(**options), "fp32")
    pipeline = DiffusionPipeline.from_pretrained(base)
    kind, own = SOLVERS[name]
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **own)
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(
        PROMPTS, latents=start, num_inference_steps=5, guidance_scale=3.5, height=tiny.RESOLUTION,
        width=tiny.RESOLUTION, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
    fewer = sample_latents(model, PROMPTS, start, config(**{**options, "num_inference_steps": 4}), "fp32")
    assert float((found - fewer).abs().max()) > 20 * TOLERANCE


def test_edm_is_the_papers_deterministic_sampler(model: Model) -> None:
    """Karras et al. 2022, Algorithm 1 without noise, on Eq. 5's noise levels: 2 n - 1 looks, as the budget counts."""
    options = config(num_inference_steps=4, solver="edm", guidance_scale=1)
    levels: list[float] = []
    hook = model.denoiser.register_forward_pre_hook(lambda *_: levels.append(0.0))
    try:
        found = sample_latents(model, PROMPTS[:1], noise(PROMPTS[0]), options, "fp32")
    finally:
        hook.remove()
    assert len(levels) == 7 == passes_per_image(options)
    train = (
        (1 - process_of(model.scheduler_config).alphas_cumprod) / process_of(model.scheduler_config).alphas_cumprod
    ).sqrt()
    low, high = float(train[0]), float(train[-1])
    sigmas = [(high ** (1 / 7) + i / 3 * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(4)] + [0.0]
    text = model.embed(PROMPTS[:1])

    @torch.no_grad()
    def slope(x: torch.Tensor, sigma: float) -> torch.Tensor:
        """dx / dsigma is the noise that an epsilon model sees; it is told where log sigma lies in the schedule's."""
        logs = train.log().double().numpy()
        timestep = torch.tensor(np.interp(np.log(sigma), logs, np.arange(len(logs))), dtype=torch.float32)
        return model.predict(model.denoiser, x / (sigma**2 + 1) ** 0.5, timestep, text)

    x = noise(PROMPTS[0]) * high
    for now, then in pairwise(sigmas):
        first = slope(x, now)
        euler = x + (then - now) * first
        x = x + (then - now) * (first + slope(euler, then)) / 2 if then else euler
    torch.testing.assert_close(found, x, rtol=0, atol=1e-4 * float(x.abs().max()))


def test_a_flow_has_one_solver(made: Callable[[str], Path]) -> None:
    flow = models.load(made("sd3"), CPU)
    with pytest.raises(SpinError, match=r"^expected generate.solver auto or euler for a flow model, got 'ddim'; "):
        solver(flow, config(solver="ddim"), 8)
    assert type(solver(flow, config(solver="euler"), 8)) is type(solver(flow, config(), 8))


def test_guidance_in_an_interval(model: Model) -> None:
    shapes: list[int] = []
    hook = model.denoiser.register_forward_pre_hook(lambda _, inputs: shapes.append(len(inputs[0])))
    start = noise(*PROMPTS)

    def draw(*interval: float) -> torch.Tensor:
        return sample_latents(model, PROMPTS, start, config(num_inference_steps=4, guidance_interval=interval), "fp32")

    try:
        part = draw(0.25, 0.75)
    finally:
        hook.remove()
    assert shapes == [4, 8, 8, 4]
    none = sample_latents(model, PROMPTS, start, config(num_inference_steps=4, guidance_scale=1), "fp32")
    torch.testing.assert_close(draw(0, 0), none, rtol=0, atol=0)
    assert not torch.allclose(part, none, atol=TOLERANCE)
    assert not torch.allclose(part, draw(0, 1), atol=TOLERANCE)


def test_steps_guidance_prompt_and_noise_all_matter(model: Model) -> None:
    start = noise(*PROMPTS)
    wanted = sample_latents(model, PROMPTS, start, config(), "fp32")
    for other in (
        sample_latents(model, PROMPTS, start, config(num_inference_steps=4), "fp32"),
        sample_latents(model, PROMPTS, start, config(guidance_scale=1), "fp32"),
        sample_latents(model, PROMPTS[::-1], start, config(), "fp32"),
        sample_latents(model, PROMPTS, start.flip(0), config(), "fp32"),
    ):
        assert float((other - wanted).abs().max()) > 200 * TOLERANCE


def test_guidance_1_asks_the_denoiser_once_and_more_asks_it_twice(model: Model) -> None:
    shapes: list[int] = []
    hook = model.denoiser.register_forward_pre_hook(lambda _, inputs: shapes.append(len(inputs[0])))
    try:
        sample_latents(model, PROMPTS, noise(*PROMPTS), config(guidance_scale=1), "fp32")
        sample_latents(model, PROMPTS, noise(*PROMPTS), config(guidance_scale=1.5), "fp32")
    finally:
        hook.remove()
    # 3 steps each: 4 prompts alone, then 4 empty and 4 given prompts in one call
    assert shapes == [4, 4, 4, 8, 8, 8]


@pytest.mark.parametrize("compiled", [True, False])
def test_short_batches_are_padded_to_one_shape_where_it_matters(model: Model, compiled: bool) -> None:
    """A compiled denoiser would be compiled again for every other shape; else the padding would only cost time."""
    shapes: list[int] = []
    hook = model.denoiser.register_forward_pre_hook(lambda _, inputs: shapes.append(len(inputs[0])))
    marked = replace(model, compiled=compiled)
    try:
        found = [sample_latents(marked, PROMPTS[:n], noise(*PROMPTS[:n]), config(), "fp32") for n in (4, 3, 1)]
    finally:
        hook.remove()
    assert set(shapes) == ({8} if compiled else {8, 6, 2})
    assert [len(latents) for latents in found] == [4, 3, 1]
    torch.testing.assert_close(found[1], found[0][:3], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found[2], found[0][:1], rtol=0, atol=TOLERANCE)


# --- what the denoiser hears


def encodings(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return the batches of prompts that the text encoder is given from now on."""
    seen: list[list[str]] = []
    encode = Model.encode_prompts
    monkeypatch.setattr(Model, "encode_prompts", lambda own, prompts: seen.append(prompts) or encode(own, prompts))
    return seen


def test_a_prompt_is_encoded_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.load(base, CPU)
    seen = encodings(monkeypatch)
    for _ in range(2):
        sample_latents(model, PROMPTS, noise(*PROMPTS), config(), "fp32")
    assert sorted({prompt for batch in seen for prompt in batch}) == sorted({*PROMPTS, ""})
    assert len(seen) == 2, "the prompts, and the empty one that guidance compares with"
    model.embed(["dog, blue", "new", "a hat"])
    assert set(seen[2]) == {"new"}
    with autocast(CPU, "bf16"):
        model.embed(["new"])
    assert len(seen) == 4, "in another precision it is another text"


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_heard_of_a_prompt_does_not_depend_on_its_batch_or_on_what_was_heard_before(
    made: Callable[[str], Path], family: str, precision: str
) -> None:
    """To the bit, so that a run that goes on, or a shard, hears what an uninterrupted one does."""
    prompts = [*PROMPTS, "", *(f"p{i}" for i in range(9))]
    whole, parts = models.load(made(family), CPU), models.load(made(family), CPU)
    with autocast(CPU, precision):
        together = whole.embed(prompts)
        alone = Conditioning.cat([parts.embed([prompt]) for prompt in reversed(prompts)][::-1])
        once = whole.encode_prompts(prompts)
    assert torch.equal(together.text, alone.text)
    torch.testing.assert_close(together.text, once.text, rtol=0, atol=1e-6 if precision == "fp32" else 0.02)
    if together.pooled is not None:
        assert alone.pooled is not None
        assert torch.equal(together.pooled, alone.pooled)


def test_what_was_heard_takes_bounded_memory(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.load(base, CPU)
    one = model.embed(["red cat"]).text
    monkeypatch.setattr(models, "HEARD_BYTES", 3 * one.nbytes)
    wanted = [model.encode_prompts([f"p{i}"]).text[0] for i in range(6)]
    seen = encodings(monkeypatch)
    found = model.embed([f"p{i}" for i in range(6)])
    torch.testing.assert_close(found.text, torch.stack(wanted), rtol=0, atol=1e-6)
    assert len(model.heard) == 3
    model.embed(["p3"])
    model.embed(["p9"])
    model.embed(["p3", "p5"])
    assert [batch[0] for batch in seen] == ["p0", "p9"], "the one not asked for longest goes first"


def test_what_was_heard_without_gradients_in_sight_can_be_learnt_from(base: Path) -> None:
    model = models.load(base, CPU)
    with torch.inference_mode():
        model.embed(["red cat"])
    assert not model.embed(["red cat"]).text.is_inference()


def test_an_image_does_not_depend_on_its_neighbours_or_its_position(model: Model) -> None:
    whole = sample_latents(model, PROMPTS, noise(*PROMPTS), config(), "fp32")
    turned = sample_latents(model, PROMPTS[::-1], noise(*PROMPTS[::-1]), config(), "fp32")
    torch.testing.assert_close(turned.flip(0), whole, rtol=0, atol=TOLERANCE)
    others = [PROMPTS[0], "x", "y", "z"]
    torch.testing.assert_close(
        sample_latents(model, others, noise(*others), config(), "fp32")[0], whole[0], rtol=0, atol=TOLERANCE
    )
    alone = sample_latents(model, PROMPTS[:1], noise(PROMPTS[0]), config(batch_size=1), "fp32")
    torch.testing.assert_close(alone[0], whole[0], rtol=0, atol=TOLERANCE)


def test_the_same_batch_gives_the_same_bits(model: Model) -> None:
    start = noise(*PROMPTS)
    one = sample_latents(model, PROMPTS, start, config(), "fp32")
    torch.manual_seed(11)
    assert torch.equal(sample_latents(model, PROMPTS, start, config(), "fp32"), one)
    assert torch.equal(start, noise(*PROMPTS))


def test_shards_give_the_same_bits_as_one_process(model: Model) -> None:
    names = [f"p{i}" for i in range(5)]

    def draw(rows: range) -> dict[int, torch.Tensor]:
        chosen = [names[i] for i in rows]
        return dict(zip(rows, sample_latents(model, chosen, noise(*chosen), config(batch_size=2), "fp32"), strict=True))

    whole = {i: x for rows in shard_batches(5, 2, 0, 1) for i, x in draw(rows).items()}
    dealt = {i: x for shard in (1, 0) for rows in shard_batches(5, 2, shard, 2) for i, x in draw(rows).items()}
    assert whole.keys() == dealt.keys() == set(range(5))
    assert all(torch.equal(whole[i], dealt[i]) for i in whole)


def test_compiled_is_the_same(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The denoiser is captured whole; what a backend makes of that is the benchmarks' to compare."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    start, options = noise(*PROMPTS), config(num_inference_steps=2)
    plain, compiled = models.load(base, CPU), models.load(base, CPU)
    compiled.compile_for("auto", 10**9)
    assert not compiled.compiled, "automatic means CUDA"
    compiled.compile_for("on", 1)
    assert compiled.compiled
    found = sample_latents(compiled, PROMPTS[:3], start[:3], options, "fp32")
    wanted = sample_latents(plain, PROMPTS[:3], start[:3], options, "fp32")
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
    assert compiled.denoiser.state_dict().keys() == plain.denoiser.state_dict().keys()


def test_bfloat16_is_close_but_not_the_same(model: Model) -> None:
    start = noise(*PROMPTS)
    exact = sample_latents(model, PROMPTS, start, config(guidance_scale=1), "fp32")
    rough = sample_latents(model, PROMPTS, start, config(guidance_scale=1), "bf16")
    assert rough.dtype == torch.float32
    # bfloat16 keeps 8 bits: 2^-8 = 0.4 % a product
    assert 0 < float((rough - exact).abs().max()) < 0.02 * float(exact.abs().max())


def test_a_roundtrip_changes_latents_but_not_their_shape(model: Model) -> None:
    latents = tiny.random_latents(3, seed=4)
    again = roundtrip(model, latents, "fp32")
    assert (again.shape, again.dtype) == (latents.shape, torch.float32)
    assert not torch.allclose(again, latents, atol=0.01)
    images = decode(model, latents, "fp32")
    # The way of a winner: 8-bit pixels, x / 127.5 - 1, encode.
    torch.testing.assert_close(again, model.encode(images.permute(0, 3, 1, 2) / 127.5 - 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 17, 64])
@pytest.mark.parametrize("size", [1, 4, 64])
@pytest.mark.parametrize("shards", [1, 2, 3, 20])
def test_shards_cover_every_batch_once(count: int, size: int, shards: int) -> None:
    dealt = [list(shard_batches(count, size, shard, shards)) for shard in range(shards)]
    assert sorted((rows for mine in dealt for rows in mine), key=lambda rows: rows.start) == batches(count, size)
    assert sorted(i for mine in dealt for rows in mine for i in rows) == list(range(count))
    # Shares differ by one batch at most.
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_batches_by_hand() -> None:
    assert batches(10, 4) == [range(0, 4), range(4, 8), range(8, 10)]
    assert list(shard_batches(10, 4, 0, 2)) == [range(0, 4), range(8, 10)]
    assert list(shard_batches(10, 4, 1, 2)) == [range(4, 8)]


def test_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, wanted in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx512_bf16": native})
        assert fast_precision(CPU) == wanted
    assert fast_precision(torch.device("mps")) == "fp32"
    with autocast(CPU, "bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast(CPU, "fp32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
