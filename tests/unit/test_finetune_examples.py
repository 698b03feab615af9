"""Examples to rows: labels, splits, pairs, answers in conversations, packing, and what is wrong with a file."""

import gzip
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from lost.config.compose import compose
from lost.config.finetune import FinetuneConfig, FinetuneDataConfig
from lost.data.tokenizer import train_tokenizer
from lost.finetune.classification import main_metric, prepare_labelled
from lost.finetune.instruction import (
    Conversation,
    conversation_of,
    packed,
    prepare_conversations,
    rows_of,
    set_template,
)
from lost.finetune.labelled import read_labelled
from lost.finetune.tokens import PairEncoder, check_ids, longest_input, shortened
from lost.testing.tiny import tiny_llama, tiny_tokenizer
from lost.utils.errors import ConfigError, DataError

CHATML = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
CHATML += "{% if add_generation_prompt %}<assistant>{% endif %}"


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def labelled(*labels):
    return [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]


def data(**settings):
    return FinetuneDataConfig(**settings)


def config_of(task, folder, **settings) -> FinetuneConfig:
    typed = [f"data.{key}={value}" for key, value in settings.items()]
    return compose("finetune", ["source=x", f"task={task}", "train.seq_len=24", f"data.cache_dir={folder}", *typed])


def test_words_are_numbered_in_their_order_and_numbers_are_kept(tmp_path):
    words = write(tmp_path / "a.jsonl", labelled("pos", "neg", "neutral", "neg"))
    sets = read_labelled(data(train_files=[words], validation_files=[words]))
    assert (sets.label_names, sets.train.labels) == (["neg", "neutral", "pos"], [2, 0, 1, 0])
    numbers = write(tmp_path / "b.jsonl", labelled(2, 0, 2))
    sets = read_labelled(data(train_files=[numbers], validation_files=[numbers]))
    assert (sets.label_names, sets.train.labels) == (["0", "1", "2"], [2, 0, 2])


@pytest.mark.parametrize(
    ("train", "validation", "settings", "message"),
    [
        (labelled(0, 1), labelled(1, 2), {}, r"v.jsonl:2: label 2 is outside the range: labels are 0 to 1"),
        (labelled(0, 1, -1), labelled(1), {}, r"t.jsonl:3: label -1 is outside the range"),
        (labelled(-1, -1), labelled(-1), {}, r"t.jsonl:1: label -1 is outside the range: labels are numbered from 0"),
        (labelled(0, 10**9), labelled(0), {}, r"largest label is 1000000000 and there are 2 training examples"),
        (labelled(0, 5), labelled(1), {"num_labels": 3}, r"t.jsonl:2: label 5 is outside the range: labels are 0 to 2"),
        (labelled("a", "b"), labelled("c"), {}, r"v.jsonl:1: label c is not among those of the training"),
        (labelled("a", 1), labelled("a"), {}, r"some labels are whole numbers, but there are words"),
        (labelled(0.5), labelled(0), {}, r"t.jsonl:1: label 0.5 in 'label': must be a whole number or a word"),
        (labelled("a", "a"), labelled("a"), {}, r"every training example has the label a"),
        ([], labelled(0), {}, r"data.train_files = .*t.jsonl: there is no record in it"),
        ([{"text": 3, "label": 0}], labelled(0), {}, r"t.jsonl:1: field 'text' is int, not text"),
        (
            labelled(0, 1),
            labelled(0),
            {"pair_field": "b"},
            r"t.jsonl:1: no field 'b'; it has text, label: set data.pair",
        ),
    ],
)
def test_what_is_wrong_with_labels_is_said_with_its_line(tmp_path, train, validation, settings, message):
    files = {
        "train_files": [write(tmp_path / "t.jsonl", train)],
        "validation_files": [write(tmp_path / "v.jsonl", validation)],
    }
    with pytest.raises(DataError, match=message):
        read_labelled(data(**files, **settings))


