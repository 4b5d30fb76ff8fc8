"""Text-to-image models in diffusers' folder format: find, check, load and export them. Only safetensors is read."""

import json
import logging
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin
from transformers import PreTrainedTokenizerBase

from spin.errors import SpinError, brief, printable
from spin.families import Conditioning, Denoiser, Family, family_of, latents_per_step
from spin.memory import is_full, room_for

logger = logging.getLogger("spin")
COMPILE_FROM = 2048
"""Images or pairs from which compiling, a minute or two on a GPU, repays itself."""
HEARD_BYTES = 256 * 2**20
"""What prompts that were encoded may take of the device's memory, to be heard again: 1,100 of SD-1.5's."""
ENCODED_TOGETHER = 8
"""Prompts per call of the text encoders, always: so what is heard of one, to the last bit, depends on no other."""
COMPILERS = {"cuda": ("CC", "gcc", "clang", "cc"), "cpu": ("CXX", "g++", "clang++", "c++")}
"""What names the compiler that a compiled network calls, and the programs it may be."""
MAX_JSON = 2**20
"""Bytes of a part's config; real ones have a few thousand."""
MAX_HEADER = 2**22
"""Bytes of the list of tensors in a safetensors file; the largest models have a few hundred thousand."""
MAX_LAYERS = 200
MAX_PER_BLOCK = 20
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")


