"""The command line as a user meets it: help at once, one line for what is wrong, honest exit codes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from seer import __version__
from seer.cli import main as cli
from seer.cli.main import VERBS, main
from seer.cli.train import documentation
from seer.compose import VERBS as RECOGNISED
from seer.compose import groups, key_types
from seer.errors import UserError

# Heavy libraries that no help may import, and the time that `seer --help` may take.
HEAVY = ("torch", "numpy", "PIL", "hydra", "omegaconf", "webdataset", "timm", "submitit")
HELP_SECONDS = 0.5


def process(*words: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that runs `seer WORDS`, or this code."""
    command = [sys.executable, *(("-c", code) if code else ("-m", "seer", *words))]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def imported_by(*words: str) -> set[str]:
    """The top-level modules that this command imports."""
    code = (
        f"import sys\nfrom seer.cli.main import main\nmain({list(words)!r})\n"
        "print('MODULES', *{name.partition('.')[0] for name in sys.modules})"
    )
    found = process(code=code)
    assert found.returncode == 0, found.stderr
    return set(found.stdout.splitlines()[-1].split()[1:])


def test_help_names_every_verb_and_begins_with_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == main(["-h"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[1].startswith("  seer shards pack")
    for name, verb in VERBS.items():
        assert f"  {name:10}{verb.summary}" in text


def test_every_verb_is_recognised_in_a_wrong_place() -> None:
    assert {*RECOGNISED} == {*VERBS}


def test_help_answers_at_once() -> None:
    """The best of three: a busy machine must not fail this."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert process("--help").returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < HELP_SECONDS


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["evaluate", "knn", "--help"],
        ["export", "--help"],
        ["preview", "--help"],
        ["launch", "--help"],
    ],
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    assert not imported_by(*words) & set(HEAVY)


def test_shards_help_imports_no_torch() -> None:
    assert "torch" not in imported_by("shards", "--help")


def test_print_config_imports_no_torch() -> None:
    assert "torch" not in imported_by("train", "experiment=demo", "--print-config")


@pytest.mark.parametrize("verb", [*VERBS])
def test_every_verb_has_a_help_that_begins_with_commands(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first == "Examples:" and f"{second} ".startswith(f"  seer {verb} ")


def test_evaluate_and_export_explain_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "knn", "--help"]) == 0
    assert "--max-train" in capsys.readouterr().out
    assert main(["evaluate"]) == 2


def test_train_help_lists_experiments_choices_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-h"]) == 0
    text = capsys.readouterr().out
    for experiment, line in groups()["experiment"].items():
        assert f"  {experiment:12}{line}" in text
    for group, options in groups().items():
        assert group in text and all(option in text for option in options)
    for key in key_types():
        assert f"\n  {key}=" in text


def test_every_key_is_explained_in_a_sentence() -> None:
    found = documentation()
    assert found.keys() == key_types().keys()
    assert [key for key, sentence in found.items() if len(sentence) < 10 or not sentence.endswith(".")] == []
    assert "kNN" not in found["data.large.size"] and "square" in found["data.large.size"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"seer {__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "did you mean 'train'?"),
        (["run_dir=x"], "write seer train run_dir=x"),
        (["train", "train.stps=3"], "did you mean 'train.steps'?"),
        (["train", "experiment=smal", "run_dir=x"], "did you mean 'small'?"),
        (["train", "experiment=small"], "data.shards is empty"),
        (["train", "experiment=demo", "objective.epsilon=0.001"], "objective.epsilon=0.001"),
        (["train"], "run_dir is missing"),
        (["train", "--wat"], "there is no such option"),
        (["evaluate", "knm"], "did you mean 'knn'?"),
        (["evaluate", "knn", "--rnu", "x"], "did you mean '--run'?"),
        (["evaluate", "knn", "--run", "x"], "required: --train, --val"),
        (["evaluate", "knn", "--run", "x", "--train", "a", "--val", "b", "--k", "0"], "no positive whole number"),
        (["export", "--run", "x", "--out", "y", "--format", "tensorflow"], "invalid choice: 'tensorflow'"),
        (["export", "--run", "x", "--out", "y", "z"], "belongs to no option"),
        (["export", "--out", "y"], "required: --run"),
        (["preview", "experiment=small"], "required: --out"),
        (["preview", "experiment=small", "--out", "x.png"], "data.shards is empty"),
        (["preview", "experiment=smal", "--out", "x.png"], "did you mean 'small'?"),
        (["preview", "train.stps=3", "--out", "x.png"], "did you mean 'train.steps'?"),
        (["preview", "SHARDS/*.tar", "--out", "x.png"], "data.shards='SHARDS/*.tar'"),
        (["preview", "data.shards=none.tar", "--out", "x.png"], "no shard matches none.tar"),
        (["preview", "data.shards=a", "--out", "x.png", "train.steps=7", "--batch", "7"], "use 6 at most"),
        (["preview", "data.shards=a", "--out", "x.png", "--batch", "-1"], "no whole number of 0 or more"),
        (["preview", "data.shards=a", "--out", "x.png", "--images", "65"], "use 64 at most"),
        (["preview", "data.shards=a", "--out", "x.png", "--imags", "6"], "did you mean '--images'?"),
        (["preview", "data.shards=a", "--out", "x.jpg"], "it ends in .png"),
        (["preview", "--run", "x", "--out", "x.png"], "x does not exist"),
        (["preview", "--run", "x", "--out", "x.png", "seed=1"], "--run and seed=1"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, error = capsys.readouterr()
    assert error.startswith("seer: ") and error.count("\n") == 1 and error.endswith("\n")
    assert message in error
    assert out == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (UserError("a", "b", "c"), 2, "seer: a: b; c\n"),
        (KeyboardInterrupt(), 130, "seer: interrupted\n"),
    ],
)
def test_exceptions_become_exit_codes(
    raised: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(argv: list[str]) -> int:
        raise raised

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(run=run))
    assert main(["train"]) == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("raised", [ValueError("a bug"), BrokenPipeError("a worker's pipe")])
def test_bugs_keep_their_traceback(raised: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(argv: list[str]) -> int:
        raise raised

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(run=run))
    with pytest.raises(type(raised)):
        main(["train"])


def test_the_exit_code_of_a_verb_is_that_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []

    def run(argv: list[str]) -> int:
        given.append(argv)
        return 75

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(run=run))
    assert main(["train", "a=b", "c"]) == 75
    assert given == [["a=b", "c"]]


def test_a_reader_that_leaves_is_no_bug() -> None:
    """As in `seer train --help | head -1`, where the reader is gone before everything is written."""
    read, write = os.pipe()
    os.close(read)
    try:
        found = subprocess.run(
            [sys.executable, "-m", "seer", "train", "--help"], stdout=write, stderr=subprocess.PIPE, timeout=60
        )
    finally:
        os.close(write)
    assert (found.returncode, found.stderr) == (141, b"")


def test_print_config_shows_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--print-config", "experiment=demo", "data.shards=a-{0..9}.tar", "run_dir=2024_01"]) == 0
    text = capsys.readouterr().out
    assert "run_dir: 2024_01\n" in text.replace("'", "") and "a-{0..9}.tar" in text and "epsilon: 0.02" in text


def test_closed_streams_are_no_fault(tmp_path: Path) -> None:
    for closed in (">&-", "2>&-", "<&- >&- 2>&-"):
        for words, code in (("--version", 0), ("shards stats no.tar", 2), ("nothing", 2)):
            done = subprocess.run(
                ["sh", "-c", f"{sys.executable} -m seer {words} {closed}"], capture_output=True, text=True, check=False
            )
            assert (done.returncode, "Traceback" in done.stderr) == (code, False), (closed, words, done.stderr)


def test_names_that_the_terminal_cannot_write(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in (b"a.jpg", b"b.\xff", b"c.\x1b[2J"):
        with open(os.path.join(os.fsencode(photos), name), "wb") as file:
            file.write(b"image")
    out = os.path.join(os.fsencode(tmp_path), b"gr\xc3\xb6\xff")
    command = [sys.executable, "-m", "seer", "shards", "pack", str(photos), "--out", out, "--workers", "1"]
    for encoding in ("utf-8", "ascii"):
        done = subprocess.run(
            command, capture_output=True, check=False, env=os.environ | {"PYTHONIOENCODING": encoding}
        )
        assert done.returncode == 0, done.stderr
        assert b"files .\\x1b[2j" in done.stdout and b"\x1b" not in done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_the_exit_code_tells_where_nobody_hears() -> None:
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-m", "seer", "nothing"], stderr=full, check=False).returncode == 2


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EFBIG])
def test_limits_of_a_process_are_told(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cli, "_dispatch", refused)
    assert main([]) == 2
    assert os.strerror(number) in capsys.readouterr().err
