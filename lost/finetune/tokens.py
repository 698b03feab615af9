"""What fine-tuning needs of any tokenizer: its identity, padding, the longest input, ids that the model has."""

import hashlib
import json
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lost.utils.errors import ConfigError, DataError

# Their position embedding begins after the padding's own place.
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm")
# Tokenizers without a limit of their own say 10^30.
NO_LIMIT = 10**9


def fingerprint_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides the ids of a text; cutting and padding, which the last call has set, are not of it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts = json.loads(backend.to_str()) if backend else {"vocabulary": tokenizer.get_vocab()}
    facts |= {"truncation": None, "padding": None, "special": tokenizer.special_tokens_map}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding's id, or EOS's: its places are masked.

    Raises:
        DataError: the tokenizer has neither.
    """
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if not isinstance(pad_id, int):
        raise DataError("the model's tokenizer has neither a padding nor an EOS token: set its pad_token")
    return pad_id


def longest_input(model_config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest text that the model takes."""
    text_config = model_config.get_text_config()
    longest = getattr(text_config, "max_position_embeddings", None) or NO_LIMIT
    if text_config.model_type in OFFSET_POSITIONS:
        longest -= (text_config.pad_token_id or 0) + 1
    limit = tokenizer.model_max_length
    return min(longest, limit) if limit and limit < NO_LIMIT else longest


def check_length(seq_len: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Refuses rows longer than the model's positions.

    Raises:
        ConfigError: says the longest length.
    """
    longest = longest_input(model.config, tokenizer)
    if seq_len > longest:
        raise ConfigError(f"train.seq_len = {seq_len} is above the {longest} tokens that {source} takes: lower it")


def check_ids(largest: int, vocab_size: int, source: str) -> None:
    """Refuses ids that the model's embedding does not have.

    Raises:
        DataError: the tokenizer is that of another vocabulary.
    """
    if largest >= vocab_size:
        raise DataError(
            f"the tokenizer of {source} gives token id {largest}, but the model's vocabulary ends at {vocab_size - 1}:"
            " it belongs to another model; put the model's own tokenizer files into the folder"
        )


class PairEncoder:
    """Texts, or pairs of texts, to ids with what the tokenizer puts around them, cut to seq_len.

    Where a tokenizer has nothing of its own between two texts, as those of language models, EOS stands there; around
    both what stands around a single text.

    Attributes:
        seq_len: longest result.
        num_cut: texts so far that lost their end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seq_len: int):
        self._tokenizer = tokenizer
        self.seq_len = seq_len
        extra = [tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True)]
        self._has_own_pairs = extra[1] > extra[0]
        self.num_cut = 0
        self._has_types = "token_type_ids" in tokenizer.model_input_names

    def encode(self, texts: list[str], pairs: list[str]) -> tuple[list[list[int]], list[list[int]]]:
        """(ids, token types) of each text; token types are empty where the model takes none."""
        if pairs and not self._has_own_pairs:
            return self._joined(texts, pairs), []
        encoded = self._tokenizer(texts, text_pair=pairs or None, truncation=True, max_length=self.seq_len)
        self.num_cut += sum(bool(one.overflowing) for one in encoded.encodings or [])
        return encoded["input_ids"], encoded["token_type_ids"] if self._has_types else []

    def _joined(self, texts: list[str], pairs: list[str]) -> list[list[int]]:
        separator = [self._tokenizer.eos_token_id] if isinstance(self._tokenizer.eos_token_id, int) else []
        before, after = around_single_text(self._tokenizer)
        room = self.seq_len - len(before) - len(separator) - len(after)
        first, second = (self._tokenizer(part, add_special_tokens=False)["input_ids"] for part in (texts, pairs))
        self.num_cut += sum(len(a) + len(b) > room for a, b in zip(first, second, strict=True))
        cuts = (shortened(a, b, room) for a, b in zip(first, second, strict=True))
        return [before + a + separator + b + after for a, b in cuts]


def around_single_text(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after a text, such as BOS and EOS."""
    bare, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    start = next(place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def shortened(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
    """The beginnings of two lists that fit into `room` together; the longer one is cut first."""
    half = room // 2
    kept = min(len(first), max(half, room - len(second)))
    return first[:kept], second[: room - kept]
