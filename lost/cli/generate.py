"""`lost generate`: continues a prompt, the prompts of a file, or a conversation; prints tokens as they come."""

import json
import sys
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase, TextStreamer

from lost.assemble.generation import Continuation, generate_all, is_streamed
from lost.assemble.load import Loaded, load_model
from lost.assemble.prompts import Messages, chat_prompt, prompts_of
from lost.checkpoint import write_text_atomically
from lost.cli.target import target_file
from lost.config.runtime import RuntimeConfig
from lost.config.section import to_dict
from lost.config.use import GenerateConfig
from lost.train.runtime import start_runtime
from lost.utils.logging import setup


def run(config: GenerateConfig) -> int:
    """Prints every prompt with its continuation to standard output, and writes them to `to`."""
    runtime = start_runtime(RuntimeConfig(**to_dict(config.runtime)))
    setup(runtime.is_main)
    target = target_file(config.to, "JSON lines file")
    loaded = load_model(config.source, runtime.device, runtime.param_dtype)
    with runtime.autocast():
        if config.is_conversation:
            converse(loaded, config)
        else:
            found = continue_prompts(loaded, config, is_shown=runtime.is_main)
            if target and runtime.is_main:
                target.parent.mkdir(parents=True, exist_ok=True)
                write_text_atomically(target, "".join(as_line(entry) for entry in found))
    return 0


def continue_prompts(loaded: Loaded, config: GenerateConfig, *, is_shown: bool) -> list[Continuation]:
    """Continues and prints all prompts."""
    prompts = prompts_of(config, loaded.tokenizer)

    def streamer_of(number: int) -> TextStreamer | None:
        if not is_shown:
            return None
        print_head(number, len(prompts))
        return streamer(loaded.tokenizer, skip_prompt=prompts[number].is_chat)

    found = []
    for entry in generate_all(loaded.model, loaded.tokenizer, prompts, config, streamer_of):
        if is_shown and not is_streamed(config):
            print_head(len(found), len(prompts))
            print("\n---\n".join(entry.texts))
        found.append(entry)
    return found


def converse(loaded: Loaded, config: GenerateConfig) -> None:
    """Answers every line of standard input, which the conversation goes on with, until its end.

    Raises:
        ConfigError: there is no chat template, or the conversation has become too long for the model.
    """
    messages: Messages = []
    # Before the first line is awaited: whether the tokenizer knows a chat at all.
    chat_prompt([{"role": "user", "content": "?"}], config, loaded.tokenizer)
    for line in user_lines():
        messages.append({"role": "user", "content": line})
        prompt = chat_prompt(messages, config, loaded.tokenizer)
        answers = generate_all(
            loaded.model,
            loaded.tokenizer,
            [prompt],
            config,
            lambda _: streamer(loaded.tokenizer, skip_prompt=True),
        )
        (answer,) = answers
        if not is_streamed(config):
            print(answer.completions[0])
        messages.append({"role": "assistant", "content": answer.completions[0]})


def user_lines() -> Iterator[str]:
    """What the user says, line by line; a mark asks for it on a terminal."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def streamer(tokenizer: PreTrainedTokenizerBase, *, skip_prompt: bool) -> TextStreamer:
    """Prints tokens as they come."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return TextStreamer(tokenizer, skip_prompt=skip_prompt, **options)  # pyright: ignore[reportArgumentType]


def print_head(number: int, count: int) -> None:
    """Which of several prompts comes."""
    if count > 1:
        print(f"--- prompt {number + 1} of {count}")


def as_line(entry: Continuation) -> str:
    return json.dumps({"prompt": entry.prompt, "completions": entry.completions}, ensure_ascii=False) + "\n"
