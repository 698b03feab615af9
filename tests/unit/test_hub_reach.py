"""A hub that does not answer: known within the limit whatever the server does, before anything heavy is imported."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from lost.cli.reach import require_reachable
from lost.config.compose import compose
from lost.utils import hub
from lost.utils.errors import DataError
from lost.utils.hub import SECONDS_TO_ANSWER, ask_ahead, require_hub

LIMIT = 0.5
# What is promised of the whole command; a busy machine does not delay the check by this much.
PROMISED = 10
HEAVY = ["torch", "transformers", "datasets", "accelerate", "numpy"]


class Server:
    """A port whose `answer(connection)` runs once a connection, in a thread; counts the connections."""

    def __init__(self, answer):
        self.num_connections = 0
        self._answer = answer
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._connections = []
        self.endpoint = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.num_connections += 1
            self._connections.append(connection)
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def close(self):
        with contextlib.suppress(OSError):
            # Closing alone does not wake a thread that waits in accept(). A second close is nothing.
            self._socket.shutdown(socket.SHUT_RDWR)
        for open_socket in (self._socket, *self._connections):
            open_socket.close()


def say_nothing(_):
    pass


def drip(connection):
    """A byte at a time, so that no single read ever waits long."""
    try:
        connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while True:
            connection.sendall(b"x")
            time.sleep(LIMIT / 10)
    except OSError:
        return


def reply(text):
    def answer(connection):
        connection.recv(4096)
        connection.sendall(text)
        connection.close()

    return answer


@pytest.fixture
def serve(monkeypatch):
    """(answer) -> a server that is the hub of this test."""
    servers = []

    def started(answer):
        servers.append(Server(answer))
        monkeypatch.setenv("HF_ENDPOINT", servers[-1].endpoint)
        return servers[-1]

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "SECONDS_TO_ANSWER", LIMIT)
    monkeypatch.setattr(hub, "_asked", {})
    yield started
    for server in servers:
        server.close()


def refused() -> tuple[str, float]:
    """The message of a hub that cannot be used, and the seconds until it was known."""
    started = time.monotonic()
    with pytest.raises(DataError) as error:
        require_hub("WHY", "OTHER")
    return str(error.value), time.monotonic() - started


def test_the_limit_leaves_time_for_the_command_to_start():
    assert SECONDS_TO_ANSWER <= 5


@pytest.mark.parametrize("answer", [say_nothing, drip])
def test_a_server_that_never_ends_its_answer_is_given_up(serve, answer):
    server = serve(answer)
    message, seconds = refused()
    assert message == (
        f"the Hugging Face hub ({server.endpoint}) did not answer within {LIMIT:g} s: WHY. Instead, OTHER"
    )
    assert LIMIT * 0.99 <= seconds < PROMISED
    assert server.num_connections == 1


def test_a_refusing_port_is_known_at_once(serve):
    server = serve(say_nothing)
    server.close()
    message, seconds = refused()
    assert f"({server.endpoint}) cannot be reached" in message
    assert "refused" in message
    assert seconds < PROMISED


def test_an_endpoint_that_is_no_address_is_named(serve, monkeypatch):
    serve(say_nothing)
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    assert "(nonsense) cannot be reached (unknown url type" in refused()[0]


@pytest.mark.parametrize("status", ["200 OK", "404 Not Found", "503 Service Unavailable"])
def test_any_answer_is_one(serve, monkeypatch, status):
    monkeypatch.setattr(hub, "SECONDS_TO_ANSWER", 20)
    serve(reply(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode()))
    require_hub("WHY", "OTHER")


def test_what_is_no_answer_of_a_web_server_is_told(serve, monkeypatch):
    monkeypatch.setattr(hub, "SECONDS_TO_ANSWER", 20)
    serve(reply(b"SSH-2.0-OpenSSH\r\n"))
    assert "cannot be reached (SSH-2.0-OpenSSH" in refused()[0]


def test_a_question_asked_ahead_is_used_once(serve):
    server = serve(say_nothing)
    ask_ahead()
    time.sleep(LIMIT)
    started = time.monotonic()
    assert "did not answer" in refused()[0]
    # Nothing is left to wait for.
    assert hub._asked == {}
    assert server.num_connections == 1
    assert time.monotonic() - started < PROMISED
    assert refused()[1] >= LIMIT * 0.99
    assert server.num_connections == 2


NEED = {
    "c4 and its tokenizer": ("prepare", ["data=c4"], "data.tokenizer = t5-base.*for the documents.*data=text_files"),
    "a tokenizer": ("pretrain", ["data.tokenizer=some/tokens"], "some/tokens.*data.tokenizer=train"),
    "documents of c4": ("pretrain", ["data=c4", "data.tokenizer=train"], "streams allenai/c4.*data=text_files"),
    "documents to evaluate on": ("evaluate", ["source=folder", "data=c4"], "streams allenai/c4.*data=text_files"),
    "a source to go on from": ("pretrain", ["source=some/model"], "source = some/model.*give a folder"),
    "a source of a tokenizer": ("prepare", ["source=some/model"], "source = some/model"),
    "a model to evaluate": ("evaluate", ["source=some/model"], "source = some/model"),
    "a model to write text": ("generate", ["source=some/model"], "source = some/model"),
    "a model to export": ("export", ["source=some/model", "to=out"], "source = some/model"),
}
NEED_NOT = {
    "documents that may be prepared": ("prepare", ["data=c4", "data.tokenizer=train", "data.cache_dir=prepared"]),
    "documents that may be cached": ("prepare", ["data=c4", "data.tokenizer=train", "data.dataset=here/texts"]),
    "a local copy": ("prepare", ["data=c4", "data.tokenizer=train", "data.dataset=folder"]),
    "documents that evaluate may find": ("evaluate", ["source=folder", "data=c4", "data.cache_dir=prepared"]),
    "a trained tokenizer": ("pretrain", []),
    "a folder": ("prepare", ["data.tokenizer=folder/inside", "source=folder"]),
    "a source that prepare does not read": ("prepare", ["source=some/model", "data.tokenizer=folder/inside"]),
    "a tokenizer that evaluate does not read": ("evaluate", ["source=folder", "data.tokenizer=some/tokens"]),
    "what may be cached": ("pretrain", ["data.tokenizer=here/cached"]),
    "a run that goes on": ("pretrain", ["source=some/model", "data.tokenizer=some/tokens", "run_dir=stored"]),
    "arithmetic": ("plan", ["data=c4", "source=some/model"]),
}


@pytest.fixture
def offline_folder(tmp_path, monkeypatch):
    """A folder to be in: folder/inside, prepared rows, a stored run, a small hub cache; the hub is not asked."""
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    (tmp_path / "cache" / "models--here--cached" / "snapshots").mkdir(parents=True)
    (tmp_path / "cache" / "datasets--here--texts" / "snapshots").mkdir(parents=True)
    (tmp_path / "prepared" / "rows" / "0123").mkdir(parents=True)
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LOST_CACHE", str(tmp_path / "nothing"))


@pytest.mark.parametrize("case", NEED)
@pytest.mark.usefixtures("offline_folder")
def test_what_only_the_hub_has_stops_the_command(case):
    command, overrides, message = NEED[case]
    with pytest.raises(DataError, match=message):
        require_reachable(command, compose(command, overrides))


@pytest.mark.parametrize("case", NEED_NOT)
@pytest.mark.usefixtures("offline_folder")
def test_what_may_be_here_is_left_to_the_command(case):
    command, overrides = NEED_NOT[case]
    require_reachable(command, compose(command, overrides))


@pytest.mark.usefixtures("offline_folder")
def test_c4_is_asked_for_in_the_background(serve, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    server = serve(say_nothing)
    require_reachable("prepare", compose("prepare", NEED_NOT["documents that may be prepared"][1]))
    assert list(hub._asked) == [server.endpoint]


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain", "data=c4"],
        ["generate", "source=some/model", "prompt=a"],
        ["pretrain", "data.tokenizer=some/tokens"],
    ],
    ids=["c4", "source", "tokenizer"],
)
def test_a_silent_hub_stops_a_command_before_heavy_imports(serve, tmp_path, arguments):
    """Seconds from the first check to the message, in a process of its own."""
    server = serve(say_nothing)
    code = (
        "import sys, time; from lost.cli import main, reach; from lost.utils import hub\n"
        f"hub.SECONDS_TO_ANSWER = {LIMIT}; check = reach.require_reachable\n"
        "def timed(*arguments):\n"
        "    started = time.monotonic()\n"
        "    try: check(*arguments)\n"
        "    finally: print(time.monotonic() - started)\n"
        "reach.require_reachable = timed; status = main.main(sys.argv[1:])\n"
        f"print([name for name in {HEAVY} if name in sys.modules]); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f"({server.endpoint}) did not answer within {LIMIT:g} s" in done.stderr
    assert "Instead, " in done.stderr
    assert "Traceback" not in done.stderr
    seconds, heavy = done.stdout.splitlines()
    assert LIMIT * 0.99 <= float(seconds) < PROMISED
    assert heavy == "[]"
