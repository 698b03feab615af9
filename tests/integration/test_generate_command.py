"""`lost generate` as a user runs it: streams, files, batches and conversations."""

import io
import json
import sys

import pytest

from lost.export import save_folder
from lost.testing.runs import lost_here
from lost.testing.tiny import tiny_llama, tiny_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/ without and chat/ with a chat template; prompts.jsonl."""
    folder = tmp_path_factory.mktemp("generate")
    tokenizer = tiny_tokenizer()
    save_folder(tiny_llama(max_position_embeddings=128), tokenizer, folder / "model", "card")
    tokenizer.chat_template = CHAT_TEMPLATE
    save_folder(tiny_llama(max_position_embeddings=128), tokenizer, folder / "chat", "card")
    (folder / "prompts.jsonl").write_text('{"prompt": "abc"}\n{"prompt": "a longer one, [x] = {y}"}\n{"prompt": "z"}\n')
    return folder


def test_a_file_in_batches_writes_what_each_prompt_gives(folder, capsys):
    options = [f"source={folder / 'model'}", "max_new_tokens=9", "do_sample=false"]
    files = [f"prompt_file={folder / 'prompts.jsonl'}", f"to={folder / 'out' / 'texts.jsonl'}"]
    assert lost_here("generate", *options, *files, "micro_batch_size=2") == 0
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in (folder / "out" / "texts.jsonl").read_text().splitlines()]
    prompts = ["abc", "a longer one, [x] = {y}", "z"]
    assert [line["prompt"] for line in lines] == prompts
    # One at a time, where tokens are printed as they come.
    assert lost_here("generate", *options, *files) == 0
    assert [json.loads(line) for line in (folder / "out" / "texts.jsonl").read_text().splitlines()] == lines
    streamed = capsys.readouterr().out
    for prompt, line in zip(prompts, lines, strict=True):
        assert lost_here("generate", *options, f"prompt={prompt}") == 0
        alone = capsys.readouterr().out
        assert alone == f"{prompt}{line['completions'][0]}\n"
        assert alone in printed
        assert alone in streamed
    assert "--- prompt 3 of 3" in printed
    assert "--- prompt 3 of 3" in streamed


def test_a_conversation_goes_on_with_what_was_said(folder, capsys, monkeypatch):
    """The second answer is that to both lines and the first answer, by the template."""
    options = [f"source={folder / 'chat'}", "max_new_tokens=6", "do_sample=false"]

    def said(text, *more):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert lost_here("generate", *options, "chat=true", *more) == 0
        return capsys.readouterr().out

    both = said("hi\n\nand now?\n")
    first = said("hi\n")
    assert both.startswith(first)
    answer = first.removesuffix("\n")
    monkeypatch.undo()
    prompt = f"u:hi\na:{answer}\nu:and now?\na:"
    assert lost_here("generate", f"source={folder / 'model'}", *options[1:], f"prompt={prompt}") == 0
    assert capsys.readouterr().out == prompt + both.removeprefix(first)
    # One question: the same as a conversation of one line.
    assert lost_here("generate", *options, "chat=true", "prompt=hi") == 0
    assert capsys.readouterr().out == first
    assert said("hi\n", "system=x") != first


def test_a_line_of_a_file_ends_where_json_says(folder):
    (folder / "signs.jsonl").write_text('{"prompt": "a\u2028b"}\n{"prompt": "c"}\n')
    files = [f"prompt_file={folder / 'signs.jsonl'}", f"to={folder / 'signs_out.jsonl'}"]
    assert lost_here("generate", f"source={folder / 'model'}", "max_new_tokens=2", *files) == 0
    lines = (folder / "signs_out.jsonl").read_text().split("\n")[:-1]
    assert [json.loads(line)["prompt"] for line in lines] == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["source={folder}/model", "chat=true", "prompt=a"], "no chat template"),
        (["source={folder}/model", "chat=true"], "no chat template"),
        (["source={folder}/model", "prompt_file=/no/file"], "cannot be read"),
        (["source={folder}/model", "prompt=a", "to={folder}"], "is a folder: give the name"),
        (["source={folder}/model", "prompt=a", "to={folder}/prompts.jsonl/x"], "prompts.jsonl is no folder that may"),
        (["source={folder}/chat", "chat=true", "prompt={long}"], "max_position_embeddings = 128: shorten the prompt"),
        (
            ["source={folder}/model", "prompt_file={folder}/long.jsonl", "to={folder}/x.jsonl"],
            "128: shorten the prompt",
        ),
        (["source={folder}/model", "prompt=a", "typical_p=0"], "typical_p = 0.0: must be above 0"),
    ],
)
def test_mistakes_exit_2_and_leave_nothing(folder, capsys, arguments, message):
    (folder / "long.jsonl").write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "x" * 200}) + "\n")
    filled = [argument.format(folder=folder, long="x" * 200) for argument in arguments]
    assert lost_here("generate", *filled) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert not (folder / "x.jsonl").exists()
