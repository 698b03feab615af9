"""Validation rows for a model that is there already, with its own tokenizer."""

import dataclasses

from lost.assemble.load import Loaded
from lost.config.data import DataConfig
from lost.data import TokenRows
from lost.data.prepared import prepare_validation
from lost.utils.errors import ConfigError
from lost.utils.logging import get_logger

log = get_logger(__name__)


def validation_rows(loaded: Loaded, data: DataConfig, seq_len: int) -> dict[str, TokenRows]:
    """The validation sets by name, as rows of the model's own tokens whatever data.tokenizer says.

    Raises:
        ConfigError: rows longer than the model's positions.
        DataError: the data cannot be read.
    """
    model_config = loaded.model.config
    longest = getattr(model_config, "max_position_embeddings", seq_len)
    if seq_len > longest:
        raise ConfigError(
            f"seq_len = {seq_len} is above max_position_embeddings = {longest} of {loaded.origin}: lower seq_len"
        )
    own = dataclasses.replace(data, tokenizer="train")
    sets, report = prepare_validation(
        own, vocab_size=model_config.vocab_size, seq_len=seq_len, tokenizer=loaded.tokenizer
    )
    if not report.is_cached:
        log.info("Prepared %d tokens of data=%s", report.tokens, data.name)  # pyright: ignore[reportAttributeAccessIssue]
    return sets
