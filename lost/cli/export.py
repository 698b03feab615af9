"""`lost export`: writes a model as a Hugging Face folder that other programs load."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lost.assemble.card import card_of
from lost.assemble.load import Loaded, load_model, refuse_adapter_beside
from lost.assemble.locate import locate
from lost.config.use import ExportConfig
from lost.export import Form, auto_class, code_of, dense_model, lost_layers, save_folder
from lost.export.card import CONVERSION_PICTURE, CONVERSION_REPORT
from lost.export.hub import describe_push, push_folder, require_token
from lost.finetune.load import is_classifier, load_classifier
from lost.utils.errors import ConfigError
from lost.utils.logging import setup

DTYPES = {"source": None, "fp32": torch.float32, "bf16": torch.bfloat16}


def run(config: ExportConfig) -> int:
    """Loads, writes, says how to load what was written, and sends it where `push` says so."""
    setup()
    target = Path(config.to).expanduser()
    refuse_used_folder(target)
    if config.push and not config.dry_run:
        require_token()
    dtype = DTYPES[config.dtype]
    # bf16 factors would be rounded before their product, which is rounded again.
    keeps_stored = config.form == "dense" and dtype == torch.bfloat16
    loaded = load_any(config.source, None if keeps_stored else dtype)
    refuse_adapter_beside(loaded, "use the adapter folder as it is, together with its model")
    form = form_of(loaded, config)
    card = card_of(loaded, config, form)
    more_files = conversion_files(loaded.place.folder)
    model, code = in_form(loaded.model, form, dtype)
    more_files |= {name: text.encode() for name, text in code.items()}
    save_folder(model, loaded.tokenizer, target, card, max_shard_size=config.max_shard_size, more_files=more_files)
    print(f"{loaded.origin} -> {target} ({describe(model)})\n{how_to_load(model, form, target)}")
    if config.push:
        send = describe_push if config.dry_run else push_folder
        print(send(target, config.push, private=config.private))
    return 0


def load_any(source: str, dtype: torch.dtype | None) -> Loaded:
    """The language model or the text classifier that `source` names, on the CPU."""
    place = locate(source)
    return load_classifier(place, dtype) if is_classifier(place) else load_model(source, "cpu", dtype)


def refuse_used_folder(target: Path) -> None:
    """Raises unless nothing would be overwritten.

    Raises:
        ConfigError: a file, or a folder with something in it.
    """
    if target.exists() and not target.is_dir():
        raise ConfigError(f"to = {target} is a file: give a folder that does not exist yet, or an empty one")
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"to = {target} is not empty: give a folder that does not exist yet, or an empty one")


def form_of(loaded: Loaded, config: ExportConfig) -> Form:
    """The form to write.

    Raises:
        ConfigError: a LOST form of a model without LOST layers, or a classifier with its own code.
    """
    is_lost = bool(lost_layers(loaded.model))
    if config.form == "auto":
        return "lost" if is_lost else "dense"
    if config.form == "self_contained" and auto_class(loaded.model) is not AutoModelForCausalLM:
        raise ConfigError(
            "form = self_contained: its modelling file is for language models, and this is a classifier: take"
            " form=lost, or form=dense where no activation stands between the factors"
        )
    if config.form != "dense" and not is_lost:
        raise ConfigError(
            f"form = {config.form}: {loaded.origin} has no LOST layers; leave form out, or make a LOST model of it"
        )
    return config.form


def in_form(model: PreTrainedModel, form: Form, dtype: torch.dtype | None) -> tuple[PreTrainedModel, dict[str, str]]:
    """The model to save, in `dtype`, and the files beside it."""
    if form == "dense" and lost_layers(model):
        return dense_model(model, dtype), {}
    model = model if dtype is None else model.to(dtype)  # pyright: ignore[reportArgumentType]
    return model, dict([code_of(model)]) if form == "self_contained" else {}


def conversion_files(folder: Path) -> dict[str, bytes]:
    """What `lost convert` has left in the folder of the model, and its card points to."""
    paths = [folder / name for name in (CONVERSION_REPORT, CONVERSION_PICTURE)]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def describe(model: PreTrainedModel) -> str:
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{model.config.model_type}, {num_parameters:,} parameters, {str(model.dtype).removeprefix('torch.')}"


def how_to_load(model: PreTrainedModel, form: Form, target: Path) -> str:
    registration = "import lost.model; " if form == "lost" else ""
    option = ", trust_remote_code=True" if form == "self_contained" else ""
    name = auto_class(model).__name__
    return (
        f"Load it with: {registration}from transformers import {name}; {name}.from_pretrained({str(target)!r}{option})"
    )
