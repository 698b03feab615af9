"""The folder of a converted model: weights in shards as they come, and what the source has beside its weights."""

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lost.convert.dense import INDEX_NAME
from lost.export.card import CONVERSION_REPORT

# Of a released folder: tokenizer, chat template, generation settings, licence.
_BESIDE = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*")
_NOT_BESIDE = ("config.json", "*.index.json", CONVERSION_REPORT)


class ShardWriter:
    """Tensors to safetensors files of at most `max_bytes`, or one tensor; holds one file's tensors at a time."""

    def __init__(self, folder: Path, max_bytes: int):
        self.folder = folder
        self.max_bytes = max_bytes
        self.total_bytes = 0
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._names: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        if self._waiting and self._waiting_bytes + tensor.nbytes > self.max_bytes:
            self._write()
        self._waiting[name] = tensor.cpu().contiguous()
        self._waiting_bytes += tensor.nbytes

    def finish(self) -> None:
        """Writes what waits, gives the files their names and says in an index what is where."""
        self._write()
        count = len(self._names)
        if count == 1:
            self._file(0).rename(self.folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._names):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._file(number).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _file(self, number: int) -> Path:
        return self.folder / f"shard_{number}.partial"

    def _write(self) -> None:
        save_file(self._waiting, self._file(len(self._names)), metadata={"format": "pt"})
        self._names.append(list(self._waiting))
        self.total_bytes += self._waiting_bytes
        self._waiting, self._waiting_bytes = {}, 0


def copy_beside(source: Path, target: Path) -> None:
    """Copies what a model's folder holds beside config, weights and model card."""
    left_out = {path.name for pattern in _NOT_BESIDE for path in source.glob(pattern)}
    for path in sorted({path for pattern in _BESIDE for path in source.glob(pattern)}):
        if path.is_file() and path.name not in left_out:
            shutil.copyfile(path, target / path.name)
