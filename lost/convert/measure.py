"""What the text says of a model: its perplexity, and how large the inputs of its layers are. B rows, T tokens, K in."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lost.assemble.load import Loaded
from lost.assemble.rows import validation_rows
from lost.config.convert import ConvertConfig
from lost.data import Mixture, prepare
from lost.evaluation import perplexity
from lost.train.runtime import Runtime
from lost.utils.errors import ConfigError
from lost.utils.labels import IGNORED_LABEL
from lost.utils.progress import progress_bar

# An input channel that is silent on the calibration text still counts a little: other text may use it.
SMALLEST_SCALE = 1e-3


def perplexities(loaded: Loaded, config: ConvertConfig, runtime: Runtime) -> dict[str, dict[str, Any]]:
    """Loss and perplexity of each validation set, as `lost evaluate` measures them."""
    found = {}
    for name, rows in validation_rows(loaded, config.data, config.seq_len).items():
        with progress_bar(f"perplexity on {name}", "rows") as progress:
            result = perplexity(
                loaded.model,
                rows,
                micro_batch_size=config.evaluation.micro_batch_size,
                max_tokens=config.evaluation.max_tokens,
                device=runtime.device,
                autocast=runtime.autocast_dtype,
                progress=progress,
            )
        keys = ("loss", "perplexity", "num_tokens", "num_rows")
        found[name] = {key: value for key, value in asdict(result).items() if key in keys}
    return found


def calibration_scales(
    loaded: Loaded, names: Sequence[str], config: ConvertConfig, runtime: Runtime
) -> dict[str, Tensor]:
    """RMS of each input channel of each layer on the calibration text, over the layer's RMS; at least 0.001.

    Returns:
        float64 [K] on the CPU by name.
    Raises:
        DataError, ConfigError: the training documents cannot be read as rows.
    """
    rows = calibration_rows(loaded, config)
    count = min(len(rows), max(1, -(-config.calibration_tokens // config.seq_len)))
    # Spread over the documents, the same for the same settings.
    picked = np.linspace(0, len(rows) - 1, count).astype(np.int64)
    with InputEnergy(loaded.model, names) as energy, progress_bar("calibrating", "rows") as progress:
        for start in range(0, count, config.evaluation.micro_batch_size):
            batch = rows.read(picked[start : start + config.evaluation.micro_batch_size])
            energy.run(batch, runtime)
            progress(min(start + config.evaluation.micro_batch_size, count), count)
    return {name: scale_of(energy.squares[name] / energy.num_tokens) for name in names}


def calibration_rows(loaded: Loaded, config: ConvertConfig) -> Mixture:
    data = replace(config.data, tokenizer="train")
    prepared = prepare(
        data, vocab_size=loaded.model.config.vocab_size, seq_len=config.seq_len, tokenizer=loaded.tokenizer
    )
    if not isinstance(prepared.train, Mixture):
        raise ConfigError(
            "calibration_tokens with data.streaming = true: calibration reads rows on disk; set data.streaming=false"
            " with data.max_documents, or use data=text_files"
        )
    return prepared.train


def scale_of(mean_squares: Tensor) -> Tensor:
    """The factor by which a channel's error counts, [K]; 1 for all where there is no input at all."""
    rms = mean_squares.sqrt()
    typical = float(mean_squares.mean().sqrt())
    return (rms / typical).clamp_min(SMALLEST_SCALE) if typical > 0 else torch.ones_like(rms)


class InputEnergy:
    """Context in which every forward pass adds up the squares of each input channel of the named linears.

    Attributes:
        squares: sum over the tokens so far, float64 [K] on the CPU by name.
        num_tokens: so far, padding left out.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.model = model
        self.names = names
        prefix: Any = getattr(model, "base_model_prefix", "")
        # Logits are the largest tensor of all, and the head is rarely among the layers.
        is_inside = all(name.startswith(f"{prefix}.") for name in names)
        self._runs: nn.Module = model.get_submodule(prefix) if is_inside else model
        self.squares: dict[str, Tensor] = {}
        self.num_tokens = 0
        self._is_counted = torch.zeros(0, dtype=torch.bool)
        self._hooks: list[Any] = []

    def __enter__(self) -> "InputEnergy":
        for name in self.names:
            hook = partial(self._add, name)
            self._hooks.append(self.model.get_submodule(name).register_forward_pre_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def run(self, batch: dict[str, Tensor], runtime: Runtime) -> None:
        """One forward pass of a batch of rows."""
        inputs = {key: value.to(runtime.device) for key, value in batch.items() if key != "labels"}
        self._is_counted = (batch["labels"] != IGNORED_LABEL).to(runtime.device)
        self.num_tokens += int(self._is_counted.sum())
        with runtime.autocast():
            self._runs(**inputs, use_cache=False)

    def _add(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares = inputs[0][self._is_counted].float().square().sum(0).cpu().double()
        self.squares[name] = self.squares.get(name, 0) + squares
