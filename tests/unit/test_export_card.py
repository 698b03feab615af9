"""What `lost export` writes about a model, and what it sends to a hub: a server of our own plays the hub."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from lost.export import adapted_card, save_folder
from lost.export.card import license_fields
from lost.export.hub import describe_push, push_folder
from lost.testing.runs import lost_here, tiny_run, write_corpus
from lost.testing.tiny import tiny_llama, tiny_tokenizer
from lost.utils.errors import LostError

FOREIGN = """---
license: mit
tags:
- test
---

# Somebody's model

## Use

Old words.

## Limits

Many.
"""


def test_a_card_that_came_with_a_model_keeps_its_words():
    card = adapted_card(FOREIGN, "self_contained", "", [])
    assert "trust_remote_code=True" in card
    assert "Old words" not in card
    assert card.index("## Use") < card.index("## Limits")
    assert ModelCard(card).data.license == "mit"
    card = adapted_card(FOREIGN, "lost", "apache-2.0", ["| a | b |"])
    assert ModelCard(card).data.license == "apache-2.0"
    assert ModelCard(card).data.tags == ["test"]
    assert "import lost.model" in card
    assert card.rstrip().endswith("| a | b |")
    bare = adapted_card("# Bare\n\nWords.\n", "dense", "mit", [])
    assert ModelCard(bare).data.license == "mit"
    assert "Words." in bare
    assert "import lost" not in bare
    assert "trust_remote_code" not in bare
    # The same again changes nothing more.
    assert adapted_card(bare, "dense", "mit", []) == bare


def test_a_licence_replaces_a_list_and_leaves_the_other_fields_as_they_are():
    card = "---\nlicense:\n- apache-2.0\n- other\nlicense_name: mine\nlicense_link: LICENSE\nlanguage: no\n---\n# A\n"
    data = ModelCard(adapted_card(card, "dense", "mit", [])).data.to_dict()
    assert data == {"license": "mit", "language": "no"}
    assert license_fields(card) == {
        "license": ["apache-2.0", "other"],
        "license_name": "mine",
        "license_link": "LICENSE",
    }
    assert license_fields("# No header\n") == license_fields("---\n- a: [\n---\n# Bad\n") == {"license": "unknown"}
    bad = adapted_card("---\n- a: [\n---\n# Bad\n", "dense", "mit", [])
    assert ModelCard(bad).data.to_dict() == {"license": "mit"}
    assert "a: [" not in bad


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with identity activation, whose layers have a dense form."""
    folder = tmp_path_factory.mktemp("run")
    arguments = tiny_run(
        folder / "run", write_corpus(folder), "train.max_steps=4", "parameterization.activation=identity"
    )
    assert lost_here(*arguments) == 0
    return folder / "run"


def test_the_card_of_a_run_in_another_form_has_training_facts_evaluation_and_licence(run, tmp_path):
    result = tmp_path / "result.json"
    assert lost_here("evaluate", f"source={run}", f"to={result}") == 0
    found = json.loads(result.read_text())["sets"]["validation"]
    options = [f"evaluations=[{result}]", "license=apache-2.0", "form=dense"]
    assert lost_here("export", f"source={run}", f"to={tmp_path / 'out'}", *options) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for expected in (
        "| steps | 4 |",
        "| parameterization | lost |",
        "each projection multiplied out to one matrix",
        f"| text_files: validation, rows of 32 tokens | perplexity | {found['perplexity']:.4g} |",
        f"| {found['perplexity_standard_error']:.4g} |",
    ):
        assert expected in card, expected
    assert "import lost" not in card
    assert ModelCard(card).data.license == "apache-2.0"
    assert not {"lost", "low-rank", "sparse"} & set(ModelCard(card).data.tags)
    num_parameters = sum(value.numel() for value in load_file(tmp_path / "out" / "model.safetensors").values())
    assert f"| parameters | {num_parameters:,} (" in card


def test_an_evaluation_of_another_model_is_refused(run, tmp_path, capsys):
    other = save_folder(tiny_llama(), tiny_tokenizer(), tmp_path / "other", "card")
    result = tmp_path / "result.json"
    data = [f"data.train_files=[{run.parent / 'corpus.jsonl'}]", "data.validation_fraction=0.1"]
    assert lost_here("evaluate", f"source={other}", "data=text_files", *data, "seq_len=32", f"to={result}") == 0
    out = tmp_path / "out"
    assert lost_here("export", f"source={run}", f"to={out}", f"evaluations=[{result}]") == 2
    assert "is about" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("[]")
    assert lost_here("export", f"source={run}", f"to={out}", f"evaluations=[{tmp_path / 'bad.json'}]") == 2
    assert "is no JSON file of `lost evaluate`" in capsys.readouterr().err
    assert not out.exists()


