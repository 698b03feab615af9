"""task=instruction: conversations to rows in which only the answers have a loss. N rows, T tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from lost.config.finetune import FinetuneConfig, FinetuneDataConfig
from lost.data.cache import key_of, made_once
from lost.data.rows import NO_LOSS
from lost.finetune.records import Record, field_of, files_of, hash_of_files, is_held_out, read_records
from lost.finetune.rows import ConversationRows, is_whole, read_facts, write_facts
from lost.finetune.tokens import fingerprint_of, pad_id_of
from lost.utils.errors import ConfigError, DataError
from lost.utils.files import cache_folder
from lost.utils.logging import get_logger

log = get_logger(__name__)

# For tokenizers without a chat template: names of roles as plain text, EOS after every answer. The blank before an
# answer is the answer's: tokenizers make one token of it and the first word.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'assistant: ' + message['content'] + eos_token + '\\n' }}"
    "{% else %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
ANSWERING_ROLE = "assistant"


@dataclass(frozen=True)
class Conversation:
    """Tokens of one conversation and which of them are answers; both [T]."""

    ids: np.ndarray
    is_answer: np.ndarray


@dataclass(frozen=True)
class ConversationData:
    """An instruction task as rows; see LabelledData."""

    train: ConversationRows
    validation: ConversationRows
    largest_id: int
    fingerprint: str


def prepare_conversations(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase) -> ConversationData:
    """Rows of both sets, from the cache where they are there; several processes may call this at once.

    Raises:
        ConfigError: a chat template that cannot be read.
        DataError: what cannot be read, or no answer in a whole set; names file and line.
    """
    data, seq_len = config.data, config.train.seq_len
    set_template(tokenizer, data.chat_template)
    keys = ("train_files", "validation_files")
    files = {key: files_of(getattr(data, key), f"data.{key}") for key in keys}
    key = key_of(
        files={name: hash_of_files(paths) for name, paths in files.items()},
        settings=[data.validation_fraction, data.messages_field, data.row_maker, seq_len],
        tokenizer=[fingerprint_of(tokenizer), str(tokenizer.chat_template)],
        rows=["conversations", 1],
    )
    folder = cache_folder(data.cache_dir) / "examples" / key
    made_once(folder, is_whole, lambda target: write_rows(target, data, files, tokenizer, seq_len))
    facts = read_facts(folder)
    for name, counts in facts["sets"].items():
        if counts["cut"] or counts["dropped"]:
            log.warning(
                "%s: %d of %d conversations were longer than train.seq_len = %d and cut, %d had no answer left",
                *(name, counts["cut"], counts["conversations"], seq_len, counts["dropped"]),
            )
    train, validation = (ConversationRows(folder, name, facts) for name in ("train", "validation"))
    return ConversationData(train, validation, facts["largest_id"], key)


def set_template(tokenizer: PreTrainedTokenizerBase, file: str) -> None:
    """Gives the tokenizer the template that the settings name, or a plain one where it has none; it is saved with it.

    Raises:
        ConfigError: the file cannot be read.
    """
    if file:
        try:
            tokenizer.chat_template = Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.chat_template = {file} cannot be read: {error}") from error
    elif not tokenizer.chat_template:
        log.info("The tokenizer has no chat template: a plain one is used ('user: ...', 'assistant: ...')")
        tokenizer.chat_template = PLAIN_TEMPLATE


def write_rows(
    folder: Path,
    data: FinetuneDataConfig,
    files: dict[str, list[Path]],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
) -> None:
    """Tokenises both sets into `folder`."""
    sets: dict[str, list[Conversation]] = {"train": [], "validation": []}
    for place, record in read_records(files["train_files"], "data.train_files"):
        is_out = not data.validation_files and is_held_out(record, data.validation_fraction)
        sets["validation" if is_out else "train"].append(conversation_of(record, place, data, tokenizer))
    if data.validation_files:
        records = read_records(files["validation_files"], "data.validation_files")
        sets["validation"] = [conversation_of(record, place, data, tokenizer) for place, record in records]
    counts, largest = {}, 0
    for name, conversations in sets.items():
        kept = [cut(conversation, seq_len) for conversation in conversations]
        # The first token of a conversation is never predicted.
        kept = [conversation for conversation in kept if conversation.is_answer[1:].any()]
        if not conversations:
            raise DataError(
                f"the {name} set has no conversation: give more to train on, or set data.validation_files or"
                " validation_fraction"
            )
        if not kept:
            raise DataError(
                f"the {name} set has no answer within {seq_len} tokens ({len(conversations)} conversations): raise"
                " train.seq_len, give it more, or set data.validation_files or validation_fraction"
            )
        rows = rows_of(kept, seq_len, pad_id_of(tokenizer), is_packed=data.row_maker == "packed")
        for kind, values in rows.items():
            np.save(folder / f"{name}_{kind}.npy", values)
        largest = max(largest, int(rows["tokens"].max()))
        counts[name] = {
            "rows": len(rows["tokens"]),
            "tokens": sum(len(conversation.ids) for conversation in kept),
            "conversations": len(conversations),
            "cut": sum(len(conversation.ids) > seq_len for conversation in conversations),
            "dropped": len(conversations) - len(kept),
        }
    write_facts(folder, {"sets": counts, "seq_len": seq_len, "largest_id": largest})


def conversation_of(
    record: Record, place: str, data: FinetuneDataConfig, tokenizer: PreTrainedTokenizerBase
) -> Conversation:
    """Tokens of a record's messages; the answers are what the template makes of the assistant's messages.

    Raises:
        DataError: messages that are none, or that the template refuses; names the line.
    """
    messages = messages_of(record, place, data.messages_field)
    try:
        text, spans = rendered(messages, tokenizer)
    except TemplateSyntaxError as error:
        name = data.chat_template or "the tokenizer's chat template"
        raise ConfigError(f"data.chat_template: {name} is no Jinja template, line {error.lineno}: {error}") from error
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise DataError(f"{place}: the chat template refuses these messages: {error}") from error
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.array(encoded["input_ids"], dtype=np.int32)
    is_answer = np.zeros(len(ids), dtype=bool)
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    for start, end in spans:
        # A token that begins before an answer is given to the model.
        is_answer |= (offsets[:, 0] >= start) & (offsets[:, 0] < end) & (offsets[:, 1] > offsets[:, 0])
    if not is_answer.any() and any(message["content"].strip() for message in answers_of(messages)):
        raise DataError(
            f"{place}: the chat template writes nothing of what the {ANSWERING_ROLE} says: give another one by"
            " data.chat_template"
        )
    return Conversation(ids, is_answer)


def messages_of(record: Record, place: str, messages_field: str) -> list[dict[str, Any]]:
    """The list of messages of a record, checked."""
    messages = field_of(record, messages_field, "data.messages_field", place)
    is_list = isinstance(messages, list) and bool(messages)
    for message in messages if is_list else [None]:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(
                f"{place}: '{messages_field}' must be a list of messages such as"
                ' {"role": "user", "content": "..."} with text in both'
            )
    if not answers_of(messages):
        raise DataError(f"{place}: no message of the role {ANSWERING_ROLE}: there is no answer to learn")
    return messages


def answers_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message for message in messages if message["role"] == ANSWERING_ROLE]


def rendered(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """(the conversation as text, places of the answers in it).

    An answer is what the text with it has more than the prompt before it: everything up to where the assistant starts
    is given, the words that end its turn are learned.

    Raises:
        ValueError: the template writes the beginning of a conversation in another way once it goes on.
    """

    def text_of(count: int, *, has_prompt: bool) -> str:
        text = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=has_prompt)
        assert isinstance(text, str)
        return text

    whole, spans = text_of(len(messages), has_prompt=False), []
    for number, message in enumerate(messages):
        if message["role"] != ANSWERING_ROLE:
            continue
        before = text_of(number, has_prompt=True) if number else ""
        after = text_of(number + 1, has_prompt=False)
        if not (after.startswith(before) and whole.startswith(after)):
            raise ValueError(
                "it writes what came before an answer in another way once the answer is there, so that its place is"
                " not known; give another one by data.chat_template"
            )
        spans.append((len(before), len(after)))
    return whole, spans


def cut(conversation: Conversation, seq_len: int) -> Conversation:
    return Conversation(conversation.ids[:seq_len], conversation.is_answer[:seq_len])


def rows_of(conversations: list[Conversation], seq_len: int, pad_id: int, *, is_packed: bool) -> dict[str, np.ndarray]:
    """Rows of whole conversations: tokens and labels int32 [N, T], starts bool [N, T].

    Padding is a conversation of its own, without loss.
    """
    rows = list(packed(conversations, seq_len)) if is_packed else [[conversation] for conversation in conversations]
    tokens = np.full((len(rows), seq_len), pad_id, dtype=np.int32)
    labels = np.full((len(rows), seq_len), NO_LOSS, dtype=np.int32)
    starts = np.zeros((len(rows), seq_len), dtype=bool)
    for number, row in enumerate(rows):
        place = 0
        for conversation in row:
            end = place + len(conversation.ids)
            tokens[number, place:end] = conversation.ids
            labels[number, place:end] = np.where(conversation.is_answer, conversation.ids, NO_LOSS)
            starts[number, place] = True
            place = end
        starts[number, place : place + 1] = True
    return {"tokens": tokens, "labels": labels, "starts": starts}


def packed(conversations: list[Conversation], seq_len: int) -> Iterator[list[Conversation]]:
    """Conversations in rows of at most seq_len tokens: the longest first, each into the fullest row that has room."""
    rows: list[list[Conversation]] = []
    # Rows by the room that they have left.
    by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
    for conversation in sorted(conversations, key=lambda one: -len(one.ids)):
        size = len(conversation.ids)
        room = next((room for room in range(size, seq_len + 1) if by_room[room]), None)
        if room is None:
            rows.append([])
            room, row = seq_len, len(rows) - 1
        else:
            row = by_room[room].pop()
        rows[row].append(conversation)
        by_room[room - size].append(row)
    yield from rows
