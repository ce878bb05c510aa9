"""Word-level tokenizer of the demo model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

PAD, UNK = "<pad>", "<unk>"
_WORD = re.compile(r"[a-z0-9]+")


class WordTokenizer:
    """Maps lower-cased words to ids; words outside the vocabulary become ``<unk>``.

    Args:
        words: the vocabulary in id order; it starts with ``<pad>`` (id 0) and ``<unk>`` (id 1).
        length: tokens per prompt; longer prompts are cut, shorter ones padded.

    Raises:
        ValueError: the vocabulary does not start with the two special tokens.
    """

    def __init__(self, words: list[str], length: int) -> None:
        if words[:2] != [PAD, UNK]:
            raise ValueError(f"words: starts with {words[:2]}, not {[PAD, UNK]}; use the vocab.json as exported")
        self.words = list(words)
        self.length = length
        self._ids = {word: index for index, word in enumerate(words)}

    @classmethod
    def load(cls, path: str | Path) -> WordTokenizer:
        """Read ``vocab.json`` (keys ``words`` and ``length``)."""
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(data["words"], data["length"])

    def save(self, path: str | Path) -> None:
        """Write ``vocab.json``."""
        data = {"length": self.length, "words": self.words}
        Path(path).write_text(json.dumps(data, indent=0) + "\n", encoding="utf-8")

    @staticmethod
    def split(prompt: str) -> list[str]:
        """Lower-cased words of a prompt; punctuation separates words."""
        return _WORD.findall(prompt.lower())

    def unknown(self, prompt: str) -> list[str]:
        """Words of the prompt that the model has never seen, in order, each once."""
        return list(dict.fromkeys(word for word in self.split(prompt) if word not in self._ids))

    def __call__(self, prompts: list[str]) -> torch.Tensor:
        """Token ids, int64 [B, length]; the empty prompt is all padding."""
        ids = torch.zeros(len(prompts), self.length, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            for column, word in enumerate(self.split(prompt)[: self.length]):
                ids[row, column] = self._ids.get(word, 1)
        return ids
