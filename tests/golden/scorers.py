"""Makes ``scorers.json`` with the packages of the scorers' authors; run by hand where these are installed.

``pip install --no-deps --target SITE open_clip_torch==3.3.0 torchvision==0.28.0 timm ftfy image-reward==1.5
hpsv2==1.2.0`` and ``PYTHONPATH=.:SITE python -m tests.golden.scorers``. What these packages lack beside current
versions of others (compiled operators that take no part here, helpers that transformers has dropped) is put in its
place below.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch

from tests import reference


def module(name: str, **content: Any) -> None:
    """Put a module with ``content`` where an import finds it."""
    made = types.ModuleType(name)
    made.__dict__.update(content)
    sys.modules[name] = made


def file_of(package: str, path: str, name: str) -> Any:
    """Import one file of an installed package without the package's own ``__init__``."""
    root = importlib.util.find_spec(package).submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location(name, Path(root) / path)
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


def main() -> None:
    real, torch.library.register_fake = torch.library.register_fake, lambda *_, **__: lambda function: function
    import torchvision

    torch.library.register_fake = real
    # Only now: transformers imports torchvision where it finds it.
    import transformers.modeling_utils
    import transformers.pytorch_utils
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    pictures = [reference.picture(*size, number) for number, size in enumerate(reference.PICTURES)]

    module("authors")
    module("authors.constants", OPENAI_DATASET_MEAN=(0.48145466, 0.4578275, 0.40821073),
           OPENAI_DATASET_STD=(0.26862954, 0.26130258, 0.27577711))  # fmt: skip
    transform = file_of("hpsv2", "src/open_clip/transform.py", "authors.transform")
    side = reference.OPEN_CLIP["vision"]["image_size"]
    preprocess = transform.image_transform(side, is_train=False, resize_longest_max=True)
    whole = torch.stack([preprocess(picture) for picture in pictures])

    model = CLIP(
        reference.OPEN_CLIP["embed_dim"],
        CLIPVisionCfg(**reference.OPEN_CLIP["vision"]),
        CLIPTextCfg(**reference.OPEN_CLIP["text"]),
    ).eval()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(reference.waves(shapes))
    with torch.no_grad():
        image, text, _ = model(whole, torch.tensor(reference.TOKENS))
    found: dict[str, Any] = {
        "open_clip": {"shapes": shapes, "cosines": (image @ text.T).diagonal().tolist()},
        "whole_in_square": {"sums": whole.sum((1, 2, 3)).tolist(), "rows": whole[:, :, 9, 7:12].tolist()},
    }

    transformers.modeling_utils.apply_chunking_to_forward = transformers.pytorch_utils.apply_chunking_to_forward
    transformers.modeling_utils.find_pruneable_heads_and_indices = None
    transformers.modeling_utils.prune_linear_layer = None
    module("fairscale")
    module("fairscale.nn")
    module("fairscale.nn.checkpoint")
    module("fairscale.nn.checkpoint.checkpoint_activations", checkpoint_wrapper=None)
    med = file_of("ImageReward", "models/BLIP/med.py", "authors.med")
    vit = file_of("ImageReward", "models/BLIP/vit.py", "authors.vit")
    sizes = reference.BLIP
    visual = vit.VisionTransformer(
        img_size=sizes["side"], patch_size=sizes["patch"], embed_dim=sizes["vision"], depth=sizes["layers"],
        num_heads=sizes["vision_heads"],
    )  # fmt: skip
    config = med.BertConfig(
        hidden_size=sizes["text"], num_hidden_layers=sizes["layers"], num_attention_heads=sizes["text_heads"],
        intermediate_size=4 * sizes["text"], vocab_size=sizes["words"], max_position_embeddings=40,
        add_cross_attention=True, encoder_width=sizes["vision"], type_vocab_size=2, layer_norm_eps=1e-12,
        hidden_act="gelu", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    med.BertModel.init_weights = lambda _: None
    med.BertModel.invert_attention_mask = lambda _, mask: (1.0 - mask[:, None, None, :].float()) * -1e4
    med.BertModel.get_head_mask = lambda _, __, layers: [None] * layers
    med.BertModel.dtype = torch.float32
    text = med.BertModel(config, add_pooling_layer=False)
    from torch import nn

    mlp = nn.Sequential(
        nn.Linear(sizes["text"], 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
        nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip
    parts = {"blip.visual_encoder.": visual, "blip.text_encoder.": text, "mlp.layers.": mlp}
    shapes = {
        prefix + name: tuple(value.shape) for prefix, part in parts.items() for name, value in part.state_dict().items()
    }
    shapes = {name: shape for name, shape in shapes.items() if not name.endswith("position_ids")}
    state = reference.waves(shapes)
    for prefix, part in parts.items():
        mine = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        part.load_state_dict(mine, strict=False)
        part.eval()
    transforms = torchvision.transforms
    preprocess = transforms.Compose([
        transforms.Resize(sizes["side"], interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(sizes["side"]), lambda image: image.convert("RGB"), transforms.ToTensor(),
        transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ])  # fmt: skip
    centre = torch.stack([preprocess(picture) for picture in pictures])
    words = torch.tensor(reference.WORDS)
    with torch.no_grad():
        seen = visual(centre)
        heard = text(
            words,
            attention_mask=(words != 0).long(),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
            return_dict=True,
        ).last_hidden_state[:, 0]
        rewards = (mlp(heard)[:, 0] - 0.16717362830052426) / 1.0333394966054072
    found["image_reward"] = {"shapes": shapes, "rewards": rewards.tolist()}
    found["centre_square"] = {"sums": centre.sum((1, 2, 3)).tolist(), "rows": centre[:, :, 9, 7:12].tolist()}
    reference.MADE.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
