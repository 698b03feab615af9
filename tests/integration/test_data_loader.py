"""What training reads: every row once an epoch, the same at any number of processes and readers, from any step on."""

from itertools import islice

import pytest
import torch

from lost.data import Mixture, TokenRows, train_batches
from lost.data.files import document_pieces
from lost.data.row_makers import RowWriter
from lost.data.tokenizer import Encoder
from lost.testing.tiny import tiny_tokenizer
from lost.utils.errors import ConfigError

SEQ_LEN = 4


@pytest.fixture
def make(tmp_path):
    """make(37, 11): a mixture of sets of 37 and 11 rows; row i of set k holds the bytes of "{k}{i:02}"."""

    def make_mixture(*sizes, weights=None):
        sets = []
        for k, size in enumerate(sizes):
            folder = tmp_path / f"{k}_{size}"
            if not folder.exists():
                folder.mkdir()
                encoder = Encoder(tiny_tokenizer(), "tiny")
                writer = RowWriter(folder, "padded", SEQ_LEN, encoder, 258)
                for i in range(size):
                    text = f"{k}{i:02}"
                    writer.add(list(document_pieces(text, 0, folder, 0)), encoder.encode([text]))
                writer.close()
            sets.append(TokenRows(folder))
        return Mixture(sets, weights)

    return make_mixture


def steps(train, num_steps, *, global_batch, micro, process=0, processes=1, first_step=1, seed=7, **settings):
    batches = train_batches(
        train,
        seed=seed,
        first_step=first_step,
        global_batch_size=global_batch,
        micro_batch_size=micro,
        process_index=process,
        num_processes=processes,
        **settings,
    )
    return list(islice(batches, num_steps))


def names(batch):
    """The rows of a batch as (set, row)."""
    tokenizer = tiny_tokenizer()
    texts = [tokenizer.decode(row[:-1]) for row in batch["input_ids"]]
    return [(int(text[0]), int(text[1:])) for text in texts]


@pytest.mark.parametrize(("num_rows", "global_batch", "micro"), [(37, 8, 4), (1, 4, 2), (5, 15, 5), (64, 16, 16)])
def test_every_row_once_an_epoch(make, num_rows, global_batch, micro):
    num_steps = -(-3 * num_rows // global_batch)
    read = [
        name
        for step in steps(make(num_rows), num_steps, global_batch=global_batch, micro=micro)
        for batch in step
        for name in names(batch)
    ]
    epochs = [read[e * num_rows : (e + 1) * num_rows] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == [(0, i) for i in range(num_rows)]
    if num_rows > 30:
        assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("processes", "micro"), [(2, 4), (4, 2), (8, 1), (2, 2)])
def test_processes_together_read_what_one_reads(make, processes, micro):
    """Per micro-step, over epoch boundaries and a mixture."""
    train = make(37, 11, weights=[1.0, 2.0])
    alone = steps(train, 13, global_batch=8, micro=processes * micro)
    together = [steps(train, 13, global_batch=8, micro=micro, process=p, processes=processes) for p in range(processes)]
    for step in range(13):
        assert len(alone[step]) == 8 // (processes * micro)
        for m, batch in enumerate(alone[step]):
            parts = [name for p in range(processes) for name in names(together[p][step][m])]
            assert parts == names(batch)


def test_from_a_later_step_it_goes_on_the_same(make):
    train = make(37)
    whole = steps(train, 12, global_batch=6, micro=3)
    for first_step in (1, 2, 7, 12):
        rest = steps(train, 13 - first_step, global_batch=6, micro=3, first_step=first_step)
        for step, again in zip(whole[first_step - 1 :], rest, strict=True):
            assert [names(batch) for batch in step] == [names(batch) for batch in again]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_readers_change_nothing(make, num_workers):
    train = make(37, 11, weights=[1.0, 1.0])
    alone = steps(train, 9, global_batch=6, micro=3, first_step=4)
    ahead = steps(train, 9, global_batch=6, micro=3, first_step=4, num_workers=num_workers)
    for step, again in zip(alone, ahead, strict=True):
        for batch, same in zip(step, again, strict=True):
            assert all(torch.equal(batch[key], same[key]) for key in ("input_ids", "labels"))


def test_torch_random_numbers_are_left_alone(make):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    steps(make(37), 2, global_batch=4, micro=2)
    assert torch.equal(torch.rand(3), expected)


def test_another_seed_is_another_order(make):
    train = make(37)
    one, other = (
        [names(batch) for step in steps(train, 4, global_batch=8, micro=8, seed=seed) for batch in step]
        for seed in (0, 1)
    )
    assert one != other


def test_a_mixture_is_read_by_weight(make):
    read = [
        name[0]
        for step in steps(make(30, 10, weights=[1.0, 3.0]), 10, global_batch=4, micro=4)
        for batch in step
        for name in names(batch)
    ]
    assert (read.count(0), read.count(1)) == (10, 30)


def test_a_batch_that_does_not_divide_is_refused(make):
    with pytest.raises(ConfigError, match=r"global_batch_size = 10 is not divisible by .* 4 x 1"):
        steps(make(37), 1, global_batch=10, micro=4)
    with pytest.raises(ConfigError, match="4 x 2"):
        steps(make(37), 1, global_batch=12, micro=4, processes=2)
