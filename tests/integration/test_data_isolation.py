"""isolate_documents with transformers' own LLaMA: a document in a packed row reads as if it were alone."""

import pytest
import torch

from lost.data import TokenRows
from lost.data.files import document_pieces
from lost.data.row_makers import RowWriter
from lost.data.tokenizer import Encoder
from lost.testing.tiny import tiny_llama, tiny_tokenizer

TEXTS = ["first document", "2nd", "the third one, longer", "4", "five five"]
SEQ_LEN = 64


@pytest.fixture
def folder(tmp_path):
    encoder = Encoder(tiny_tokenizer(), "tiny")
    writer = RowWriter(tmp_path, "packed", SEQ_LEN, encoder, 258)
    writer.add([piece for text in TEXTS for piece in document_pieces(text, 0, tmp_path, 0)], encoder.encode(TEXTS))
    writer.close()
    return tmp_path


@torch.no_grad()
def logits_apart(model, batch):
    """(logits of a document inside the row, logits of it alone), for every document of row 0."""
    inside = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[0]
    start = 0
    for text in TEXTS:
        ids = [*tiny_tokenizer().encode(text, add_special_tokens=False), 1]
        assert batch["input_ids"][0, start : start + len(ids)].tolist() == ids
        yield inside[start : start + len(ids)], model(input_ids=torch.tensor([ids])).logits[0]
        start += len(ids)
    assert start < SEQ_LEN, "the row must hold padding too"


def relative_error(pairs):
    ours, reference = (torch.cat(side) for side in zip(*pairs, strict=True))
    return ((ours - reference).square().mean() / reference.square().mean()).sqrt().item()


def test_a_document_in_a_row_equals_the_document_alone(folder):
    model = tiny_llama().double()
    # The boolean mask is meant for this one.
    assert model.config._attn_implementation == "sdpa"
    batch = TokenRows(folder, isolate_documents=True).read([0])
    assert relative_error(logits_apart(model, batch)) < 1e-12
    # Without the mask the documents see each other, and the same measure says so.
    assert relative_error(logits_apart(model, {"input_ids": batch["input_ids"]})) > 1e-2


def test_the_loss_is_that_of_the_documents_apart(folder):
    model = tiny_llama().double()
    batch = TokenRows(folder, isolate_documents=True).read([0])
    with torch.no_grad():
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[0, :-1]
        targets = batch["labels"][0, 1:]
        ours = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        apart = 0.0
        for text in TEXTS:
            ids = torch.tensor([[*tiny_tokenizer().encode(text, add_special_tokens=False), 1]])
            alone = model(input_ids=ids).logits[0, :-1]
            apart += torch.nn.functional.cross_entropy(alone, ids[0, 1:], reduction="sum")
    assert ours.item() == pytest.approx(apart.item(), rel=1e-12)
    assert (targets != -100).sum() == sum(len(text) for text in TEXTS)
