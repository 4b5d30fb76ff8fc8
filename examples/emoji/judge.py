"""Train the judge, a ``transformers`` CLIPModel on real emoji of all styles: ``python -m examples.emoji.judge``.

It never sees the OpenMoji drawings of validation and test concepts. Two questions are learnt at once: which of
all prompts an image shows, and which of the four styles named beside that prompt it is drawn in. Half of the
training images have gone through the autoencoder, so that its softness says nothing about the style.
"""

import json
import math
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPVisionConfig

from examples.emoji.autoencoder import FOLDER as AUTOENCODER
from examples.emoji.autoencoder import tensor
from examples.emoji.loop import TimedTraining
from examples.emoji.text import new_tokenizer, style_prompt, text_config, token_ids
from examples.emoji.world import BUILD, STYLES, build

FOLDER = BUILD / "judge"


def new_judge(tokenizer) -> CLIPModel:
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        projection_dim=128,
    )
    config = CLIPConfig(
        text_config=text_config(tokenizer, 128).to_dict(),
        vision_config=vision.to_dict(),
        projection_dim=128,
        logit_scale_init_value=math.log(10),
    )
    # Fused attention's backward is very slow on the CPU at these tiny shapes.
    return CLIPModel._from_config(config, attn_implementation="eager")


def augment(x: torch.Tensor) -> torch.Tensor:
    """Random affine (rotation 12 degrees, scale 0.8..1.15, shift 10 %), brightness, contrast and noise."""
    n = len(x)
    angle, scale = (torch.rand(n) - 0.5) * 0.42, 0.87 + torch.rand(n) * 0.38
    shift = (torch.rand(n, 2) - 0.5) * 0.25
    mirror = (torch.rand(n) < 0.3).float() * -2 + 1
    theta = torch.stack(
        [
            mirror * scale * angle.cos(),
            -scale * angle.sin(),
            shift[:, 0],
            scale * angle.sin(),
            scale * angle.cos(),
            shift[:, 1],
        ],
        1,
    ).view(n, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x - 1, grid, align_corners=False) + 1
    x = x * (0.85 + 0.3 * torch.rand(n, 1, 1, 1)) + 0.2 * (torch.rand(n, 1, 1, 1) - 0.5)
    return x + 0.06 * torch.rand(n, 1, 1, 1) * torch.randn_like(x)


def embed(output) -> torch.Tensor:
    return F.normalize(output.pooler_output.float(), dim=-1)


def main(
    minutes: Annotated[float, typer.Option(help="training time")] = 15, batch: int = 128, threads: int = 2
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    images, rows = build()
    pixels = tensor(images)
    # The world's own prompts first: recall is measured among them.
    prompts = list(dict.fromkeys(row.prompt for row in sorted(rows, key=lambda row: not row.player)))
    own = len({row.prompt for row in rows if row.player})
    concept = torch.tensor([prompts.index(row.prompt) for row in rows])
    style = torch.tensor([STYLES.index(row.style) for row in rows])
    seen = torch.tensor([i for i, row in enumerate(rows) if not row.held_out])
    known = torch.tensor([i for i, row in enumerate(rows) if row.player and not row.held_out])
    held_out = torch.tensor([i for i, row in enumerate(rows) if row.held_out])
    vae = AutoencoderKL.from_pretrained(AUTOENCODER / "export")
    with torch.no_grad():
        soft = torch.cat([vae.decode(vae.encode(b).latent_dist.mean).sample for b in pixels.split(128)]).clamp(-1, 1)
    tokenizer = new_tokenizer(rows)
    plain = token_ids(tokenizer, prompts)
    styled = torch.stack([token_ids(tokenizer, [style_prompt(p, s) for s in STYLES]) for p in prompts])
    judge = new_judge(tokenizer)
    training = TimedTraining(judge, FOLDER, minutes, lr=1.5e-3, ema=0.995, flat=0.3)
    processor = CLIPImageProcessor(
        size={"height": 64, "width": 64},
        crop_size={"height": 64, "width": 64},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )

    # Pictures by concept; the world's concepts all have at least three that may be seen.
    pictures = [seen[concept[seen] == c] for c in range(len(prompts))]

    def loss() -> torch.Tensor:
        chosen = torch.randperm(len(prompts))[: batch // 2]
        i = torch.cat([pictures[c][torch.randperm(len(pictures[c]))[:2]] for c in chosen.tolist()])
        x = augment(torch.where(torch.rand(len(i), 1, 1, 1) < 0.5, soft[i], pixels[i]))
        among = torch.cat([chosen, torch.randint(len(prompts), (160,))]).unique()
        ids = torch.cat([plain[among], styled[concept[i]].flatten(0, 1)])
        with torch.autocast("cpu", torch.bfloat16):
            image = judge.get_image_features(pixel_values=x)
            text = judge.get_text_features(input_ids=ids)
        image, text = embed(image), embed(text)
        scale = judge.logit_scale.exp().clamp(max=100)
        answer = torch.searchsorted(among, concept[i])
        what = F.cross_entropy(scale * image @ text[: len(among)].T, answer, label_smoothing=0.05)
        four = text[len(among) :].view(len(i), len(STYLES), -1)
        which = F.cross_entropy(scale * (four @ image[:, :, None]).squeeze(-1), style[i])
        # Two drawings of a concept belong together whatever their styles: this carries over to styles never seen.
        alike = (scale * image @ image.T).masked_fill(torch.eye(len(i), dtype=torch.bool), -1e4)
        twin = torch.arange(len(i)) ^ 1
        return what + which + 0.5 * F.cross_entropy(alike, twin)

    @torch.no_grad()
    def accuracy(model: CLIPModel, x: torch.Tensor, index: torch.Tensor) -> dict[str, float]:
        """R@1 and R@5 among the world's prompts, and the share whose style is recognised among the four."""
        image = embed(model.get_image_features(pixel_values=x[index]))
        text = embed(model.get_text_features(input_ids=plain[:own]))
        four = embed(model.get_text_features(input_ids=styled[concept[index]].flatten(0, 1))).view(len(index), 4, -1)
        rank = (image @ text.T).argsort(descending=True)[:, :5]
        right = rank == concept[index][:, None]
        styles = (four @ image[:, :, None]).squeeze(-1).argmax(1) == style[index]
        return {
            "recall_at_1": float(right[:, 0].float().mean()),
            "recall_at_5": float(right.any(1).float().mean()),
            "style_accuracy": float(styles.float().mean()),
        }

    def report(model: nn.Module) -> dict[str, dict[str, float]]:
        return {
            "known": accuracy(model, pixels, known[::7]),
            "held_out": accuracy(model, pixels, held_out),
            "held_out_autoencoded": accuracy(model, soft, held_out),
        }

    for step in training.run(loss):
        if step % 200 == 0:
            print(f"  {report(training.average)}", flush=True)
    export = FOLDER / "export"
    training.average.half().save_pretrained(export)
    CLIPProcessor(processor, tokenizer).save_pretrained(export)
    figures = report(training.average.float())
    (FOLDER / "figures.json").write_text(json.dumps(figures, indent=2))
    print(figures)


if __name__ == "__main__":
    typer.run(main)