class Hub(BaseHTTPRequestHandler):
    """The hub's answers to what an upload asks; keeps the requests."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        if "/commit/" in self.path and self.server.refuses:
            return self.answer(403, {"error": "you may not"})
        if self.path == "/api/repos/create":
            return self.answer(200, {"url": f"{self.server.address}/somebody/model"})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            return self.answer(200, {"files": files})
        return self.answer(200, {"commitUrl": f"{self.server.address}/somebody/model/commit/1", "commitOid": "1" * 40})

    def do_GET(self):
        self.answer(200, {"id": "somebody/model", "sha": "0" * 40, "siblings": [], "private": True})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.refuses = [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.address = endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for place in ("huggingface_hub.constants.ENDPOINT", "huggingface_hub.hf_api.ENDPOINT"):
        monkeypatch.setattr(place, endpoint, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def sent_files(server):
    (body,) = [body for path, _, body in server.requests if "/commit/" in path]
    lines = [json.loads(line) for line in body.splitlines()]
    return {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }


def test_push_sends_every_file_in_one_commit(hub, tmp_path, capsys):
    source = save_folder(tiny_llama(), tiny_tokenizer(), tmp_path / "source", FOREIGN)
    to = tmp_path / "out"
    assert lost_here("export", f"source={source}", f"to={to}", "push=somebody/model", "dry_run=false") == 0
    sent = sent_files(hub)
    assert sent == {path.name: path.read_bytes() for path in to.iterdir()}
    created = next(json.loads(body) for path, _, body in hub.requests if path == "/api/repos/create")
    assert created.get("visibility") == "private" or created.get("private") is True
    assert all(token == "Bearer hf_test" for _, token, _ in hub.requests)
    assert f"{hub.address}/somebody/model/commit/1" in capsys.readouterr().out


def test_a_dry_run_names_what_would_be_sent_and_sends_nothing(hub, tmp_path, capsys):
    source = save_folder(tiny_llama(), tiny_tokenizer(), tmp_path / "source", FOREIGN)
    assert lost_here("export", f"source={source}", f"to={tmp_path / 'out'}", "push=somebody/model") == 0
    printed = capsys.readouterr().out
    for path in (tmp_path / "out").iterdir():
        assert f"{path.name} ({path.stat().st_size:,} bytes)" in printed
    assert "Nothing was sent" in printed
    assert "private if it is new" in printed
    assert hub.requests == []
    assert "public if it is new" in describe_push(tmp_path / "out", "a/b", private=False)


def test_a_hub_that_refuses_leaves_the_folder_and_says_why(hub, tmp_path):
    hub.refuses = True
    folder = save_folder(tiny_llama(), tiny_tokenizer(), tmp_path / "out", FOREIGN)
    with pytest.raises(LostError, match=r"(?s)push = somebody/model: the hub did not take it: .*hf upload"):
        push_folder(folder, "somebody/model", private=True)


def test_push_without_hub_or_token_stops_before_anything_is_written(tmp_path, capsys, monkeypatch):
    source = save_folder(tiny_llama(), tiny_tokenizer(), tmp_path / "source", FOREIGN)
    command = ["export", f"source={source}", f"to={tmp_path / 'out'}", "push=somebody/model", "dry_run=false"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert lost_here(*command) == 2
    assert "push = somebody/model sends files to it" in capsys.readouterr().err
    assert lost_here(*command[:-2], "push=no-owner", "max_shard_size=5", "private=false") == 2
    message = capsys.readouterr().err
    assert "push = no-owner: must be <owner>/<name>" in message
    assert "max_shard_size = 5: must be" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("hub")
def test_push_without_a_token_stops_before_anything_is_written(tmp_path, capsys, monkeypatch):
    source = save_folder(tiny_llama(), tiny_tokenizer(), tmp_path / "source", FOREIGN)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    to = tmp_path / "out"
    assert lost_here("export", f"source={source}", f"to={to}", "push=somebody/model", "dry_run=false") == 2
    assert "hf auth login" in capsys.readouterr().err
    assert not to.exists()
