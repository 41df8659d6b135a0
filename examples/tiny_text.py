"""A small text and a Llama pretrained on it, so that the example of sharded training runs in
seconds.

Words are numbers. In each dialect a word has one usual successor; a tenth of the words are random.
The model was pretrained on dialect 0; fine-tuning is on dialect 1. The best possible loss is 0.73.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gmixout_optim.bench.models.llama import Llama, LlamaConfig

WORDS, TOKENS = 64, 32


def text(dialect: int, number: int, rows: int) -> Tensor:
    """Batch ``number`` of a dialect, the same wherever it is made: (rows, TOKENS + 1) int64."""
    successors = torch.randperm(WORDS, generator=torch.Generator().manual_seed(dialect))
    generator = torch.Generator().manual_seed(1000 + number)
    words = torch.randint(WORDS, (rows, TOKENS + 1), generator=generator)
    usual = torch.rand(rows, TOKENS + 1, generator=generator) < 0.9
    for place in range(1, TOKENS + 1):
        words[:, place] = torch.where(
            usual[:, place], successors[words[:, place - 1]], words[:, place]
        )
    return words


def llama(width: int = 64, depth: int = 2) -> Llama:
    torch.manual_seed(0)
    return Llama(
        LlamaConfig(width, depth, heads=4, key_heads=2, hidden=2 * width, vocabulary=WORDS)
    )


def pretrained() -> Llama:
    """A Llama trained for a few seconds on dialect 0, the same in every process."""
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(60):
        words = text(0, step, 32)
        optimizer.zero_grad()
        model.loss(words[:, :-1], words[:, 1:]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model
