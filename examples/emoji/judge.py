"""Train the judge, a ``transformers`` CLIPModel on real drawings: ``python -m examples.emoji.judge --minutes 25``.

It never sees a held-out drawing. Three things are learnt at once: to embed every drawing, and every mixture of two
drawings, as the teacher does (``examples.emoji.classifier``, seed 0); which of all prompts a drawing shows; and which
of the four styles named beside that prompt it is drawn in. Half of the drawings have gone through the autoencoder,
so that its softness says nothing about the style.
"""

import json
import math
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer, CLIPVisionConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from examples.emoji.autoencoder import FOLDER as AUTOENCODER
from examples.emoji.autoencoder import reconstruct, tensor
from examples.emoji.classifier import FOLDER as CLASSIFIER
from examples.emoji.classifier import WIDTH, Classifier, new_processor, recall, recolour, reshape, vocabulary
from examples.emoji.loop import BATCHES, DEVICE, TimedTraining, autocast, compiled, placed
from examples.emoji.text import new_tokenizer, style_prompt, text_config, token_ids
from examples.emoji.world import BUILD, STYLES, build, run

FOLDER = BUILD / "judge"


def new_judge(tokenizer: CLIPTokenizer) -> CLIPModel:
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=5,
        num_attention_heads=6,
        image_size=64,
        patch_size=8,
        projection_dim=WIDTH + 64,
    )
    config = CLIPConfig(
        text_config=text_config(tokenizer, 128).to_dict(),
        vision_config=vision.to_dict(),
        projection_dim=WIDTH + 64,
        logit_scale_init_value=math.log(16),
    )
    # Fused attention's backward is very slow on the CPU at these tiny shapes.
    return CLIPModel._from_config(config, attn_implementation="eager")


def embed(output: BaseModelOutputWithPooling) -> torch.Tensor:
    return F.normalize(output.pooler_output.float(), dim=-1)


def content(embedding: torch.Tensor) -> torch.Tensor:
    """The part of an embedding that copies the teacher's; the rest is free for the style."""
    return F.normalize(embedding[..., :WIDTH], dim=-1)


def mixed(x: torch.Tensor) -> torch.Tensor:
    """Put a rectangle of another drawing into each: as many pictures to imitate as one likes."""
    top, left, tall, broad = (torch.rand(4) * torch.tensor([40, 40, 40, 40])).int().tolist()
    x = x.clone()
    part = (..., slice(top, top + tall + 8), slice(left, left + broad + 8))
    x[part] = x.roll(1, 0)[part]
    return x


