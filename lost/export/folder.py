"""Writes a model as a Hugging Face folder that is whole or not there."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lost.export.card import CardFacts, model_card
from lost.utils.errors import LostError
from lost.utils.files import flush
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
    more_files: Mapping[str, str] | None = None,
) -> Path:
    """`save_final` with the text of the card given.

    Args:
        max_shard_size: largest safetensors file, as transformers takes it; more weights make more files and an index.
        more_files: texts of further files by name.
    """
    folder = Path(folder).absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    replaced = folder.with_name(f".{folder.name}.replaced")
    # Left behind by a process that was killed while saving.
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        # A classifier writes no text.
        if model.can_generate():
            model.generation_config = generation_config(model, tokenizer)
        with quiet_libraries():
            model.save_pretrained(partial, max_shard_size=max_shard_size)
            tokenizer.save_pretrained(partial)
        for name, text in {**(more_files or {}), "README.md": card}.items():
            (partial / name).write_text(text, encoding="utf-8")
        flush_to_disk(partial)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        raise LostError(f"{folder} could not be written: {error}. Check the free space and the permissions") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
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


def flush_to_disk(folder: Path) -> None:
    """Makes every file of the folder survive a loss of power."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)
