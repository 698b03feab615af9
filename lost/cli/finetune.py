"""`lost finetune`: goes on training a model on examples, or goes on with such a run that was interrupted."""

from lost.config.finetune import FinetuneConfig


def run(config: FinetuneConfig) -> int:
    from lost.finetune.run import finetune

    return finetune(config)
