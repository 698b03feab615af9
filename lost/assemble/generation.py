"""Text from a prompt."""

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from lost.config.use import GenerateConfig
from lost.utils.errors import ConfigError


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: GenerateConfig,
    streamer: BaseStreamer | None = None,
) -> str:
    """The prompt and its continuation, special tokens left out.

    Args:
        streamer: gets the tokens of the prompt, then every new one.
    Raises:
        ConfigError: a prompt without a token, with tokens outside the vocabulary, or too long for max_new_tokens.
    """
    ids = prompt_ids(tokenizer, config.prompt)
    check_prompt(ids, model, config)
    input_ids = torch.tensor([ids], device=model.device)
    torch.manual_seed(config.seed)
    output = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=generation_settings(model, tokenizer, config),
        streamer=streamer,
    )
    text = tokenizer.decode(output[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


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
    """The keys of transformers; those of sampling only where it samples."""
    own = model.generation_config or GenerationConfig()
    eos = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
    first_eos = eos[0] if isinstance(eos, list) else eos
    sampling = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=config.do_sample,
        use_cache=config.use_cache,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos,
        pad_token_id=first_eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **(sampling if config.do_sample else {}),
    )
