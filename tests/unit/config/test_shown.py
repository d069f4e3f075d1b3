"""Text from files as a person may see it: nothing acts on the terminal, nothing is longer than said."""

from __future__ import annotations

import pickle
import time

import pytest

from swinv2_train.config import ConfigError
from swinv2_train.config.command_line import guarded
from swinv2_train.config.shown import MESSAGE_CHARACTERS, NAME_CHARACTERS, shown

HOSTILE = {
    "\x1b[2J\x1b]0;owned\x07": "\\x1b[2J\\x1b]0;owned\\x07",
    "a\rb\nc\td": "a\\rb\\nc\\td",
    "\x9b31m": "\\x9b31m",
    "abc\u202egpj.exe": "abc\\u202egpj.exe",
    "\u2066x\u2069\u200f\ufeff\u200b": "\\u2066x\\u2069\\u200f\\ufeff\\u200b",
    "\udcff": "\\udcff",
    "\u2028\u2029\x7f": "\\u2028\\u2029\\x7f",
    "\U000e0041": "\\U000e0041",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_invisible_is_written_out(text):
    """A class name could clear the screen, set the window's title, or turn the reading direction of a line."""
    assert shown(text) == HOSTILE[text]


@pytest.mark.parametrize(
    "text", ["Zwergspitz", "犬", "é", "e\u0301", "naïve – 90 %", "no\xa0break", "C:\\x1b", "😀", ""]
)
def test_what_can_be_read_stays(text):
    assert shown(text) == text


def test_length_is_bounded_and_said():
    """Both ends stay: the name stands at the one, the remedy at the other."""
    cut = shown("begin" + "x" * 10**6 + "end")
    assert len(cut) <= NAME_CHARACTERS
    assert cut.startswith("begin") and cut.endswith("end") and "characters ...]" in cut
    assert len(shown("\x1b" * 10**6, 300)) <= 300
    assert shown(cut) == cut
    assert shown("x" * NAME_CHARACTERS) == "x" * NAME_CHARACTERS


def test_an_endless_text_costs_no_time():
    started = time.process_time()
    shown("\x1b" * 10**8)
    assert time.process_time() - started < 1


def test_every_error_of_ours_is_escaped_and_cut(capfd):
    """Whoever raises it: all pass by the class."""
    error = ConfigError(f"shards/\x1b[31m.tar: {'y' * 10**6}; fetch it again\nsecond line of ours")
    text = str(error)
    assert "\x1b" not in text and len(text) <= MESSAGE_CHARACTERS
    assert text.endswith("fetch it again\nsecond line of ours")
    assert str(pickle.loads(pickle.dumps(error))) == text


def test_a_line_break_in_a_message_forges_no_line(capfd):
    """A file called "x\\nerror: all is well" looked like two messages."""

    def command() -> int:
        raise ConfigError("a\nerror: forged")

    assert guarded(command) == 2
    assert capfd.readouterr().err == "error: a\n  error: forged\n"


def test_a_traceback_acts_on_no_terminal(capfd):
    def command() -> int:
        raise RuntimeError("\x1b[2Jgone")

    assert guarded(command) == 1
    err = capfd.readouterr().err
    assert "\x1b" not in err and "\\x1b[2Jgone" in err and "Traceback" in err
