"""Writes a model as a Hugging Face folder that is whole or not there."""

from collections.abc import Mapping
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lost.export.card import CardFacts, model_card
from lost.export.forms import forget_code
from lost.utils.files import appearing
from lost.utils.quiet import quiet_libraries


def save_final(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, facts: CardFacts
) -> Path:
    """Writes config.json, model.safetensors, tokenizer, generation_config.json and README.md (the model card).

    The folder appears in one rename once everything is on disk; an older one of that name is replaced.

    Args:
        model: the plain model (not wrapped for training); its weights are written bit for bit.
        folder: where to; its parent is made if there is none.
    Returns:
        The folder.
    Raises:
        LostError: it could not be written; an older folder is then still there.
    """
    # Trained from the start on this tokenizer's ids, whatever its config says.
    config = model.generation_config
    if config is not None:
        config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return save_folder(model, tokenizer, folder, model_card(model.config, facts))


def save_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    card: str,
    *,
    max_shard_size: str = "50GB",
    more_files: Mapping[str, bytes] | None = None,
) -> Path:
    """`save_final` with the text of the card given.

    Args:
        max_shard_size: largest safetensors file, as transformers takes it; more weights make more files and an index.
        more_files: contents of further files by name.
    """
    folder = Path(folder).absolute()
    files = {**(more_files or {}), "README.md": card.encode()}
    if not any(name.endswith(".py") for name in files):
        forget_code(model.config)
    with appearing(folder, replaces=True) as partial:
        # A classifier writes no text.
        if model.can_generate():
            model.generation_config = generation_config(model, tokenizer)
        with quiet_libraries():
            model.save_pretrained(partial, max_shard_size=max_shard_size)
            tokenizer.save_pretrained(partial)
        for name, content in files.items():
            (partial / name).write_bytes(content)
    return folder


def generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The model's own, with the tokenizer's ids where it has none: `generate` then stops where a document ends.

    An instruction model stops at more ids than its tokenizer's one.
    """
    config = model.generation_config or GenerationConfig()
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": pad}
    for name, value in ids.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    return config
