"""What the examples read: a prompt, and windows of the help texts that every Python has."""

from pydoc_data.topics import topics

import torch
from transformers import PreTrainedTokenizerBase

Tokenizer = PreTrainedTokenizerBase


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> torch.Tensor:
    """Token ids [1, L] of what a user says, in the form that a chat model knows."""
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids: torch.Tensor = tokenizer(prompt, return_tensors="pt").input_ids
    return ids


def windows(
    tokenizer: Tokenizer, held_out: int, calibration: int, length: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """([held_out, length], [calibration, length]) token ids out of the help texts of every Python.

    Both are spread evenly over the texts, and have no window in common. The texts differ between Python
    versions: compare only what one run prints.
    """
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    every = ids[: len(ids) // length * length].view(-1, length)
    test = _spread(len(every), held_out)
    rest = torch.tensor(sorted(set(range(len(every))) - set(test.tolist())))
    return every[test], every[rest[_spread(len(rest), calibration)]]


def _spread(length: int, count: int) -> torch.Tensor:
    return torch.linspace(0, length - 1, min(count, length)).long()