@dataclass
class Model:
    """The parts of a text-to-image pipeline, in evaluation mode, on one device.

    ``pipeline`` is the stock one, of the same parts: it encodes the prompts.
    """

    family: Family
    denoiser: Denoiser
    vae: AutoencoderKL
    pipeline: Any
    scheduler_config: dict[str, Any]
    compiled: bool = False
    """Whether the denoiser is compiled: then every call should have the same shape."""
    heard: OrderedDict[tuple[str, torch.dtype | None], Conditioning] = field(default_factory=OrderedDict, repr=False)
    """Prompts that were encoded, by precision; the one not asked for longest comes first."""

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def scale_factor(self) -> int:
        """Pixels per latent position, along one side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def latents_shape(self, resolution: int) -> tuple[int, int, int]:
        """Return (C, H, W) of the latents of a square image.

        Raises:
            SpinError: ``resolution`` does not fit the autoencoder and the denoiser.
        """
        step = self.scale_factor * latents_per_step(self.denoiser)
        if resolution % step:
            lower = max(step, resolution // step * step)
            raise SpinError(
                f"expected data.resolution to be a multiple of {step} for this model, got {resolution}; "
                f"set it to {lower} or {lower + step}"
            )
        # A transformer that crops its table of positions has no more than these.
        positions = self.denoiser.config.get("pos_embed_max_size")
        if positions and resolution > positions * step:
            raise SpinError(
                f"expected data.resolution of at most {positions * step} for this model, got {resolution}; lower it"
            )
        side = resolution // self.scale_factor
        return self.denoiser.config.in_channels, side, side

    def compile_for(self, mode: str, items: int) -> None:
        """Compile the denoiser, in place, if ``mode`` says so: ``on``, or ``auto`` on CUDA with enough ``items``."""
        if compiles(mode, self.device, items):
            self.denoiser.compile(dynamic=False)
            self.compiled = True

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Conditioning:
        """Return what the denoiser hears of ``prompts``; each is encoded once, while there is room for it."""
        kind = self.device.type
        # Autocast gives each precision its own text.
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        found = {prompt: self.heard.pop((prompt, precision), None) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, text in found.items() if text is None]
        # Tensors of inference mode would be of no use to training.
        with torch.inference_mode(False):
            for start in range(0, len(missing), ENCODED_TOGETHER):
                part = missing[start : start + ENCODED_TOGETHER]
                encoded = self.encode_prompts([*part, *part[-1:] * (ENCODED_TOGETHER - len(part))])
                found |= zip(part, encoded.rows(), strict=False)
        texts = {prompt: text for prompt, text in found.items() if text is not None}
        self.heard |= {(prompt, precision): text for prompt, text in texts.items()}
        while len(self.heard) * next(iter(self.heard.values())).nbytes > HEARD_BYTES:
            self.heard.popitem(last=False)
        return Conditioning.cat([texts[prompt] for prompt in prompts])

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode ``prompts`` as the stock pipeline does; too long ones are cut.

        The empty prompt gives what guidance compares with. That differs from the encoded empty text in SDXL
        pipelines that ask for zeros instead.
        """
        given = torch.tensor([bool(prompt) for prompt in prompts], device=self.device)
        encoded = self.pipeline.encode_prompt(
            prompt=list(prompts),
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance="" in prompts,
            **self.family.prompts,
        )
        text, empty, *pooled = encoded
        prompted = Conditioning(text, *pooled[:1])
        return prompted if empty is None else prompted.where(given, Conditioning(empty, *pooled[1:]))

    def predict(
        self, denoiser: Any, latents_BCHW: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """Return the prediction [B, C, H, W] of ``denoiser``: the model's own, its reference, or one that wraps it.

        Args:
            timestep: [] or [B], int64, float32 for a flow.
        """
        height, width = (side * self.scale_factor for side in latents_BCHW.shape[2:])
        keywords = self.family.keywords(conditioning, height, width)
        prediction: torch.Tensor = denoiser(
            latents_BCHW, timestep=timestep.expand(len(latents_BCHW)), **keywords
        ).sample
        return prediction

    @torch.no_grad()
    def encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1], [B, 3, H, W] -> scaled latents, float32 (the posterior's mean)."""
        posterior = self.vae.encode(images_BCHW.to(self.device, self.vae.dtype)).latent_dist
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return (posterior.mean.float() - shift) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Scaled latents -> images as uint8 [B, H, W, 3] on the CPU."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        latents = latents_BCHW.to(self.device, self.vae.dtype) / self.vae.config.scaling_factor + shift
        images = self.vae.decode(latents).sample.float().clamp(-1, 1)
        return ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def compiles(mode: str, device: torch.device, items: int) -> bool:
    """Return whether ``mode`` (``on``, ``off``, ``auto``) compiles for a stage's ``items``, images or pairs.

    Raises:
        SpinError: ``on`` without a compiler, which Triton, or on a CPU torch itself, calls while the program runs.
    """
    wanted = mode == "on" or (mode == "auto" and device.type == "cuda" and items >= COMPILE_FROM)
    variable, *programs = COMPILERS.get(device.type, COMPILERS["cuda"])
    there = bool(os.environ.get(variable)) or any(map(shutil.which, programs))
    if wanted and not there:
        if mode == "on":
            raise SpinError(
                f"expected a compiler for compile: on, got none of {', '.join(programs)} and no {variable}; install "
                "one, or set compile to off"
            )
        logger.info("compile: auto goes without, there is no compiler (%s or %s)", ", ".join(programs), variable)
    return wanted and there


def best_device() -> torch.device:
    """Return this process's accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def find(name: str) -> Path:
    """Return the local folder of a base model: ``emoji``, a folder, or a hub name (downloaded, no pickles)."""
    if name == "emoji":
        return Path(str(files("spin.emoji") / "base"))
    path = Path(name)
    if path.exists() or name.startswith((".", "/", "~")):
        return path.expanduser()
    from huggingface_hub import snapshot_download

    # The index first: a model that cannot be played is refused before gigabytes arrive.
    family, index = read_index(hub_index(name))
    with _hub_errors(name):
        folders = [f"{part}/*" for part in (*family.parts_of(index), "scheduler")]
        # Half-precision and non-EMA twins would only double the download.
        twins = ["*.fp16*", "*.non_ema*", "*.msgpack", "*.onnx*"]
        return Path(
            snapshot_download(
                name,
                allow_patterns=["model_index.json", *folders],
                ignore_patterns=[*(f"*{ending}" for ending in PICKLES), *twins],
            )
        )


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SpinError(
            f"expected a model folder or hub name, got {name!r} ({type(error).__name__}); give an existing folder or "
            "check the name and the network"
        ) from None


def hub_index(name: str) -> Path:
    """Return a folder with nothing but the model_index.json of a hub model."""
    from huggingface_hub import snapshot_download

    with _hub_errors(name):
        return Path(snapshot_download(name, allow_patterns=["model_index.json"]))


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text()) if path.stat().st_size <= MAX_JSON else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise SpinError(f"expected a JSON object in {path}, got something else; export the pipeline again")
    return value


def read_index(folder: Path) -> tuple[Family, dict[str, Any]]:
    """Return the family of a pipeline folder, and its model_index.json.

    Raises:
        SpinError: no pipeline folder, or none of a family that can be played.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise SpinError(f"expected a diffusers pipeline folder with model_index.json, got {folder}; check base_model")
    index = _json_object(path)
    return family_of(index, path), index


def check(folder: Path) -> None:
    """Refuse a folder that is no pipeline of a known family, or that holds pickled weights.

    Raises:
        SpinError: says which file is missing, of another class, or a pickle.
    """
    family, index = read_index(folder)
    parts = family.parts_of(index)
    for part, kind in parts.items():
        entry, wanted = index.get(part), kind.__name__
        got = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if got not in (wanted, f"{wanted}Fast"):
            raise SpinError(
                f"expected {part} of class {wanted} in {folder}/model_index.json, got {got}; a "
                f"{family.pipeline.__name__} needs it"
            )
        if not (folder / part).is_dir():
            raise SpinError(f"expected the folder {folder / part}, got none; the pipeline is incomplete")
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise SpinError(f"expected {folder}/scheduler/scheduler_config.json, got none; the pipeline is incomplete")
    for part, kind in parts.items():
        if issubclass(kind, PreTrainedTokenizerBase):
            continue
        if pickled := [path.name for path in sorted((folder / part).iterdir()) if path.suffix in PICKLES]:
            raise SpinError(
                f"expected safetensors weights, got the pickle {part}/{pickled[0]} ({folder}); convert it with "
                "save_pretrained(safe_serialization=True) and delete it"
            )
        weights = sorted((folder / part).glob("*.safetensors"))
        if not weights:
            raise SpinError(f"expected *.safetensors in {folder / part}, got none; export the pipeline as safetensors")
        for path in weights:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER:
                raise SpinError(
                    f"expected a header of at most {MAX_HEADER} bytes in {path}, got one of {size}; fetch it again"
                )
        config = folder / part / "config.json"
        if config.is_file():
            if (size := config.stat().st_size) > MAX_JSON:
                raise SpinError(f"expected a config of at most {MAX_JSON} bytes, got {size} ({config}); mend it")
            # What is no JSON is refused when it is loaded.
            with suppress(ValueError, RecursionError):
                _check_layers(json.loads(config.read_text()), folder / part)


def _check_layers(config: Any, where: Path, name: str = "") -> None:
    """Refuse a config that asks for more layers than anyone has: they are made one by one before weights are read."""
    most = MAX_PER_BLOCK if "per_block" in name or name.endswith("block_types") else MAX_LAYERS
    if isinstance(config, dict):
        for key, value in config.items():
            _check_layers(value, where, key)
        return
    layers = "layers" in name or name.endswith("block_types")
    got = len(config) if isinstance(config, list) else config
    if layers and isinstance(got, int) and got > most:
        raise SpinError(f"expected {printable(name)} of at most {most} in {where}, got {brief(got)}; mend the config")
    if layers and isinstance(config, list):
        for value in config:
            _check_layers(value, where, name)


def complete(loaded: tuple[Any, dict[str, Any]]) -> Any:
    """Return the model of ``from_pretrained(..., output_loading_info=True)``.

    Raises:
        ValueError: a weight is missing; the libraries would draw it at random.
    """
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{len(missing)} weights of {type(model).__name__} are missing, e.g. {missing[0]}")
    return model


def worded(tokenizer: Any) -> Any:
    """Return ``tokenizer``.

    Raises:
        ValueError: it has no words; ``transformers`` makes such a one of a folder without vocabulary.
    """
    # T5's has the space even then.
    if len(tokenizer) <= len(tokenizer.all_special_tokens) + 1:
        raise ValueError("the tokenizer has no vocabulary")
    return tokenizer


def _part(folder: Path, kind: Any) -> Any:
    if issubclass(kind, PreTrainedTokenizerBase):
        return worded(kind.from_pretrained(folder, local_files_only=True))
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    precision = "torch_dtype" if issubclass(kind, ModelMixin) else "dtype"
    return complete(kind.from_pretrained(folder, **options, **{precision: torch.float32}))


def scheduler_config(folder: Path) -> dict[str, Any]:
    """Return the noise schedule of a pipeline folder."""
    return _json_object(folder / "scheduler" / "scheduler_config.json")


def load(folder: Path, device: torch.device | None = None) -> Model:
    """Load a checked pipeline folder in float32, frozen, in evaluation mode."""
    check(folder)
    family, index = read_index(folder)
    device = device or best_device()
    with room_for("the model", "give the task more memory,"):
        try:
            parts = {name: _part(folder / name, kind) for name, kind in family.parts_of(index).items()}
        except Exception as error:
            # The libraries answer hostile files with nearly any type of exception.
            if is_full(error):
                raise
            reason = printable(str(error).strip().splitlines()[0]) if str(error).strip() else type(error).__name__
            raise SpinError(
                f"expected a loadable diffusers pipeline, got {folder} ({reason}); export it again"
            ) from None
        return assemble(family, index, parts, scheduler_config(folder), device)


def assemble(
    family: Family, index: dict[str, Any], parts: dict[str, Any], schedule: dict[str, Any], device: torch.device
) -> Model:
    """Return the model of loaded ``parts``, which are moved to ``device``, frozen and put into evaluation mode.

    Weights of convolutions lie channels last, as the fast kernels of CPUs and GPUs want them.
    """
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.to(device).requires_grad_(False).eval()
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Model(family, parts[family.denoiser], parts["vae"], family.assemble(index, parts), schedule)


def _lay_out(network: Denoiser, layout: torch.memory_format) -> None:
    # Module.to does the same, but not to a network that was shared out over processes.
    for weight in network.parameters():
        if weight.dim() == 4:
            weight.data = weight.data.contiguous(memory_format=layout)


def export(opponent: Path, denoiser: Denoiser, target: Path) -> None:
    """Write the player as a pipeline folder: the opponent's files, with the denoiser's weights replaced.

    Every other byte is the opponent's, so equal weights give an equal digest wherever and whenever they are written.
    """
    name = read_index(opponent)[0].denoiser
    shutil.copytree(
        opponent,
        target,
        ignore=lambda path, names: (
            [n for n in names if n.endswith((".safetensors", ".safetensors.index.json"))]
            if Path(path) == opponent / name
            else []
        ),
    )
    fresh = target / f"{name}-new"
    # safetensors knows one layout alone; the caller's network keeps its own.
    _lay_out(denoiser, torch.contiguous_format)
    denoiser.save_pretrained(fresh, safe_serialization=True)
    _lay_out(denoiser, torch.channels_last)
    for weights in fresh.glob("*.safetensors*"):
        weights.replace(target / name / weights.name)
    shutil.rmtree(fresh)
