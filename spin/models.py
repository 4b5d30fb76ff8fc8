"""Text-to-image models in diffusers' folder format: find, check, load and export them. Only safetensors is read."""

import json
import shutil
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTokenizer

from spin.errors import SpinError

# Progress bars and advice of the libraries would bury the stages' own lines.
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

PARTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
}
"""Sub-folders that a self-play run needs, and the class that each must name in model_index.json."""
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")


@dataclass
class Model:
    """The parts of a Stable-Diffusion-format pipeline, in evaluation mode, on one device."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def scale_factor(self) -> int:
        """Pixels per latent position, along one side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def latents_shape(self, resolution: int) -> tuple[int, int, int]:
        """Return (C, H, W) of the latents of a square image.

        Raises:
            SpinError: ``resolution`` does not fit the autoencoder and the denoiser.
        """
        step = self.scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if resolution % step:
            lower = max(step, resolution // step * step)
            raise SpinError(
                f"expected data.resolution to be a multiple of {step} for this model, got {resolution}; "
                f"set it to {lower} or {lower + step}"
            )
        side = resolution // self.scale_factor
        return self.unet.config.in_channels, side, side

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> torch.Tensor:
        """Return the text encoder's last hidden state for ``prompts``, [B, L, D]; too long prompts are cut."""
        ids = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        return self.text_encoder(ids.to(self.device)).last_hidden_state

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
    if "://" in name:
        raise SpinError(f"expected a model folder or hub name, got {name!r}; download the model and give its folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    folders = [f"{part}/*" for part in (*PARTS, "scheduler")]
    try:
        # Half-precision and non-EMA twins would only double the download.
        return Path(
            snapshot_download(
                name,
                allow_patterns=["model_index.json", *folders],
                ignore_patterns=[
                    *(f"*{ending}" for ending in PICKLES),
                    "*.fp16.*",
                    "*.non_ema.*",
                    "*.msgpack",
                    "*.onnx*",
                ],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SpinError(
            f"expected a model folder or hub name, got {name!r} ({type(error).__name__}); give an existing folder or "
            "check the name and the network"
        ) from None


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise SpinError(f"expected a JSON object in {path}, got something else; export the pipeline again")
    return value


def check(folder: Path) -> None:
    """Refuse a folder that is no Stable-Diffusion-format pipeline or that holds pickled weights.

    Raises:
        SpinError: says which file is missing, of another class, or a pickle.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise SpinError(f"expected a diffusers pipeline folder with model_index.json, got {folder}; check base_model")
    parts = _json_object(index)
    for part, wanted in PARTS.items():
        entry = parts.get(part)
        got = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if got not in (wanted, f"{wanted}Fast"):
            raise SpinError(f"expected {part} of class {wanted} in {index}, got {got}; SD-1.x pipelines are supported")
        if not (folder / part).is_dir():
            raise SpinError(f"expected the folder {folder / part}, got none; the pipeline is incomplete")
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise SpinError(f"expected {folder}/scheduler/scheduler_config.json, got none; the pipeline is incomplete")
    for part in ("unet", "vae", "text_encoder"):
        if pickled := [path.name for path in sorted((folder / part).iterdir()) if path.suffix in PICKLES]:
            raise SpinError(
                f"expected safetensors weights, got the pickle {part}/{pickled[0]} ({folder}); convert it with "
                "save_pretrained(safe_serialization=True) and delete it"
            )
        if not list((folder / part).glob("*.safetensors")):
            raise SpinError(f"expected *.safetensors in {folder / part}, got none; export the pipeline as safetensors")


def complete(loaded: tuple[Any, dict[str, Any]]) -> Any:
    """Return the model of ``from_pretrained(..., output_loading_info=True)``.

    Raises:
        ValueError: a weight is missing; the libraries would draw it at random.
    """
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{len(missing)} weights of {type(model).__name__} are missing, e.g. {missing[0]}")
    return model


def worded(tokenizer: CLIPTokenizer) -> CLIPTokenizer:
    """Return ``tokenizer``.

    Raises:
        ValueError: it has no words; ``transformers`` makes such a one of a folder without vocabulary.
    """
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError("the tokenizer has no vocabulary")
    return tokenizer


def load(folder: Path, device: torch.device | None = None) -> Model:
    """Load a checked pipeline folder in float32, frozen, in evaluation mode."""
    check(folder)
    device = device or best_device()
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        unet = complete(UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32, **options))
        vae = complete(AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32, **options))
        text = complete(CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32, **options))
        tokenizer = worded(CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True))
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SpinError(f"expected a loadable diffusers pipeline, got {folder} ({reason}); export it again") from None
    for part in (unet, vae, text):
        part.to(device).requires_grad_(False).eval()
    return Model(unet, vae, text, tokenizer, _json_object(folder / "scheduler" / "scheduler_config.json"))


def export(opponent: Path, unet: UNet2DConditionModel, target: Path) -> None:
    """Write the player as a pipeline folder: the opponent's files, with the denoiser's weights replaced.

    Every other byte is the opponent's, so equal weights give an equal digest wherever and whenever they are written.
    """
    shutil.copytree(
        opponent,
        target,
        ignore=lambda path, names: (
            [n for n in names if n.endswith((".safetensors", ".safetensors.index.json"))]
            if Path(path).name == "unet"
            else []
        ),
    )
    unet.save_pretrained(target / "unet-new", safe_serialization=True)
    for weights in (target / "unet-new").glob("*.safetensors*"):
        weights.replace(target / "unet" / weights.name)
    shutil.rmtree(target / "unet-new")