def test_broken_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 0}\n{"text": \n')
    with pytest.raises(DataError, match=r"a.jsonl:2: not JSON"):
        read_labelled(data(train_files=[str(tmp_path / "a.jsonl")]))
    (tmp_path / "latin.jsonl").write_bytes('{"text": "naïve", "label": 0}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.jsonl:1: not UTF-8 \(byte 0xef at position 13\): save"):
        read_labelled(data(train_files=[str(tmp_path / "latin.jsonl")]))
    whole = gzip.compress(b'{"text": "x", "label": 0}\n' * 1000)
    (tmp_path / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"b.jsonl.gz: the gzip data is cut off"):
        read_labelled(data(train_files=[str(tmp_path / "b.jsonl.gz")]))
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(DataError, match=r"c.txt holds no records: the ending must be one of"):
        read_labelled(data(train_files=[str(tmp_path / "c.txt")]))


def test_a_byte_order_mark_and_line_ends_of_windows_are_no_damage(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"text": "naïve", "label": 0}\r\n{"text": "b", "label": 1}\r\n'.encode())
    found = read_labelled(data(train_files=[str(path)], validation_files=[str(path)]))
    assert found.train.texts == ["naïve", "b"]


def test_the_split_goes_by_content_and_loses_nothing(tmp_path):
    records = labelled(*[number % 2 for number in range(400)])
    one = read_labelled(data(train_files=[write(tmp_path / "a.jsonl", records)]))
    other = read_labelled(data(train_files=[write(tmp_path / "b.jsonl", records[::-1])]))
    held_out = one.validation["validation"].texts
    assert set(held_out) == set(other.validation["validation"].texts)
    assert sorted(one.train.texts + held_out) == sorted(record["text"] for record in records)
    assert 20 <= len(held_out) <= 65


def test_rows_are_the_texts_and_padding_is_masked(tmp_path):
    records = [{"text": "ab", "label": 0}, {"text": "abcdef", "label": 1}, {"text": "x" * 99, "label": 1}]
    file = write(tmp_path / "t.jsonl", records)
    config = config_of("classification", tmp_path, train_files=file, validation_files=file)
    tokenizer = tiny_tokenizer()
    rows = prepare_labelled(config, tokenizer).train
    batch = rows.read([1, 0])
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 2 + [0] * 4]
    assert tokenizer.decode(batch["input_ids"][0]) == "abcdef"
    assert batch["input_ids"][1, 2:].tolist() == [tokenizer.pad_token_id] * 4
    assert batch["labels"].tolist() == [1, 0]
    assert rows.read([2])["input_ids"].shape == (1, 24)


def test_two_texts_of_a_language_model_have_eos_between_and_the_longer_is_cut():
    tokenizer = tiny_tokenizer()
    ids, types = PairEncoder(tokenizer, 10).encode(["abc", "a" * 30], ["de", "bcd"])
    assert types == []
    assert ids[0] == [*tokenizer("abc").input_ids, tokenizer.eos_token_id, *tokenizer("de").input_ids]
    assert ids[1] == [*tokenizer("a" * 6).input_ids, tokenizer.eos_token_id, *tokenizer("bcd").input_ids]
    assert [len(part) for part in shortened([0] * 30, [1] * 30, 9)] == [4, 5]


@pytest.mark.parametrize(
    ("single", "pair", "before", "after"),
    [
        ("<pad> $A", "$A $B", ["<pad>"], []),
        ("<pad> $A <eos>", "<pad> $A $B <eos>", ["<pad>"], ["<eos>"]),
        ("$A <eos>", "$A $B", [], ["<eos>"]),
    ],
)
def test_two_texts_have_around_them_what_a_single_text_has(single, pair, before, after):
    tokenizer = tiny_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<pad>", "<eos>")]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=special)
    ((ids, cut), _) = PairEncoder(tokenizer, 12).encode(["abc", "a" * 30], ["de", "bcd"])
    around = [tokenizer.convert_tokens_to_ids(tokens) for tokens in (before, after)]
    plain = tiny_tokenizer()
    joined = [*plain("abc").input_ids, tokenizer.eos_token_id, *plain("de").input_ids]
    assert ids == [*around[0], *joined, *around[1]]
    assert len(cut) == 12
    assert cut[len(cut) - len(after) :] == around[1]


def test_a_tokenizer_of_another_vocabulary_and_a_model_that_is_too_short():
    with pytest.raises(DataError, match=r"of here gives token id 300, but the model's vocabulary ends at 257"):
        check_ids(300, 258, "here")
    check_ids(257, 258, "here")
    assert longest_input(tiny_llama().config, tiny_tokenizer()) == 64


def answers_of(conversation, tokenizer):
    return tokenizer.decode(conversation.ids[conversation.is_answer])


def test_only_answers_have_a_loss_with_the_tokenizers_template_and_without_one():
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "ciao"},
    ]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    whole = conversation_of({"messages": messages}, "here", data(train_files=["x"]), tokenizer)
    assert answers_of(whole, tokenizer) == "hello</>ciao</>"
    assert (
        tokenizer.decode(whole.ids) == "<system>be kind</><user>hi</><assistant>hello</><user>bye</><assistant>ciao</>"
    )
    plain = tiny_tokenizer()
    set_template(plain, "")
    whole = conversation_of({"messages": messages}, "here", data(train_files=["x"]), plain)
    assert answers_of(whole, plain) == " hello<eos>\n ciao<eos>\n"


