"""Text from prompts. Shape letters: n sequences, T tokens of the longest prompt."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from lost.assemble.prompts import Prompt
from lost.config.use import GenerateConfig
from lost.model.cache import roomy_cache
from lost.utils.errors import ConfigError


@dataclass(frozen=True)
class Continuation:
    """What came after a prompt, one text for each of num_return_sequences; special tokens are left out.

    Attributes:
        prompt: the prompt as it was given.
        completions: what was added to it.
        texts: the prompt and what was added; of a chat only the answers.
    """

    prompt: str
    completions: list[str]
    texts: list[str]


def generate_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: GenerateConfig,
    streamer_of: Callable[[int], BaseStreamer | None] = lambda _: None,
) -> Iterator[Continuation]:
    """The continuation of every prompt in order, micro_batch_size of them together.

    Args:
        streamer_of: what gets the tokens of the prompt of this number as they come; asked only where one sequence is
            generated at a time.
    Raises:
        ConfigError: a prompt with tokens outside the vocabulary, or too long for max_new_tokens, before the first one
            is continued.
    """
    for prompt in prompts:
        check_prompt(prompt.ids, model, config)
    torch.manual_seed(config.seed)
    numbered = iter(enumerate(prompts))
    while batch := list(itertools.islice(numbered, config.micro_batch_size)):
        streamer = streamer_of(batch[0][0]) if is_streamed(config) else None
        yield from continue_batch(model, tokenizer, [prompt for _, prompt in batch], config, streamer)


def is_streamed(config: GenerateConfig) -> bool:
    """Whether one sequence grows at a time, so that its tokens can be shown as they come."""
    return config.micro_batch_size == config.num_beams == config.num_return_sequences == 1


def continue_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: GenerateConfig,
    streamer: BaseStreamer | None,
) -> list[Continuation]:
    """The continuations of prompts that are generated together."""
    settings = generation_settings(model, tokenizer, config)
    pad_id = 0 if settings.pad_token_id is None else settings.pad_token_id
    input_ids, attention_mask = padded_left([prompt.ids for prompt in prompts], pad_id)
    cache = roomy_cache(model) if config.use_cache else None
    with torch.no_grad():
        output: Tensor = model.generate(  # pyright: ignore[reportCallIssue, reportAssignmentType]
            input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=settings,
            past_key_values=cache,
            streamer=streamer,
            # stop_strings need it, the model's own too.
            tokenizer=tokenizer,
        )
    new_ids = output[:, input_ids.shape[1] :].view(len(prompts), config.num_return_sequences, -1).tolist()
    return [continuation(tokenizer, prompt, rows) for prompt, rows in zip(prompts, new_ids, strict=True)]


def padded_left(rows: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, int64 [n, T]: prompts end together, so that all are continued at one place."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, new_ids: list[list[int]]) -> Continuation:
    """The texts of one prompt; decoded with the prompt, because a first word may lose its blank alone."""
    start = decoded(tokenizer, prompt.ids)
    wholes = [decoded(tokenizer, prompt.ids + ids) for ids in new_ids]
    completions = [
        whole.removeprefix(start) if whole.startswith(start) else decoded(tokenizer, ids)
        for whole, ids in zip(wholes, new_ids, strict=True)
    ]
    if prompt.is_chat:
        # Where a template's prompt ends in "assistant:", the blank behind it comes with the answer.
        completions = wholes = [text.removeprefix(" ") for text in completions]
    return Continuation(prompt.shown, completions, wholes)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def check_prompt(ids: list[int], model: PreTrainedModel, config: GenerateConfig) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and len(ids) + config.max_new_tokens > longest:
        room = longest - config.max_new_tokens
        fix = f"shorten the prompt to {room} tokens, or lower" if room > 0 else "lower"
        raise ConfigError(
            f"the prompt's {len(ids)} tokens + max_new_tokens = {config.max_new_tokens} are above the model's"
            f" max_position_embeddings = {longest}: {fix} max_new_tokens"
        )
    vocab_size = model.config.get_text_config().vocab_size
    if max(ids) >= vocab_size:
        raise ConfigError(f"the prompt has token id {max(ids)}, the model's vocabulary ends at {vocab_size - 1}")


def generation_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: GenerateConfig
) -> GenerationConfig:
    """The keys of transformers, those of sampling only where it samples. All are given: transformers takes what is
    left out from the model's own settings, which may sample otherwise than asked for."""
    own = model.generation_config or GenerationConfig()
    eos = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
    first_eos = eos[0] if isinstance(eos, list) else eos
    names = ("temperature", "top_k", "top_p", "min_p", "typical_p")
    sampling = {name: getattr(config, name) for name in names if config.do_sample}
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        do_sample=config.do_sample,
        num_beams=config.num_beams,
        num_return_sequences=config.num_return_sequences,
        repetition_penalty=config.repetition_penalty,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        stop_strings=config.stop_strings or None,
        use_cache=config.use_cache,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos,
        pad_token_id=first_eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **sampling,
    )
