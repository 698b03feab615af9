"""The tokenizer of a run: trained on its documents, from a folder, or from the hub."""

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lost.utils.errors import DataError, first_line
from lost.utils.hub import require_hub_for_tokenizer

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
TOKENIZER_NAME = "tokenizer.json"
_NUM_BYTES = 256
# Text that the BPE trainer sees at most: so much a token, with which the ids of Python source are 1 % more than with
# three times as much; and so much in all, with which its word counts stay below 400 MB.
_SAMPLE_BYTES_A_TOKEN = 1 << 10
_MAX_SAMPLE_BYTES = 64 << 20


class Encoder:
    """Text to token ids, with nothing added: the row makers append EOS themselves.

    Works on a copy of the tokenizer, so that truncation or padding set on it by others change nothing here, and text
    that spells a special token ("<|endoftext|>") is encoded as plain text.

    Args:
        tokenizer: a transformers tokenizer with an EOS token, or a TrainedTokenizer.
        label: what messages call it.
    Raises:
        DataError: no EOS token, or no fast tokenizer.
    """

    def __init__(self, tokenizer: Any, label: str):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(f"tokenizer {label} has no fast version (tokenizer.json): use one that has, or train")
        if tokenizer.eos_token_id is None:
            raise DataError(f"tokenizer {label} has no EOS token, which ends every document: set its eos_token")
        self._tokenizer = _plain(backend.to_str())
        self.label = label
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.max_id = max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        facts = f"{self._tokenizer.to_str()} {self.eos_id} {self.pad_id}"
        self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()

    @property
    def dtype(self) -> np.dtype:
        """The narrowest integers that hold every id."""
        return np.dtype(np.uint16 if max(self.max_id, self.pad_id) < 1 << 16 else np.uint32)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, arrays of `dtype`."""
        encodings, dtype = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False), self.dtype
        return [np.array(encoding.ids, dtype=dtype) for encoding in encodings]

    def __getstate__(self) -> dict:
        # Pickling the library's tokenizer would forget encode_special_tokens.
        return self.__dict__ | {"_tokenizer": self._tokenizer.to_str()}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state | {"_tokenizer": _plain(state["_tokenizer"])}


class TrainedTokenizer:
    """What an Encoder needs of a tokenizer that `train_tokenizer` wrote, without loading transformers.

    Args:
        folder: the tokenizer's.
    """

    def __init__(self, folder: Path):
        self.backend_tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_NAME))
        self.eos_token_id = self.backend_tokenizer.token_to_id(END_OF_TEXT)
        self.pad_token_id = self.backend_tokenizer.token_to_id(PADDING)


def _plain(serialised: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(serialised)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    # Only adds special tokens, which `encode` never does. transformers sets one of its own when it loads a tokenizer:
    # with always the same one the fingerprint does not depend on who loaded it.
    tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    return tokenizer


def sample_bytes(vocab_size: int) -> int:
    """Bytes of text that a tokenizer of this size is trained on."""
    return min(_MAX_SAMPLE_BYTES, vocab_size * _SAMPLE_BYTES_A_TOKEN)


def check_vocabulary(max_id: int, vocab_size: int, label: str) -> None:
    """Refuses ids that the model's embedding does not have; the tokenizer's own length does not matter.

    Raises:
        DataError: an id of vocab_size or above was seen.
    """
    if max_id >= vocab_size:
        raise DataError(
            f"tokenizer {label} gives token id {max_id}, but model.vocab_size = {vocab_size}: ids must be below it."
            f" Take the model's own tokenizer, or for a new model set model.vocab_size to {max_id + 1} or more"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Trains a byte-level BPE and writes it to `folder` as a transformers tokenizer with EOS and padding.

    Deterministic. A text too small for `vocab_size` tokens gives a smaller vocabulary.

    Raises:
        DataError: vocab_size below what bytes and special tokens need.
    """
    specials = [END_OF_TEXT, PADDING]
    if vocab_size < _NUM_BYTES + len(specials):
        raise DataError(
            f"model.vocab_size = {vocab_size}: a trained tokenizer needs at least {_NUM_BYTES + len(specials)} tokens"
            " (every byte, EOS and padding): raise it"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": PADDING,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=2) + "\n")
    tokenizer.save(str(folder / TOKENIZER_NAME))


def load_tokenizer(name: str, instead: str = "") -> Any:
    """The transformers tokenizer of a folder or a hub id; the local hub cache first, then the hub if it answers.

    Args:
        name: folder or hub id.
        instead: what else the user can do where the hub is out of reach.
    Raises:
        DataError: a folder without a tokenizer, an unknown id, an unreachable hub.
    """
    # Takes seconds to load; `lost prepare` with a tokenizer of its own has no need of it.
    from transformers import AutoTokenizer

    if Path(name).expanduser().exists():
        try:
            return AutoTokenizer.from_pretrained(str(Path(name).expanduser()), local_files_only=True)
        except (OSError, ValueError) as error:
            raise DataError(
                f"data.tokenizer = {name}: no tokenizer can be loaded from this folder ({first_line(error)}):"
                " it needs tokenizer.json and tokenizer_config.json"
            ) from error
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        logger.info("tokenizer %s is not in the local cache, asking the hub", name)
    require_hub_for_tokenizer(name, instead)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.tokenizer = {name}: neither a folder nor a tokenizer on the hub ({first_line(error)}):"
            " use train, a folder or a hub id"
        ) from error
