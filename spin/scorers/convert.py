"""Turns the files of the scorers' authors into folders of safetensors, once: the only place that opens a pickle.

``torch.load(weights_only=True)`` builds tensors and plain containers and runs no code of the file; the file's digest is
checked before it is opened.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BertTokenizer

from spin.download import download
from spin.errors import SpinError
from spin.models import worded
from spin.scorers.pickscore import TOKENIZER
from spin.store import digest_of_file
from spin.weights import MADE_FOR, Part, digest_of_weights, read

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Original:
    """What a scorer's authors publish.

    Attributes:
        file: at the hub, or an address.
        digest: SHA-256; empty: the one that the hub names for this commit.
        rest: what the file lacks: the tokenizer, for the aesthetic score the CLIP.
        convert: returns the tensors of ``model.safetensors`` from those in the file and the folder of ``rest``, and
            puts what else is needed into the last folder.
    """

    file: Part | str
    digest: str
    rest: Part
    convert: Callable[[Tensors, Path, Path], Tensors]


BLOCK = {
    "ln_1.": "layer_norm1.", "ln_2.": "layer_norm2.", "mlp.c_fc.": "mlp.fc1.", "mlp.c_proj.": "mlp.fc2.",
    "attn.out_proj.": "self_attn.out_proj.",
}  # fmt: skip
OUTSIDE = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}


def from_open_clip(state: Mapping[str, torch.Tensor]) -> Tensors:
    """Return the weights of an open_clip ViT under the names of transformers' CLIPModel.

    Three things differ beside names: open_clip keeps query, key and value in one matrix, multiplies with its two
    projections from the right, and transformers wants the scale as a number.
    """
    found: Tensors = {}
    for name, value in state.items():
        if name in ("text_projection", "visual.proj"):
            found["text_projection.weight" if name == "text_projection" else "visual_projection.weight"] = value.T
        elif name in OUTSIDE:
            found[OUTSIDE[name]] = value
        elif match := re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name):
            layer = f"{'vision' if match[1] else 'text'}_model.encoder.layers.{match[2]}."
            inside = match[3]
            if inside.startswith("attn.in_proj_"):
                kind = inside.removeprefix("attn.in_proj_")
                for part, third in zip("qkv", value.chunk(3), strict=True):
                    found[f"{layer}self_attn.{part}_proj.{kind}"] = third
            else:
                old = next((old for old in BLOCK if inside.startswith(old)), None)
                found[layer + (BLOCK[old] + inside.removeprefix(old) if old else inside)] = value
        elif not name.endswith("attn_mask"):
            found[name] = value
    if "logit_scale" in found:
        found["logit_scale"] = found["logit_scale"].reshape(())
    return found


def from_image_reward(state: Mapping[str, torch.Tensor]) -> Tensors:
    """Return ImageReward's weights under the names of transformers' BLIP parts; what it never uses is left out."""
    vision = {
        "cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj.": "embeddings.patch_embedding.", "norm.": "post_layernorm.",
    }  # fmt: skip
    inside = {
        "norm1.": "layer_norm1.", "norm2.": "layer_norm2.", "attn.qkv.": "self_attn.qkv.",
        "attn.proj.": "self_attn.projection.", "mlp.": "mlp.",
    }  # fmt: skip
    found: Tensors = {}
    for name, value in state.items():
        if name.startswith("blip.visual_encoder."):
            rest = name.removeprefix("blip.visual_encoder.")
            if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", rest):
                start, names, rest = f"vision.encoder.layers.{match[1]}.", inside, match[2]
            else:
                start, names = "vision.", vision
            old = next((old for old in names if rest.startswith(old)), None)
            found[start + (names[old] + rest.removeprefix(old) if old else rest)] = value
        elif name.startswith("blip.text_encoder."):
            if not name.endswith("position_ids"):
                found["text." + name.removeprefix("blip.text_encoder.")] = value
        elif name.startswith("mlp.layers."):
            found["head." + name.removeprefix("mlp.layers.")] = value
        elif not name.startswith(("blip.vision_proj.", "blip.text_proj.")):
            found[name] = value
    return found


def _hps(state: Tensors, rest: Path, folder: Path) -> Tensors:
    words = [path for pattern in TOKENIZER.files for path in rest.glob(pattern)]
    if not words:
        raise SpinError(f"expected CLIP's tokenizer in {rest}, got none; name the right folder")
    for path in words:
        shutil.copyfile(path, folder / path.name)
    return from_open_clip(state)


def _image_reward(state: Tensors, rest: Path, folder: Path) -> Tensors:
    try:
        tokenizer = worded(BertTokenizer.from_pretrained(rest, local_files_only=True))
    except (OSError, ValueError, TypeError) as error:
        raise SpinError(
            f"expected BERT's vocabulary in {rest}, got none ({type(error).__name__}); name the right folder"
        ) from None
    # As BLIP does; both stand behind BERT's own words.
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    tokenizer.save_pretrained(folder)
    return from_image_reward(state)


def _aesthetic(state: Tensors, rest: Path, folder: Path) -> Tensors:  # noqa: ARG001
    clip = read(rest)
    vision = {f"vision.{k}": v for k, v in clip.items() if k.startswith(("vision_model.", "visual_projection."))}
    return vision | {f"head.{name.removeprefix('layers.')}": value for name, value in state.items()}


_HPS, _HPS_COMMIT = "xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a"
ORIGINALS = {
    "hpsv2_0": Original(Part(_HPS, _HPS_COMMIT, ("HPS_v2_compressed.pt",)), "", TOKENIZER, _hps),
    "hpsv2_1": Original(
        Part(_HPS, _HPS_COMMIT, ("HPS_v2.1_compressed.pt",)),
        "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
        TOKENIZER,
        _hps,
    ),
    "image_reward": Original(
        Part("THUDM/ImageReward", "5736be03b2652728fb87788c9797b0570450ab72", ("ImageReward.pt",)),
        "",
        Part(
            "google-bert/bert-base-uncased",
            "86b5e0934494bd15c9632b12f734a8a67f723594",
            ("vocab.txt", "tokenizer.json", "tokenizer_config.json"),
        ),
        _image_reward,
    ),
    "aesthetic": Original(
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
        "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        Part("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41", ("model.safetensors",)),
        _aesthetic,
    ),
}


def convert(scorer: str, folder: Path, original: Path | None = None, digest: str = "", rest: Path | None = None) -> str:
    """Write a folder of safetensors weights for ``scorer`` and return its digest.

    Args:
        original: the authors' file; None: it is downloaded.
        digest: SHA-256 that it must have; empty: the published one.
        rest: a folder with what the file lacks; None: it is downloaded.

    Raises:
        SpinError: no such conversion, a digest that is unknown or another, a file that is no plain weights file, or a
            folder that is there already. Nothing is left of a conversion that failed.
    """
    if scorer not in ORIGINALS:
        raise SpinError(f"expected one of {', '.join(ORIGINALS)}, got {scorer!r}; no other weights need converting")
    if folder.exists():
        raise SpinError(f"expected a new folder, got {folder}, which exists; name another or remove it")
    known = ORIGINALS[scorer]
    path, published = (original, known.digest) if original else _fetched(known)
    if not path.is_file():
        raise SpinError(f"expected the authors' file, got nothing at {path}; correct the path")
    if not (wanted := digest or published):
        raise SpinError(f"expected --digest, got none; the digest of {path.name} is known only where it is downloaded")
    if (got := digest_of_file(path)) != wanted:
        raise SpinError(f"expected {path} with digest {wanted[:12]}, got {got[:12]}; fetch it again")
    state = unpickled(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as scratch:
        work = Path(scratch) / folder.name
        work.mkdir()
        tensors = known.convert(state, rest or known.rest.fetch(), work)
        # Half-precision checkpoints are the authors' way to save space; the networks compute in what they are told.
        tensors = {name: value.detach().float().contiguous().clone() for name, value in tensors.items()}
        save_file(tensors, work / "model.safetensors")
        (work / MADE_FOR).write_text(json.dumps({"scorer": scorer, "original": got}, indent=1) + "\n")
        found = digest_of_weights(work)
        work.rename(folder)
    return found


def unpickled(path: Path) -> Tensors:
    """Return the tensors of a ``torch.save`` file, which may wrap them as ``state_dict``.

    Raises:
        SpinError: the file holds anything else than tensors by name.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # The unpickler answers a hostile or damaged file with nearly any type of exception.
        reason = str(error).strip().splitlines() or [""]
        raise SpinError(
            f"expected a file of plain weights, got {path} ({type(error).__name__}: {reason[0][:120]}); fetch it again"
        ) from None
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise SpinError(f"expected tensors by name in {path}, got something else; name the authors' file")
    return {str(name): value for name, value in state.items()}


def _fetched(known: Original) -> tuple[Path, str]:
    """Return the downloaded original and the digest that it must have."""
    if isinstance(known.file, str):
        return download(known.file, known.digest), known.digest
    (name,) = known.file.files
    path = known.file.fetch() / name
    # The hub keeps a large file under its SHA-256, which is part of what the commit says.
    blob = path.resolve().name
    return path, known.digest or (blob if re.fullmatch(r"[0-9a-f]{64}", blob) else "")
