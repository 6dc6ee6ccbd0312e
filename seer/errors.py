"""What a user can do wrong, told in one line: what is wrong, the rule, the remedy."""

import difflib
import re
from collections.abc import Iterable

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")
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


class UserError(ValueError):
    """An error that the user's input caused and the user can mend. Secrets of addresses in its words are taken out.

    The command line prints it as one line and exits with code 2; everything else is a bug and keeps its traceback.

    Args:
        what: the thing that is wrong, with its value ("train.global_batch_size=50 does not divide by 4 ranks").
        rule: what would have been right ("a global batch is cut into equal parts, one a rank").
        remedy: what to do now ("use 48 or 52").
    """

    def __init__(self, what: str, rule: str, remedy: str) -> None:
        self.what, self.rule, self.remedy = shown(what), shown(rule), shown(remedy)
        super().__init__(" ".join(f"{self.what}: {self.rule}; {self.remedy}".split()))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        # Exceptions cross process borders (data workers, ranks) by pickle, which would replay the joined message only.
        return type(self), (self.what, self.rule, self.remedy)


class ToldElsewhere(UserError):
    """A user's error that another rank of the run tells: this one leaves with the same exit code, without a word."""


def closest(word: str, known: Iterable[str]) -> str:
    """The remedy for a misspelt name: "did you mean 'steps'?", or the list of what there is."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return "there are: " + ", ".join(names) if names else "there are none"
