"""What a user can do wrong, told in one line: what is wrong, the rule, the remedy."""

import difflib
from collections.abc import Iterable

EXIT_STOPPED = 75  # of `seer train` (EX_TEMPFAIL): stopped, and the same command goes on


class UserError(ValueError):
    """An error that the user's input caused and the user can mend.

    The command line prints it as one line and exits with code 2; everything else is a bug and keeps its traceback.

    Args:
        what: the thing that is wrong, with its value ("train.global_batch_size=50 does not divide by 4 ranks").
        rule: what would have been right ("a global batch is cut into equal parts, one a rank").
        remedy: what to do now ("use 48 or 52").
    """

    def __init__(self, what: str, rule: str, remedy: str) -> None:
        self.what, self.rule, self.remedy = what, rule, remedy
        super().__init__(" ".join(f"{what}: {rule}; {remedy}".split()))

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