def main(
    minutes: Annotated[float, typer.Option(help="training time")] = 25,
    batch: int = 32 * BATCHES,
    threads: int = 2,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    images, rows = build()
    pixels = tensor(images)
    codes = vocabulary(rows)
    place = {code: i for i, code in enumerate(codes)}
    prompt_of = {row.codepoint: row.prompt for row in rows}
    prompts = [prompt_of[code] for code in codes]
    own = len({row.codepoint for row in rows if row.player})
    concept = torch.tensor([place[row.codepoint] for row in rows], device=DEVICE)
    style = torch.tensor([STYLES.index(row.style) if row.style in STYLES else -1 for row in rows], device=DEVICE)
    seen = torch.tensor([i for i, row in enumerate(rows) if not row.held_out], device=DEVICE)
    known = torch.tensor([i for i, row in enumerate(rows) if row.player and not row.held_out][::4], device=DEVICE)
    held_out = torch.tensor([i for i, row in enumerate(rows) if row.player and row.held_out], device=DEVICE)
    soft = reconstruct(AutoencoderKL.from_pretrained(AUTOENCODER / "export").to(DEVICE), pixels)
    tokenizer = new_tokenizer(rows)
    plain = token_ids(tokenizer, prompts).to(DEVICE)
    styled = torch.stack([token_ids(tokenizer, [style_prompt(p, s) for s in STYLES]) for p in prompts]).to(DEVICE)
    teacher = placed(Classifier(len(codes)))
    teacher.load_state_dict(load_file(CLASSIFIER / "seed-0" / "average.safetensors"))
    teacher.eval().requires_grad_(False)
    taught = F.normalize(teacher.concepts, dim=-1)
    judge = new_judge(tokenizer).to(DEVICE)
    training = TimedTraining(judge, FOLDER, minutes, lr=1e-3, ema=0.998, flat=0.3, weight_decay=0.05)

    # Drawings alone are compiled: how many prompts there are differs from step to step.
    @compiled
    def see(x: torch.Tensor) -> torch.Tensor:
        with autocast():
            return embed(judge.get_image_features(pixel_values=x))

    @compiled
    def teach(x: torch.Tensor) -> torch.Tensor:
        with autocast(), torch.no_grad():
            return teacher(x)

    def loss() -> torch.Tensor:
        i = seen[torch.randint(len(seen), (batch,), device=DEVICE)]
        x = torch.where(torch.rand(batch, 1, 1, 1, device=DEVICE) < 0.5, soft[i], pixels[i])
        half = batch // 2  # the second half is mixed: it has no name, only the teacher's embedding
        x = reshape(torch.cat([x[:half], mixed(x[half:])]))
        # New colours would hide the style.
        x = torch.cat([x[:half], recolour(x[half:])]).contiguous(memory_format=torch.channels_last)
        i = i[:half]
        among = torch.cat([concept[i], torch.randint(len(prompts), (64,), device=DEVICE)]).unique()
        drawn = (style[i] >= 0).nonzero()[:, 0]
        # A style is named beside another concept's prompt: which pairs exist must not be learnt by heart.
        beside = torch.randint(len(prompts), (len(drawn),), device=DEVICE)
        ids = torch.cat([plain[among], styled[beside].flatten(0, 1)])
        image, goal = see(x), teach(x)
        with autocast():
            text = embed(judge.get_text_features(input_ids=ids))
        scale = judge.logit_scale.exp().clamp(max=100)
        imitate = 1 - (content(image) * goal).sum(-1).mean()
        imitate = imitate + 1 - (content(text[: len(among)]) * taught[among]).sum(-1).mean()
        answer = torch.searchsorted(among, concept[i])
        what = F.cross_entropy(scale * image[:half] @ text[: len(among)].T, answer, label_smoothing=0.05)
        four = text[len(among) :].view(len(drawn), len(STYLES), -1)
        which = F.cross_entropy(scale * (four @ image[drawn][:, :, None]).squeeze(-1), style[i[drawn]])
        return 4 * imitate + 0.5 * what + 2 * which

    @torch.no_grad()
    def accuracy(model: CLIPModel, x: torch.Tensor, index: torch.Tensor) -> dict[str, float]:
        """R@1 and R@5 among the world's prompts, the share whose style is recognised among the four, and of both."""
        image = torch.cat([embed(model.get_image_features(pixel_values=x[part])) for part in index.split(128)])
        text = embed(model.get_text_features(input_ids=plain[:own]))
        four = embed(model.get_text_features(input_ids=styled[concept[index]].flatten(0, 1))).view(len(index), 4, -1)
        styles = (four @ image[:, :, None]).squeeze(-1).argmax(1) == style[index]
        both = styles & ((image @ text.T).argmax(1) == concept[index])
        shares = {"style_accuracy": styles, "both": both}
        return recall(image, text, concept[index]) | {
            name: round(float(right.float().mean()), 4) for name, right in shares.items()
        }

    def report(model: CLIPModel) -> dict[str, dict[str, float]]:
        model.eval()
        openmoji = held_out[style[held_out] == STYLES.index("openmoji")]
        return {
            "known": accuracy(model, pixels, known),
            "held_out": accuracy(model, pixels, held_out),
            "held_out_autoencoded": accuracy(model, soft, held_out),
            "held_out_openmoji": accuracy(model, pixels, openmoji),
            "held_out_openmoji_autoencoded": accuracy(model, soft, openmoji),
        }

    for step in training.run(loss):
        if step % 1000 == 0:
            print(f"  {report(training.average)}", flush=True)
    figures = report(training.average)
    (FOLDER / "figures.json").write_text(json.dumps(figures, indent=2))
    export = FOLDER / "export"
    training.average.half().save_pretrained(export)
    CLIPProcessor(new_processor(), tokenizer).save_pretrained(export)
    print(figures)


if __name__ == "__main__":
    run(main)
