"""What a user can do wrong, told in one line: what is wrong, the rule, the remedy."""

import difflib
import re
from collections.abc import Iterable

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://\S+")  # without a bound long words would take minutes
_LONGEST = 5000  # characters of a part of a message: a path has 4,096 at most
_NEAR = 200  # characters: of longer names none is a slip of another, and comparing them takes minutes
_TOLD = 20  # names
EXIT_STOPPED = 75  # of `seer train` (EX_TEMPFAIL): stopped, and the same command goes on


def shown(text: str) -> str:
    """The same text as it may be written anywhere: addresses in it without user, password and query."""

    def redacted(url: re.Match[str]) -> str:
        scheme, rest = url.group().split("://", 1)
        address, mark, query = rest.partition("?")
        # In s3:// and gs:// a ? is part of a pattern, unless values follow it.
        secret = bool(mark) and (scheme not in ("s3", "gs") or "=" in query)
        authority, slash, path = (address if secret else rest).partition("/")
        return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}" + ("?(redacted)" if secret else "")

    return _URL.sub(redacted, text)


def printable(text: str) -> str:
    """The same text for a terminal: what would steer it, or cannot be seen or encoded, as an escape (`\\x1b`).

    Names of files, classes and members are somebody else's: they could clear the screen or forge a line.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


class UserError(ValueError):
    """An error that the user's input caused and the user can mend. Secrets of addresses in its words are taken out.

    The message is one line of printable characters.

    The command line prints it as one line and exits with code 2; everything else is a bug and keeps its traceback.

    Args:
        what: the thing that is wrong, with its value ("train.global_batch_size=50 does not divide by 4 ranks").
        rule: what would have been right ("a global batch is cut into equal parts, one a rank").
        remedy: what to do now ("use 48 or 52").
    """

    def __init__(self, what: str, rule: str, remedy: str) -> None:
        self.what, self.rule, self.remedy = shown(what), shown(rule), shown(remedy)
        parts = (
            text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}...{text[-_LONGEST // 2 :]}"
            for text in (self.what, self.rule, self.remedy)
        )
        super().__init__(printable(" ".join("{}: {}; {}".format(*parts).split())))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        # Exceptions cross process borders (data workers, ranks) by pickle, which would replay the joined message only.
        return type(self), (self.what, self.rule, self.remedy)


class ToldElsewhere(UserError):
    """A user's error that another rank of the run tells: this one leaves with the same exit code, without a word."""


class LostRank(RuntimeError):
    """Another process of the run is gone, or did not answer in time: this one cannot go on by itself."""


def closest(word: str, known: Iterable[str]) -> str:
    """The remedy for a misspelt name: "did you mean 'steps'?", or the list of what there is."""
    names = sorted(known)
    near = difflib.get_close_matches(word[:_NEAR], [name for name in names if len(name) <= _NEAR], n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    more = f" and {len(names) - _TOLD:,} more" * (len(names) > _TOLD)
    return f"there are: {', '.join(names[:_TOLD])}{more}" if names else "there are none"
