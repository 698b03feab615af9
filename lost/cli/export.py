"""`lost export`: writes a model as a Hugging Face folder that other programs load."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from lost.assemble.facts import card_facts
from lost.assemble.load import Loaded, config_of_checkpoint, load_model
from lost.checkpoint.io import read_json
from lost.config.schema import ExportConfig
from lost.export import model_card, save_folder
from lost.model import LostLlamaForCausalLM
from lost.utils.errors import ConfigError
from lost.utils.logging import setup

DTYPES = {"source": None, "fp32": torch.float32, "bf16": torch.bfloat16}


def run(config: ExportConfig) -> int:
    """Loads, writes, and says how to load what was written."""
    setup()
    target = Path(config.to).expanduser()
    refuse_used_folder(target)
    loaded = load_model(config.source, "cpu", DTYPES[config.dtype])
    save_folder(loaded.model, loaded.tokenizer, target, card_of(loaded))
    print(f"{loaded.origin} -> {target} ({describe(loaded.model)})\n{how_to_load(loaded.model, target)}")
    return 0


def refuse_used_folder(target: Path) -> None:
    """Raises unless nothing would be overwritten.

    Raises:
        ConfigError: a file, or a folder with something in it.
    """
    if target.exists() and not target.is_dir():
        raise ConfigError(f"to = {target} is a file: give a folder that does not exist yet, or an empty one")
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"to = {target} is not empty: give a folder that does not exist yet, or an empty one")


def card_of(loaded: Loaded) -> str:
    """The model card: the source's own, or written from the facts of its run."""
    place = loaded.place
    if place.kind == "checkpoint" and place.run_dir:
        counters = read_json(place.folder / "state.json")["counters"]
        config = config_of_checkpoint(place.folder)
        return model_card(
            loaded.model.config, card_facts(config, place.run_dir, counters["step"], counters["tokens_seen"])
        )
    own = place.folder / "README.md"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    return f"# {Path(loaded.origin).name}\n\nExported by `lost export` from {loaded.origin}, which has no model card.\n"


def describe(model: PreTrainedModel) -> str:
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{model.config.model_type}, {num_parameters:,} parameters, {str(model.dtype).removeprefix('torch.')}"


def how_to_load(model: PreTrainedModel, target: Path) -> str:
    registration = "import lost.model; " if isinstance(model, LostLlamaForCausalLM) else ""
    return (
        f"Load it with: {registration}from transformers import AutoModelForCausalLM;"
        f" AutoModelForCausalLM.from_pretrained({str(target)!r})"
    )
