"""What a person sees: a bar on a terminal, sparse plain lines in a log file, nothing from other processes."""

import io
import math

import pytest
from rich.console import Console

from lost.train.metrics import Progress, count_words, duration_words


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def plain_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=80, soft_wrap=True)


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def line(step: int, loss: float | None = 5.1234, learning_rate: float = 3e-3) -> dict:
    return {"step": step, "loss": loss, "learning_rate": learning_rate, "tokens_per_second": 4096.0, "grad_norm": 1.0}


def test_a_log_file_gets_the_line_of_the_readme():
    console, clock = plain_console(), Clock()
    with Progress(200, console=console, clock=clock) as progress:
        clock.now += 0.5
        progress.update(line(1))
    assert text_of(console) == "step 1/200 | loss 5.123 | lr 3.0e-03 | 4.1k tok/s | 1m40s left\n"


def test_log_lines_come_every_so_many_seconds_and_at_both_ends():
    console, clock = plain_console(), Clock()
    with Progress(100, console=console, clock=clock, every_seconds=10) as progress:
        for step in range(1, 101):
            clock.now += 1
            progress.update(line(step))
    steps = [int(text.split()[1].split("/")[0]) for text in text_of(console).splitlines()]
    assert steps == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]


def test_time_left_of_a_resumed_run_counts_its_own_steps():
    clock = Clock()
    with Progress(100, 60, console=plain_console(), clock=clock) as progress:
        assert progress.seconds_left(60) == math.inf
        clock.now += 20
        assert progress.seconds_left(70) == pytest.approx(20 / 10 * 30)
        assert progress.seconds_left(100) == 0


def test_the_clock_starts_when_the_bar_is_shown():
    clock = Clock()
    progress = Progress(10, console=plain_console(), clock=clock)
    clock.now += 500
    with progress:
        clock.now += 2
        assert progress.seconds_left(1) == pytest.approx(18)


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_a_skipped_step_says_so(loss):
    console = plain_console()
    with Progress(5, console=console) as progress:
        progress.update(line(1, loss=loss))
    assert "step 1/5 | skipped: loss or gradient not finite | lr 3.0e-03 |" in text_of(console)


def test_a_terminal_gets_a_bar_with_all_facts():
    console, clock = terminal(), Clock()
    with Progress(20, console=console, clock=clock) as progress:
        for step in range(1, 11):
            clock.now += 3
            progress.update(line(step, loss=9.0 - step / 10))
    last = text_of(console).rsplit("\r", maxsplit=1)[-1]
    for part in ("10/20", "━", "loss 8.000", "lr 3.0e-03", "4.1k tok/s", "30s left"):
        assert part in last


@pytest.mark.parametrize("width", [76, 80, 120, 250])
def test_the_bar_stays_on_one_line(width):
    console = terminal(width)
    with Progress(100_000, console=console) as progress:
        progress.update(line(12_345, learning_rate=2.5e-4))
    last = text_of(console).rsplit("\r", maxsplit=1)[-1]
    assert "12345/100000" in last
    assert "left" in last
    assert last.count("\n") == 1


def test_messages_stay_above_the_bar():
    console = terminal()
    with Progress(3, console=console) as progress:
        progress.update(line(1))
        progress.print("saved [step_00000001]")
        progress.update(line(2))
    text = text_of(console)
    assert "saved [step_00000001]" in text
    assert text.index("saved [step_00000001]") < text.rindex("2/3")


def test_messages_in_a_log_file_are_plain_lines():
    console = plain_console()
    with Progress(3, console=console) as progress:
        progress.print("evaluating [bold]english[/bold]")
    assert text_of(console) == "evaluating [bold]english[/bold]\n"


@pytest.mark.parametrize("make_console", [terminal, plain_console])
def test_other_processes_show_nothing(make_console):
    console = make_console()
    with Progress(3, console=console, is_main=False) as progress:
        progress.update(line(1))
        progress.print("hello")
    assert text_of(console) == ""


def test_a_long_line_is_not_broken_in_a_log_file():
    console = plain_console()
    with Progress(10**9, console=console) as progress:
        progress.update(line(123_456_789))
        progress.print("x" * 200)
    assert len(text_of(console).splitlines()) == 2


def test_numbers_in_few_characters():
    assert [count_words(value) for value in (0, 412.4, 999.4, 999.6, 4096, 999_960, 3e9)] == [
        "0",
        "412",
        "999",
        "1.0k",
        "4.1k",
        "1.0M",
        "3.0G",
    ]
    seconds = [0, 45, 59.6, 80, 3599, 3600, 11100, 90000, 187200, math.inf, math.nan]
    assert [duration_words(value) for value in seconds] == [
        "0s",
        "45s",
        "1m00s",
        "1m20s",
        "59m59s",
        "1h00m",
        "3h05m",
        "1d01h",
        "2d04h",
        "?",
        "?",
    ]
