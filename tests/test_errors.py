import time

import pytest

from seer.errors import UserError, closest, printable, shown


@pytest.mark.parametrize(
    "name",
    [
        "\x1b[2J\x1b]0;title\x07",
        "a\nseer: all is well",
        "a\rb",
        "\x9b31m",
        "\u202egnp.exe",
        "\udcff.tar",
        "\ud800",
        "\0",
    ],
)
def test_a_message_is_one_line_that_steers_no_terminal(name: str) -> None:
    message = str(UserError(name, name, name))
    assert message.isprintable() and len(message.splitlines()) == 1
    assert str(message.encode())  # a lone surrogate would not go out


def test_what_can_be_seen_stays_as_it_is() -> None:
    for name in ("Fotos vom Strand/größe 3.tar", "写真.tar", "a%20b#c?d+e", "\U0001f431"):
        assert printable(name) == name
    assert printable("a\x1bb\udcff") == "a\\x1bb\\udcff"


def test_long_words_take_no_time_and_no_screen() -> None:
    began = time.monotonic()
    word = "x" * 10**6
    assert shown(f"{word} https://user:secret@host/x?key=secret").endswith("x https://host/x?(redacted)")
    assert len(str(UserError(word, word, closest(word, [word, "y", *map(str, range(10**4))])))) < 20_000
    assert closest("a", [word]).startswith("there are: ")
    assert closest("a", ["bcd"] * 30).endswith(" and 10 more")
    assert time.monotonic() - began < 5