def test_the_first_word_of_an_answer_has_a_loss_with_a_trained_tokenizer(tmp_path):
    """Byte-level BPE makes one token of a blank and the word behind it, in training as when it answers."""
    train_tokenizer(["user: is it so\nassistant: yes it is\n"] * 50, 320, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    set_template(tokenizer, "")
    messages = [{"role": "user", "content": "is it so"}, {"role": "assistant", "content": "yes"}]
    whole = conversation_of({"messages": messages}, "here", data(train_files=["x"]), tokenizer)
    assert answers_of(whole, tokenizer) == f" yes{tokenizer.eos_token}\n"
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(asked, add_special_tokens=False).input_ids
    assert list(whole.ids[: len(prompt)]) == prompt
    assert not whole.is_answer[: len(prompt)].any() and whole.is_answer[len(prompt) :].all()  # noqa: PT018


def test_a_conversation_may_start_with_the_assistant():
    tokenizer = tiny_tokenizer()
    set_template(tokenizer, "")
    messages = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}]
    whole = conversation_of({"messages": messages}, "here", data(train_files=["x"]), tokenizer)
    assert answers_of(whole, tokenizer) == "assistant: hello<eos>\n"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": "hi"}, r"here: 'messages' must be a list of messages"),
        ({"messages": [{"role": "user"}]}, r"must be a list of messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, r"no message of the role assistant"),
        ({"text": "x"}, r"here: no field 'messages'; it has text"),
    ],
)
def test_records_that_are_no_conversation(record, message):
    tokenizer = tiny_tokenizer()
    set_template(tokenizer, "")
    with pytest.raises(DataError, match=message):
        conversation_of(record, "here", data(train_files=["x"]), tokenizer)


def test_templates_that_cannot_be_used(tmp_path):
    tokenizer = tiny_tokenizer()
    with pytest.raises(ConfigError, match=r"data.chat_template = .*none.jinja cannot be read"):
        set_template(tokenizer, str(tmp_path / "none.jinja"))
    # The beginning changes with the number of messages: where an answer is, is not known.
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError, match=r"writes what came before an answer in another way"):
        conversation_of(record, "here", data(train_files=["x"]), tokenizer)
    tokenizer.chat_template = "the same words always"
    with pytest.raises(DataError, match=r"here: the chat template writes nothing of what the assistant says"):
        conversation_of(record, "here", data(train_files=["x"]), tokenizer)
    # An answer without words is not the template's doing.
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    record["messages"][1]["content"] = ""
    assert not conversation_of(record, "here", data(train_files=["x"]), tokenizer).is_answer.any()


def conversations(lengths):
    ids = [np.arange(size, dtype=np.int32) + 10 * number for number, size in enumerate(lengths)]
    return [Conversation(row, np.arange(len(row)) % 2 == 1) for row in ids]


def test_packing_keeps_conversations_whole_and_fills_rows():
    lengths = [3, 9, 5, 1, 10, 7, 2, 2]
    rows = list(packed(conversations(lengths), 10))
    assert sorted(len(one.ids) for row in rows for one in row) == sorted(lengths)
    assert all(sum(len(one.ids) for one in row) <= 10 for row in rows)
    # 39 tokens: no packing into rows of 10 needs fewer.
    assert len(rows) == 4


