"""The model of a fine-tuning run: the source's, or the one that run_dir holds, with what the method adds to it."""

from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lost.assemble.adapter import AdapterFacts, fingerprint_of
from lost.assemble.load import tensors_of
from lost.checkpoint.io import read_json, write_json_atomically
from lost.config.finetune import FinetuneConfig, FullMethodConfig
from lost.config.section import to_dict
from lost.finetune.methods import apply_method
from lost.finetune.start import (
    Head,
    head_modules,
    model_as_stored,
    save_model_config,
    set_padding,
    starting_model,
)
from lost.finetune.tokens import check_ids, check_length
from lost.train.runtime import Runtime
from lost.utils.errors import CheckpointError

# Of a run that trains an adapter: what it belongs to.
BASE_NAME = "base.json"


class ModelMaker:
    """Makes the model of a run, on the CPU of every process.

    Args:
        tokenizer: whose padding a classifier must know.
        head: of a classifier; None: a language model.
        largest_id: of the training tokens.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        runtime: Runtime,
        tokenizer: PreTrainedTokenizerBase,
        head: Head | None,
        largest_id: int,
    ):
        self.config = config
        self.head = head
        self._runtime = runtime
        self._tokenizer = tokenizer
        self._largest_id = largest_id
        self._run_dir = Path(config.run_dir)

    @property
    def is_full(self) -> bool:
        return isinstance(self.config.method, FullMethodConfig)

    def make(self, checkpoint: Path | None) -> nn.Module:
        """The model that is trained; with a checkpoint its trained weights are for the caller to read.

        Raises:
            LostError: the source cannot be read, is too short for the rows, has another vocabulary, or is not the one
                that the checkpoint was made with.
        """
        dtype = self._runtime.param_dtype
        if checkpoint and self.is_full:
            model = model_as_stored(run_of(checkpoint), checkpoint, dtype, is_classifier=self.head is not None)
            return self._trained(self._with_config_saved(model))
        model = starting_model(self.config, self.head, dtype)
        check_length(self.config.train.seq_len, model, self._tokenizer, self.config.source)
        check_ids(self._largest_id, model.config.get_text_config().vocab_size, self.config.source)
        if self.head:
            set_padding(model, self._tokenizer)
        if self.is_full:
            return self._trained(self._with_config_saved(model))
        fingerprint = self._base_fingerprint(model, checkpoint)
        adapted = self._trained(model, tensors_of(checkpoint) if checkpoint else None)
        if self._runtime.is_main:
            write_json_atomically(self._run_dir / BASE_NAME, {"source": self.config.source, "fingerprint": fingerprint})
        return adapted

    def adapter_facts(self) -> AdapterFacts | None:
        """What describes the adapter; None where every parameter is trained."""
        if self.is_full:
            return None
        source = Path(self.config.source).expanduser()
        return AdapterFacts(
            method=to_dict(self.config.method),
            source=str(source.resolve()) if source.exists() else self.config.source,
            fingerprint=read_json(self._run_dir / BASE_NAME)["fingerprint"],
            task=self.config.task,
            label_names=list(self.head.label_names) if self.head else [],
        )

    def _trained(self, model: PreTrainedModel, stored: dict[str, Tensor] | None = None) -> nn.Module:
        return apply_method(model, self.config.method, self._head_names(model), self.config.seed, stored)

    def _with_config_saved(self, model: PreTrainedModel) -> PreTrainedModel:
        if self._runtime.is_main:
            save_model_config(model, self._run_dir)
        return model

    def _head_names(self, model: PreTrainedModel) -> list[str]:
        return head_modules(model) if self.head else []

    def _base_fingerprint(self, model: PreTrainedModel, checkpoint: Path | None) -> str:
        """Of the weights that the adapter belongs to; others than a checkpoint's are refused."""
        found = fingerprint_of(model, self._head_names(model))
        if checkpoint and read_json(run_of(checkpoint) / BASE_NAME)["fingerprint"] != found:
            raise CheckpointError(
                f"{checkpoint} holds an adapter for other weights than those of source = {self.config.source} now:"
                " bring the old model back, or choose another run_dir"
            )
        return found


def run_of(checkpoint: Path) -> Path:
    """The run that saved a checkpoint; with checkpoint.resume=<path> maybe another one than that which goes on."""
    return checkpoint.resolve().parent.parent
