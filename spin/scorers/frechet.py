"""Fréchet distance between two sets of images, in the features of any ``transformers`` image model.

This is no scorer: it is a number of two sets, lower for nearer ones, and no image has one. What it shares with them is
``images in, numbers out``, batched, on a device: the features, which are kept per image.

Source: Heusel et al. 2017, Eq. 6. Their Inception features are replaced by the model given: with a few hundred images
of one domain, only distances in one feature space and between sets of equal size can be compared.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModel

from spin.errors import SpinError
from spin.models import complete
from spin.weights import packaged

BATCH = 64


class Features:
    """A frozen image model with its preprocessing, in float32 on ``device``; only safetensors is loaded.

    Raises:
        SpinError: ``name`` is no folder of such a model; ``emoji`` is the one of the package.
    """

    def __init__(self, name: str, device: torch.device):
        folder = packaged("features", name)
        try:
            self.model = complete(
                AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
            )
            self.processor = AutoImageProcessor.from_pretrained(folder)
        except (OSError, ValueError, TypeError, RuntimeError, KeyError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise SpinError(
                f"expected an image model with safetensors, got {name!r} ({reason}); set score.frechet_model"
            ) from None
        self.model.to(device).requires_grad_(False).eval()
        self.device = device

    @torch.inference_mode()
    def of(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return the pooled features, float64 [N, D]."""
        parts = []
        for start in range(0, len(images), BATCH):
            pixels = self.processor(list(images[start : start + BATCH]), return_tensors="pt").pixel_values
            parts.append(self.model(pixels.to(self.device)).pooler_output.flatten(1).double().cpu().numpy())
        return np.concatenate(parts)


def frechet_distance(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """Return |mean_a - mean_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2)) of two feature sets.

    The trace of the root is the sum of the singular values of A^T B, A and B being the centred, scaled features: no
    root of a nearly singular covariance is taken, so N below D is no numerical trouble (though the estimate is biased).
    """
    if min(len(a_ND), len(b_MD)) < 2:
        raise ValueError(f"expected at least 2 images on either side, got {len(a_ND)} and {len(b_MD)}")
    mean_a, mean_b = a_ND.mean(0), b_MD.mean(0)
    a, b = (a_ND - mean_a) / np.sqrt(len(a_ND) - 1), (b_MD - mean_b) / np.sqrt(len(b_MD) - 1)
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((mean_a - mean_b) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * root)