def test_a_packed_conversation_is_seen_as_if_it_were_alone(tmp_path):
    records = [
        {"messages": [{"role": "user", "content": u}, {"role": "assistant", "content": a}]}
        for u, a in (("ab", "c"), ("d", "ef"), ("gh", "ij"))
    ]
    file = write(tmp_path / "chat.jsonl", records)
    config = config_of("instruction", tmp_path, train_files=file, validation_files=file)
    tokenizer, model = tiny_tokenizer(), tiny_llama().double()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    rows = prepare_conversations(config, tokenizer).train
    assert len(rows) == 1
    batch = rows.read([0])
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    together = model(**inputs).logits[0]
    place = 0
    for text in ("ghij", "abc", "def"):
        ids = torch.tensor([tokenizer(text).input_ids])
        alone = model(ids).logits[0]
        assert torch.allclose(together[place : place + len(text)], alone, atol=1e-10), text
        place += len(text)
    assert tokenizer.decode(batch["labels"][0][batch["labels"][0] >= 0]) == "ijcef"
    # Without the mask they see each other.
    assert not torch.allclose(model(batch["input_ids"]).logits[0, 4:7], together[4:7], atol=1e-3)


def test_padded_rows_hold_one_conversation():
    rows = rows_of(conversations([3, 4]), 6, 99, is_packed=False)
    assert rows["tokens"].tolist() == [[0, 1, 2, 99, 99, 99], [10, 11, 12, 13, 99, 99]]
    assert rows["labels"].tolist() == [[-100, 1, -100, -100, -100, -100], [-100, 11, -100, 13, -100, -100]]


def write_glue(folder, task, **splits):
    (folder / task).mkdir(parents=True, exist_ok=True)
    for split, columns in splits.items():
        pq.write_table(pa.table(columns), folder / task / f"{split}-00000-of-00001.parquet")


def test_glue_from_a_folder(tmp_path, monkeypatch):
    pairs = {"premise": ["a", "b", "c"], "hypothesis": ["d", "e", "f"], "label": [0, 2, 1]}
    write_glue(tmp_path, "mnli", train=pairs, validation_matched=pairs, validation_mismatched=pairs)
    sets = read_labelled(data(glue="mnli", glue_dataset=str(tmp_path)))
    assert list(sets.validation) == ["validation_matched", "validation_mismatched"]
    assert (sets.train.texts, sets.train.pairs, sets.train.labels) == (["a", "b", "c"], ["d", "e", "f"], [0, 2, 1])
    assert sets.label_names == ["0", "1", "2"]
    scores = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0.5, 4.75]}
    write_glue(tmp_path, "stsb", train=scores, validation=scores)
    config = config_of("classification", tmp_path, glue="stsb", glue_dataset=tmp_path)
    prepared = prepare_labelled(config, tiny_tokenizer())
    assert prepared.label_names == []
    assert prepared.train.read([1, 0])["labels"].tolist() == [4.75, 0.5]
    assert [main_metric(config_of("classification", tmp_path, glue=task)) for task in ("stsb", "cola", "qqp")] == [
        "pearson",
        "matthews",
        "accuracy",
    ]
    write_glue(tmp_path, "cola", train={"text": ["a"], "label": [1]})
    with pytest.raises(DataError, match=r"GLUE cola, train: record 1 has no sentence; it has text, label"):
        read_labelled(data(glue="cola", glue_dataset=str(tmp_path)))
    for label, text, message in (
        (2, "b", "validation:1: label 2 is outside"),
        (None, "b", "must be a number"),
        (1, None, "field 'sentence' is NoneType"),
    ):
        shutil.rmtree(tmp_path / "sst2", ignore_errors=True)
        train = {"sentence": ["a", "b"], "label": [0, 1]}
        write_glue(tmp_path, "sst2", train=train, validation={"sentence": [text], "label": [label]})
        with pytest.raises(DataError, match=message):
            read_labelled(data(glue="sst2", glue_dataset=str(tmp_path)))
    for split in ("train", "validation"):
        for label in (float("nan"), float("inf")):
            write_glue(
                tmp_path, "stsb", **{"train": scores, "validation": scores, split: scores | {"label": [0.5, label]}}
            )
            with pytest.raises(DataError, match=rf"stsb, {split}:2: label {label}: must be a number"):
                read_labelled(data(glue="stsb", glue_dataset=str(tmp_path)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"HF_HUB_OFFLINE is set: data.glue = rte is read from nobody/glue"):
        read_labelled(data(glue="rte", glue_dataset="nobody/glue"))


def test_a_key_of_another_task_is_refused():
    with pytest.raises(ConfigError, match=r"data.label_field = y with task = text: only classification uses it"):
        compose("finetune", ["source=gpt2", "task=text", "data.train_files=[a]", "data.label_field=y"])
    with pytest.raises(ConfigError, match=r"glue = sst2 with train_files: take the one or the other"):
        data(glue="sst2", train_files=["x"])
