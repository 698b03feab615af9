"""Asks the hub for what a command can only get there, before torch and transformers are imported."""

from pathlib import Path
from typing import Any

from lost.config.data import C4DataConfig, DataConfig
from lost.config.schema import PretrainConfig
from lost.utils.files import cache_folder
from lost.utils.hub import (
    ADVICE_FOR_DOCUMENTS,
    ask_ahead,
    is_hub_id,
    may_be_cached,
    require_hub,
    require_hub_for_c4,
    require_hub_for_source,
    require_hub_for_tokenizer,
)


def require_reachable(command: str, config: Any) -> None:
    """Stops within seconds where the hub does not answer and nothing here can stand in for it.

    Raises:
        DataError: what was unreachable and what to use instead.
    """
    if command in ("pretrain", "finetune") and (Path(config.run_dir).expanduser() / "config.yaml").is_file():
        # A run that goes on may have all it needs.
        return
    if _reads_source(command, config) and _is_away(config.source):
        require_hub_for_source(config.source)
    if command in ("pretrain", "prepare"):
        _require_tokenizer(config.data)
    if command in ("pretrain", "prepare", "evaluate", "convert"):
        _require_c4(config.data)
    if command == "export" and config.push and not config.dry_run:
        require_hub(
            f"push = {config.push} sends files to it", "leave push out, or see what would be sent: dry_run=true"
        )


def _reads_source(command: str, config: Any) -> bool:
    """Whether the command reads the model or the tokenizer that `source` names."""
    if command == "prepare":
        assert isinstance(config, PretrainConfig)
        return config.data.tokenizer == "train" and bool(config.source)
    return command in ("pretrain", "finetune", "evaluate", "generate", "export", "convert") and bool(config.source)


def _require_tokenizer(data: DataConfig) -> None:
    if data.tokenizer != "train" and _is_away(data.tokenizer):
        require_hub_for_tokenizer(data.tokenizer, ADVICE_FOR_DOCUMENTS if _streams_c4(data) else "")


def _require_c4(data: DataConfig) -> None:
    """The hub, where C4 cannot be here: neither as files nor as rows. What may be here is looked at later."""
    if not _streams_c4(data):
        return
    assert isinstance(data, C4DataConfig)
    has_rows = any((cache_folder(data.cache_dir) / "rows").glob("*/"))
    if has_rows or may_be_cached(data.dataset, "dataset"):
        ask_ahead()
    else:
        require_hub_for_c4(data.dataset)


def _streams_c4(data: DataConfig) -> bool:
    return isinstance(data, C4DataConfig) and is_hub_id(data.dataset)


def _is_away(name: str) -> bool:
    return is_hub_id(name) and not may_be_cached(name, "model")
