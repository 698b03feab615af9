"""What a fine-tuning run leaves behind: the kept weights in final/, test results and predictions."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lost.assemble.run import whole_model
from lost.checkpoint import CheckpointManager, write_json_atomically
from lost.checkpoint.manager import step_name
from lost.checkpoint.shards import read_into
from lost.config.finetune import FinetuneConfig
from lost.export.folder import save_folder
from lost.finetune.adapter_folder import save_adapter
from lost.finetune.build import ModelMaker
from lost.finetune.card import finetune_card
from lost.finetune.classification import LabelledData, metrics_of, predict, write_predictions
from lost.train.state import TrainState
from lost.train.trainer import Run
from lost.utils.logging import get_logger

log = get_logger(__name__)

RESULT_NAME = "result.json"


def save_result(
    run: Run,
    state: TrainState,
    manager: CheckpointManager,
    maker: ModelMaker,
    labelled: LabelledData | None,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Takes the kept weights, measures them on the test sets, and writes final/, predictions/ and result.json."""
    config = maker.config
    kept_step = take_kept_weights(run, state, manager, config)
    result: dict[str, Any] = {
        "kept_step": kept_step,
        "last_step": state.step,
        "metric": run.selection.key if run.selection else "",
        "best_value": state.best_value,
        "test": {},
    }
    if labelled:
        result["test"] = measured(run, config, labelled)
    manager.finish()
    model = whole_model(run, lambda: maker.make(manager.complete()[-1]))
    if model is None:
        return
    run_dir = Path(config.run_dir)
    write_json_atomically(run_dir / RESULT_NAME, result)
    card = finetune_card(config, result, tokens_seen=state.tokens_seen)
    adapter = maker.adapter_facts()
    if adapter:
        save_adapter(model, tokenizer, run_dir / "final", adapter, card)
    else:
        assert isinstance(model, PreTrainedModel)
        save_folder(model, tokenizer, run_dir / "final", card)


def take_kept_weights(run: Run, state: TrainState, manager: CheckpointManager, config: FinetuneConfig) -> int:
    """Puts the weights of the best evaluation into the model, where they are wanted; the step that they are of."""
    if config.evaluation.keep == "last" or state.best_step in (0, state.step):
        return state.step
    manager.finish()
    best = manager.folder / step_name(state.best_step)
    # The same answer everywhere: processes that load different weights would save a mixture.
    run.runtime.accelerator.wait_for_everyone()
    if not (best / "manifest.json").is_file():
        log.warning("%s, the best checkpoint, is gone: final/ holds the weights of the last step", best)
        return state.step
    run.engine.load_model(lambda tensors: read_into(best, "model", tensors))
    return state.best_step


def measured(run: Run, config: FinetuneConfig, labelled: LabelledData) -> dict[str, Any]:
    """Metrics of every test set; predictions of test and validation sets go to predictions/<set>.jsonl."""
    results = {}
    for name, rows in {**labelled.validation, **labelled.test}.items():
        logits = predict(run.engine.model, run.runtime, rows, config.evaluation.micro_batch_size)
        if name in labelled.test:
            results[name] = metrics_of(logits, rows, labelled)
        if run.runtime.is_main:
            path = Path(config.run_dir) / "predictions" / f"{name}.jsonl"
            write_predictions(path, logits, rows, labelled.label_names)
    return results
