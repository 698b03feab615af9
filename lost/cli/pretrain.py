"""`lost pretrain`: trains a model, or goes on with a run that was interrupted."""

from lost.config.schema import PretrainConfig


def run(config: PretrainConfig) -> int:
    from lost.assemble.pretrain import pretrain

    return pretrain(config)
