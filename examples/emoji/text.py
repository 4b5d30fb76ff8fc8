"""The small world's text side, shared by base and judge: a word-level CLIP tokenizer and a tiny text encoder."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from examples.emoji.world import STYLES, Picture

LENGTH = 16
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,-"


def style_prompt(prompt: str, style: str) -> str:
    """Ask for a concept in a style by name."""
    return f"{prompt}, {style.split('-')[0]} style"


def new_tokenizer(rows: list[Picture]) -> CLIPTokenizer:
    """Byte-pair encoding trained to completion on the world's words, so that each word is one token."""
    prompts = sorted({row.prompt for row in rows})
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        end_of_word_suffix="</w>",
        show_progress=False,
        initial_alphabet=list(LETTERS),
    )
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    bpe.train_from_iterator([*prompts, *(style_prompt("a", style) for style in STYLES)], trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in model["merges"]]
    pieces = {*model["vocab"], *LETTERS, *(letter + "</w>" for letter in LETTERS)}
    vocab = {piece: i for i, piece in enumerate(sorted(pieces))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def text_config(tokenizer: CLIPTokenizer, width: int = 192) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(text_config(tokenizer))


def token_ids(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """int64 [N, LENGTH]"""
    return tokenizer(prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids
