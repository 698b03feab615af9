"""What `source=` names: a run directory, a checkpoint, an exported folder, or a model on the hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lost.assemble.adapter import is_adapter_folder
from lost.checkpoint import CheckpointManager, read_status
from lost.utils.errors import LostError
from lost.utils.hub import is_hub_id, require_hub_for_source

# An export needs one of each; shards have an index beside them.
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
# Of a model on the hub: weights, config, tokenizer, chat template, and what says who may use it.
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*", "NOTICE*"]
# The weights once more, as their makers' own code reads them.
SECOND_COPIES = ["consolidated*", "original/*"]
CHECKPOINT_NAME = re.compile(r"step_\d{8,}")

EXPECTED = (
    "source takes a run directory (config.yaml and checkpoints/ or final/), a checkpoint"
    " (checkpoints/step_XXXXXXXX), an exported folder (config.json, weights, tokenizer), or a hub id"
)


@dataclass(frozen=True)
class Place:
    """Where weights and tokenizer lie.

    Attributes:
        kind: how the weights are stored.
        folder: of the weights.
        tokenizer_folder: of the tokenizer.
        run_dir: the run that made it, if it is known.
        name: the hub id, or the folder of the weights.
    """

    kind: Literal["checkpoint", "export", "adapter"]
    folder: Path
    tokenizer_folder: Path
    run_dir: Path | None
    name: str


def locate(source: str) -> Place:
    """The place that `source` names.

    Raises:
        LostError: nothing there, or not what a model needs; says what was found and what is expected.
    """
    path = Path(source).expanduser()
    if source and path.is_dir():
        return locate_folder(path)
    if path.is_file():
        raise LostError(f"source = {source} is a file: give the folder that it is in. {EXPECTED}")
    if not is_hub_id(source):
        raise LostError(f"source = {source!r}: there is no such folder. {EXPECTED}")
    folder = hub_folder(source)
    return Place("export", folder, folder, None, source)


def locate_folder(folder: Path) -> Place:
    """The place inside a folder that exists."""
    if is_adapter_folder(folder):
        return Place("adapter", folder, folder, None, str(folder))
    if CHECKPOINT_NAME.fullmatch(folder.resolve().name) or (folder / "manifest.json").is_file():
        return checkpoint_place(folder)
    if (folder / "config.yaml").is_file() or (folder / "checkpoints").is_dir():
        return run_place(folder)
    if (folder / "config.json").is_file():
        run_dir = folder.resolve().parent
        is_final = folder.resolve().name == "final" and (run_dir / "config.yaml").is_file()
        return export_place(folder, run_dir if is_final else None)
    found = sorted(path.name for path in folder.iterdir())
    if not found:
        raise LostError(f"source = {folder} is an empty folder. {EXPECTED}")
    if has_weights(folder):
        raise LostError(f"source = {folder} has weights and no config.json: it is not complete. {EXPECTED}")
    raise LostError(f"source = {folder} holds no model (it has {', '.join(found[:5])}). {EXPECTED}")


def run_place(run_dir: Path) -> Place:
    """final/ of a finished run, else its newest complete checkpoint.

    Raises:
        LostError: the run has saved nothing yet.
    """
    final = run_dir / "final"
    status = read_status(run_dir) or {}
    has_final = (final / "config.json").is_file() or is_adapter_folder(final)
    if has_final and status.get("state") == "finished":
        return locate_folder(final) if is_adapter_folder(final) else export_place(final, run_dir)
    newest = CheckpointManager(run_dir / "checkpoints").latest()
    if newest is not None:
        return Place("checkpoint", newest, run_dir / "tokenizer", run_dir, str(newest))
    if has_final:
        return export_place(final, run_dir)
    state = status.get("state", "unknown")
    raise LostError(
        f"source = {run_dir} is a run without a complete checkpoint (its state: {state}, step"
        f" {status.get('step', 'unknown')}): wait for its first one, or lower checkpoint.every_steps"
    )


def checkpoint_place(folder: Path) -> Place:
    """A checkpoint of a run; its tokenizer is in the run directory."""
    run_dir = folder.resolve().parent.parent
    tokenizer_folder = run_dir / "tokenizer"
    if not tokenizer_folder.is_dir():
        raise LostError(
            f"source = {folder}: its run's tokenizer is missing, {tokenizer_folder}. A checkpoint is read inside its"
            " run directory; to move a model, export it: lost export source=<run directory> to=<folder>"
        )
    return Place("checkpoint", folder, tokenizer_folder, run_dir, str(folder))


def export_place(folder: Path, run_dir: Path | None) -> Place:
    """A Hugging Face folder that has all its parts."""
    missing = missing_parts(folder)
    if missing:
        raise LostError(f"source = {folder} is not complete: it has no {' and no '.join(missing)}. {EXPECTED}")
    return Place("export", folder, folder, run_dir, str(folder))


def missing_parts(folder: Path) -> list[str]:
    """What a Hugging Face folder lacks, in words."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not has_weights(folder):
        missing.append("weights (model.safetensors)")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        missing.append("tokenizer (tokenizer.json)")
    return missing


def has_weights(folder: Path) -> bool:
    return any(path.is_file() for pattern in WEIGHT_PATTERNS for path in folder.glob(pattern))


def hub_folder(hub_id: str) -> Path:
    """The model's folder in the local hub cache, downloaded first where it is not there.

    Raises:
        LostError: neither in the cache nor on a hub that answers within seconds.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(hub_id, local_files_only=True))
        if not missing_parts(cached):
            return cached
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    require_hub_for_source(hub_id)
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=HUB_FILES, ignore_patterns=SECOND_COPIES))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise LostError(f"source = {hub_id} could not be downloaded from the hub: {error}") from error
    missing = missing_parts(folder)
    if missing:
        raise LostError(f"source = {hub_id}: this model on the hub has no {' and no '.join(missing)}")
    return folder
