"""`lost prepare`: tokenises a data set into rows on disk, which later runs with the same settings find there.

Rows that are there already are compared with their checksums.
"""

from lost.config.schema import PretrainConfig


def run(config: PretrainConfig) -> int:
    from lost.data.progress import PreparationBar, report_lines
    from lost.data.row_sets import make_rows
    from lost.utils.logging import setup

    setup()
    tokenizer, vocab_size = None, config.model.vocab_size
    if config.source and config.data.tokenizer == "train":
        from lost.assemble.load import load_tokenizer
        from lost.assemble.locate import locate

        # The run takes the source's model, whose vocabulary holds its tokenizer's ids.
        tokenizer = load_tokenizer(locate(config.source))
        vocab_size = len(tokenizer)
    with PreparationBar() as bar:
        report = make_rows(
            config.data,
            vocab_size=vocab_size,
            seq_len=config.train.seq_len,
            tokenizer=tokenizer,
            progress=bar.show,
        )
    print("\n".join(report_lines(report)))
    return 0
