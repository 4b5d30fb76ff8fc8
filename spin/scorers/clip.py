"""CLIP score and style share, both from any ``transformers`` CLIPModel: a folder or a hub name.

CLIP score: 100 * cos(image, text), Hessel et al. 2021 without their factor 2.5 and their clamp at 0, i.e. the number
that the diffusion literature quotes (about 20 to 35 with OpenAI's models).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch.nn.functional import normalize
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from spin.errors import SpinError
from spin.models import complete, worded
from spin.scorers import Setting
from spin.weights import packaged

BATCH = 64


class Towers:
    """A frozen CLIPModel with its preprocessing, on one device, in one type.

    Args:
        pixels: turns images into float32 [N, 3, H, W].
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        pixels: Callable[[list[Image.Image]], torch.Tensor],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        self.model: Any = model.to(device, dtype).requires_grad_(False).eval()
        self.tokenizer, self.pixels, self.device, self.dtype = tokenizer, pixels, device, dtype

    @property
    def scale(self) -> float:
        """What the network was trained to multiply cosines with."""
        return float(self.model.logit_scale.float().exp())

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return unit image embeddings, float32 [N, D]."""
        parts = []
        for start in range(0, len(images), BATCH):
            pixels = self.pixels(list(images[start : start + BATCH])).to(self.device, self.dtype)
            parts.append(self.model.get_image_features(pixel_values=pixels).pooler_output.float())
        return normalize(torch.cat(parts), dim=-1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return unit text embeddings, float32 [N, D]; texts beyond the model's length are cut."""
        length = self.model.config.text_config.max_position_embeddings
        parts = []
        for start in range(0, len(texts), BATCH):
            tokens = self.tokenizer(
                list(texts[start : start + BATCH]),
                padding="max_length",
                truncation=True,
                max_length=length,
                return_tensors="pt",
            )
            parts.append(self.model.get_text_features(input_ids=tokens.input_ids.to(self.device)).pooler_output.float())
        return normalize(torch.cat(parts), dim=-1)

    def cosines(self, images: Sequence[Image.Image], texts: Sequence[str]) -> torch.Tensor:
        """Return the cosine of each image with its text, float32 [N] on the CPU."""
        return (self.images(images) * self.texts(texts)).sum(-1).cpu()


class Clip(Towers):
    """A CLIP from a folder or hub name, in float32 on ``device``; ``emoji`` is the judge of the package."""

    def __init__(self, name: str, device: torch.device):
        folder = packaged("judge", name)
        try:
            model = complete(
                CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
            )
            tokenizer = worded(CLIPTokenizer.from_pretrained(folder))
            processor = CLIPImageProcessorPil.from_pretrained(folder)
        except (OSError, ValueError, TypeError, RuntimeError, KeyError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise SpinError(
                f"expected a CLIP model with safetensors, got {name!r} ({reason}); set score.clip_model"
            ) from None
        super().__init__(model, tokenizer, processed(processor), device)


def processed(processor: Any) -> Callable[[list[Image.Image]], torch.Tensor]:
    """Return the preprocessing of a transformers image processor."""
    return lambda images: processor(images, return_tensors="pt").pixel_values


class ClipScore:
    """100 * cosine of image and ``template`` filled with its prompt."""

    name = "clip_score"

    def __init__(self, clip: Towers, template: str):
        self.clip, self.template = clip, template

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        return 100 * self.clip.cosines(images, [self.template.replace("{prompt}", prompt) for prompt in prompts])


class StyleShare:
    """1 where the first of ``styles`` fits the image best among "<prompt>, <style> style", else 0."""

    name = "style_share"

    def __init__(self, clip: Towers, styles: Sequence[str]):
        self.clip, self.styles = clip, tuple(styles)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        texts = [f"{prompt}, {style} style" for prompt in prompts for style in self.styles]
        embedded = self.clip.texts(texts).view(len(prompts), len(self.styles), -1)
        fit = (embedded @ self.clip.images(images).unsqueeze(-1)).squeeze(-1)
        return (fit.argmax(-1) == 0).float().cpu()


def load_clip_score(setting: Setting) -> ClipScore:
    """Return the CLIP score by ``score.clip_model``."""
    return ClipScore(setting.clip, setting.config.template)


def load_style_share(setting: Setting) -> StyleShare:
    """Return the style share by ``score.clip_model``."""
    return StyleShare(setting.clip, setting.config.styles)
