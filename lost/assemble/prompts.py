"""What `lost generate` continues: prompts from the command line, from a file, or in the form of a chat."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lost.config.use import GenerateConfig
from lost.utils.errors import ConfigError, DataError

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Prompt:
    """A text to continue.

    Attributes:
        shown: the prompt as it was given.
        ids: its tokens, as the model gets them.
        is_chat: whether the chat template stands around it, so that only the answer is of interest.
    """

    shown: str
    ids: list[int] = field(repr=False)
    is_chat: bool = False


def prompts_of(config: GenerateConfig, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The prompts of the command line or of prompt_file, in their order.

    Raises:
        DataError: prompt_file cannot be read, is empty or has a wrong line.
        ConfigError: a chat without a chat template, or a prompt without a token.
    """
    if not config.prompt_file:
        return [plain_or_chat(config.prompt, config, tokenizer)]
    path = Path(config.prompt_file).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompt_file = {config.prompt_file} cannot be read: {error}") from error
    if not text.strip():
        raise DataError(f"prompt_file = {config.prompt_file} is empty: give a prompt in it")
    if path.suffix != ".jsonl":
        # An editor's last line end is not part of the prompt.
        return [plain_or_chat(text.removesuffix("\n"), config, tokenizer)]
    # Not splitlines, which ends a line at signs that JSON may hold as they are, such as U+2028.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [prompt_of_line(line, f"{config.prompt_file}, line {number}", config, tokenizer) for number, line in lines]


def prompt_of_line(line: str, place: str, config: GenerateConfig, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The prompt of one line of a .jsonl file."""
    try:
        content = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: no JSON ({error})") from error
    if isinstance(content, dict) and isinstance(content.get("prompt"), str) and "messages" not in content:
        return plain_or_chat(content["prompt"], config, tokenizer)
    if isinstance(content, dict) and are_messages(content.get("messages")) and "prompt" not in content:
        return chat_prompt(content["messages"], config, tokenizer)
    raise DataError(
        f'{place}: must be {{"prompt": "..."}} or {{"messages": [{{"role": "user", "content": "..."}}, ...]}}'
    )


def are_messages(value: Any) -> bool:
    def is_message(entry: Any) -> bool:
        return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("role", "content"))

    return isinstance(value, list) and bool(value) and all(is_message(entry) for entry in value)


def plain_or_chat(text: str, config: GenerateConfig, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    if config.chat:
        return chat_prompt([{"role": "user", "content": text}], config, tokenizer)
    return Prompt(text, prompt_ids(tokenizer, text))


def chat_prompt(messages: Messages, config: GenerateConfig, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The messages in the tokenizer's chat template, up to where the answer begins.

    Raises:
        ConfigError: the tokenizer has no chat template, or its template refuses these messages.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "the model's tokenizer has no chat template, so that it knows no chat: give a plain prompt, or fine-tune"
            " the model on conversations first"
        )
    if config.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": config.system}, *messages]
    try:
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError) as error:
        raise ConfigError(f"the chat template refuses these messages: {error}") from error
    return Prompt(messages[-1]["content"], tokenizer(text, add_special_tokens=False).input_ids, is_chat=True)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids that the model continues: what the tokenizer puts in front stays, an EOS that it appends does not.

    An empty prompt is BOS, or EOS where there is none: what stands before a document in training.
    """
    ids: list[int] = tokenizer(prompt).input_ids
    if ids != tokenizer(prompt, add_special_tokens=False).input_ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    if ids:
        return ids
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if not isinstance(start, int):
        raise ConfigError("prompt is empty and the tokenizer has neither BOS nor EOS to start from: give a prompt")
    return [start]
