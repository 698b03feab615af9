"""C4 from the Hugging Face hub, its cache or a local folder; never waits for a hub that does not answer."""

import hashlib
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from lost.config.data import C4DataConfig
from lost.data.files import Piece, document_pieces
from lost.data.sources import Corpus, Sources
from lost.utils.errors import DataError, InterruptedDataError
from lost.utils.hub import ADVICE_FOR_DOCUMENTS, INSTEAD_OF_C4, require_hub_for_c4

# The recipe of GaLore, SLTrain and CoLA: the stream shuffled with this seed and the library's own buffer size.
_SHUFFLE_SEED = 42


class C4Corpus(Corpus):
    """One split of C4, streamed with `datasets` and shuffled with seed 42.

    Args:
        name: "train" or "validation", the split.
        data: the settings.
        folder: local copy to read instead of the hub, or None.
        max_documents: documents to take; 0 = all.
    """

    def __init__(self, name: str, data: C4DataConfig, folder: Path | None, max_documents: int):
        self.name = name
        self._data = data
        self._folder = folder
        self._max_documents = max_documents

    def _hash(self) -> str:
        """Hash of names and settings: the data set itself is too large to be read for a hash, and does not change."""
        facts = [self._data.subset, self.name, self._data.text_field, str(_SHUFFLE_SEED), str(self._max_documents)]
        if self._folder is None:
            facts.append(self._data.dataset)
        else:
            facts += [f"{path.name} {path.stat().st_size}" for path in self._files()]
        return hashlib.sha256("\0".join(facts).encode()).hexdigest()

    def size(self) -> int:
        return 0

    def text_size(self) -> int:
        return 0

    def pieces(self) -> Iterator[Piece]:
        return self._pieces(self._stream(_SHUFFLE_SEED), self._max_documents)

    def part(self, seed: int, process_index: int, num_processes: int, num_workers: int) -> Iterator[Piece]:
        """The documents of one reader in the shuffle of `seed`; those of all readers are disjoint and together all.

        Each process has `num_workers` readers (DataLoader's); `datasets` sees in which of them it runs.
        """
        from datasets.distributed import split_dataset_by_node

        stream = split_dataset_by_node(self._stream(seed), rank=process_index, world_size=num_processes)
        return self._pieces(stream, -(-self._max_documents // (num_processes * num_workers)))

    def _pieces(self, stream: Iterable[dict], max_documents: int) -> Iterator[Piece]:
        place = Path(f"{self._data.dataset}/{self._data.subset}/{self.name}")
        for number, record in enumerate(self._records(stream), start=1):
            text = record.get(self._data.text_field)
            if not isinstance(text, str):
                raise DataError(
                    f"{place}: record {number} has no text in field '{self._data.text_field}'; it has"
                    f" {', '.join(record)}: set data.text_field to one of them"
                )
            yield from document_pieces(text, 0, place, number)
            if number == max_documents:
                return

    def _records(self, stream: Iterable[dict]) -> Iterator[dict]:
        number = 0
        try:
            for record in stream:
                number += 1
                yield record
        except (OSError, EOFError, zlib.error) as error:
            raise InterruptedDataError(
                f"{self._data.dataset}: reading broke off after record {number} ({type(error).__name__}: {error}):"
                " check the network or the local copy and start again; finished shards are kept"
            ) from error

    def _files(self) -> list[Path]:
        assert self._folder is not None
        return sorted((self._folder / self._data.subset).glob(f"c4-{self.name}.*.json.gz"))

    def _stream(self, seed: int):
        import datasets

        if self._folder is not None:
            files = [str(path) for path in self._files()]
            if not files:
                pattern = self._folder / self._data.subset / f"c4-{self.name}.*.json.gz"
                raise DataError(f"data.dataset = {self._folder}: no file matches {pattern}; {INSTEAD_OF_C4}")
            stream = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
        else:
            require_hub_for_c4(self._data.dataset)
            stream = datasets.load_dataset(self._data.dataset, self._data.subset, split=self.name, streaming=True)
        return stream.shuffle(seed=seed)


def open_c4(data: C4DataConfig) -> Sources:
    """C4's own train and validation splits."""
    folder = _local_copy(data)
    train = C4Corpus("train", data, folder, data.max_documents)
    validation: dict[str, Corpus] = {"validation": C4Corpus("validation", data, folder, 0)}
    return Sources([train], None, validation, hub_advice="" if folder else ADVICE_FOR_DOCUMENTS)


def _local_copy(data: C4DataConfig) -> Path | None:
    """The folder that data.dataset names, or the hub cache's snapshot of it if it holds both splits whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder = Path(data.dataset).expanduser()
    if folder.is_dir():
        return folder
    try:
        snapshot = Path(snapshot_download(data.dataset, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    has_all = all(_has_all_files(snapshot / data.subset, split) for split in ("train", "validation"))
    return snapshot if has_all else None


def _has_all_files(folder: Path, split: str) -> bool:
    """Whether the files c4-<split>.<place>-of-<count>.json.gz are all there."""
    names = sorted(path.name for path in folder.glob(f"c4-{split}.*-of-*.json.gz"))
    return bool(names) and len(names) == int(names[0].split("-of-")[1].split(".")[0])
