"""A faster way to the same token ids, for ASCII text and byte-level BPE, on machines with few cores.

`tokenizers` spends nearly all of its time on cutting text into words, about 3 us a word. Python's `re` does that in a
third of the time, and a word's ids, once known, are a dictionary look-up. Other text goes the usual way: which
characters are letters then depends on Unicode tables, and two libraries' tables may differ.
"""

import json
import os
import re
from itertools import chain

from tokenizers import Tokenizer

# GPT-2's word pattern, which pre_tokenizers.ByteLevel uses, for text in which every letter is ASCII.
_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", flags=re.ASCII)
# Words remembered, about 200 bytes each.
_MAX_WORDS = 500_000
# From this many cores on, the threads of `tokenizers` are faster than one thread here: 3.0 against 1.1 MB/s a core
# (stdlib, one core of a 2-core x86 machine, tokenizers 0.23).
_MANY_CORES = 4


class AsciiWords:
    """Token ids of ASCII text, word by word.

    Args:
        tokenizer: one for which `fits` is true.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}

    @staticmethod
    def fits(tokenizer: Tokenizer) -> bool:
        """Whether words of this tokenizer are those of the pattern, and independent of each other."""
        facts = json.loads(tokenizer.to_str())
        words = facts["pre_tokenizer"] or {}
        return (
            facts["normalizer"] is None
            and words.get("type") == "ByteLevel"
            and words.get("use_regex") is True
            and words.get("add_prefix_space") is False
            and facts["model"]["type"] == "BPE"
            and not facts["model"].get("dropout")
            and all(token["special"] for token in facts["added_tokens"])
        )

    def encode(self, text: str) -> list[int]:
        """The ids of an ASCII text."""
        words = _WORD.findall(text)
        unknown = list(set(words).difference(self._ids))
        if unknown:
            if len(self._ids) > _MAX_WORDS:
                self._ids.clear()
                unknown = list(set(words))
            encodings = self._tokenizer.encode_batch_fast(unknown, add_special_tokens=False)
            self._ids.update((word, encoding.ids) for word, encoding in zip(unknown, encodings, strict=True))
        return list(chain.from_iterable(map(self._ids.__getitem__, words)))


def has_few_cores() -> bool:
    """Whether one thread here beats the threads of `tokenizers`."""
    threads = os.environ.get("RAYON_NUM_THREADS", "")
    cores = int(threads) if threads.isdecimal() and int(threads) else (os.cpu_count() or 1)
    return cores < _MANY_CORES
