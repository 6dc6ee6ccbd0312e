import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seer.amounts import said
from seer.cli.shards import HELP, _bytes, run
from seer.errors import UserError

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data_shards" / "sample"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("a/1.jpg", "a/2.jpg", "b/3.png", "b/notes.txt"):
        (tmp_path / "my photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "my photos" / name).write_bytes(name.encode())
    return tmp_path / "my photos"


def test_pack_then_index_then_verify(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out [1]"
    words = ["pack", str(photos), "--out", str(out), "--labels", "folders", "--workers", "1"]
    assert run(words) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    left_out, summary, following = printed.out.splitlines()
    assert left_out == "left out: files .txt (1)"
    assert summary.startswith(f"{out}: 3 images in 1 shard, 10.2 kB, 2 classes (")
    assert following == f"next: seer train data.shards='{out}/*.tar' experiment=small run_dir=runs/mine"
    assert run(words) == 0
    assert "already there" in capsys.readouterr().out
    assert run(["verify", f"{out}/*.tar"]) == 0
    assert "1 shard: every byte is as it was indexed" in capsys.readouterr().out
    assert run(["index", f"{out}/*.tar"]) == 0
    assert "3 images in 1 shard, 3 with a label (1 had their index before" in capsys.readouterr().out


def test_verify_names_what_is_damaged_and_fails(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["pack", str(photos), "--out", str(tmp_path / "out"), "--workers", "1"])
    tar = tmp_path / "out" / "out-000000.tar"
    tar.write_bytes(tar.read_bytes()[:1500])
    capsys.readouterr()
    assert run(["verify", f"{tmp_path}/out/*.tar"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and str(tar) in printed.err.splitlines()[0]


def test_index_elsewhere_tells_how_to_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["index", f"{SAMPLE}/val/*.tar", "--index-dir", str(tmp_path), "--workers", "1"]) == 0
    assert f"data.shards='{SAMPLE}/val/*.tar' data.index_dir={tmp_path} " in capsys.readouterr().out


def test_export_to_others_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(SAMPLE / "val", tmp_path / "val")
    tar, file = tmp_path / "val" / "val-000000.tar", tmp_path / "val" / "set.json"
    assert run(["export", str(tar), "--wids", str(file), "--dali", "--workers", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{file}: 20 samples in 1 shard",
        "NAME.idx beside the tars: 20 samples in 1 shard",
    ]
    assert run(["index", str(file), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "20 images in 1 shard, 20 with a label (1 had their index before" in printed
    assert printed.splitlines()[-1] == f"next: seer train data.shards={file} experiment=small run_dir=runs/mine"
    assert run(["verify", str(file)]) == 0

    idx = tar.with_suffix(".idx")
    _, _, *lines = idx.read_text().splitlines()
    idx.write_text("\n".join(["v1.2 19", *lines]))
    capsys.readouterr()
    assert run(["index", str(tar), "--from-dali", "--workers", "1"]) == 0
    assert capsys.readouterr().out.startswith("1 images are not listed and are left out\n19 images in 1 shard, ")

    assert run(["index", str(tar)]) == 0
    assert capsys.readouterr().out.startswith("1 indexes hold only samples of a former --from-dali; delete them")

    assert run(["export", str(tar), "--dali", str(tmp_path / "idx"), "--wids", f"{tmp_path}/idx/a.json"]) == 0
    assert "1 shard not below its folder: listed by absolute path" in capsys.readouterr().out
    assert run(["index", str(tar), "--from-dali", str(tmp_path / "idx")]) == 0
    assert "20 images in 1 shard" in capsys.readouterr().out
    file.write_text(file.read_text().replace('"nsamples": 20', '"nsamples": 21'))
    with pytest.raises(UserError, match=r"val-000000\.tar has 20 samples, .*set\.json lists 21: "):
        run(["index", str(file)])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["pakc"], "there is no such verb; did you mean 'pack'?"),
        (["pack", "x"], "the following arguments are required: --out"),
        (["pack", "x", "--out", "y", "--labels", "foldrs"], "invalid choice"),
        (["pack", "x", "--out", "y", "--size", "big"], "'big' is no size"),
        (["pack", "x", "--out", "y", "--size", "0MB"], "is no size"),
        (["pack", "x", "--out", "y", "--workers", "0"], "is no positive whole number"),
        (["pack", "x", "--out", "y", "--samples", "5", "--size", "1MB"], "not allowed with"),
        (["pack", "x", "--out", "y", "--wat"], "seer shards pack --wat: there is no such option"),
        (["verify"], "required: TARS"),
        (["export", f"{SAMPLE}/val/*.tar"], "add --wids FILE.json or --dali"),
        (["export", "--dali", f"{SAMPLE}/val/*.tar"], "required: TARS"),
        (["export", f"{SAMPLE}/val/*.tar", "--wids", "set"], "a list of wids is named FILE.json; write set.json"),
        (["export", f"{SAMPLE}/val/*.tar", "--dali", "--overwrit"], "did you mean '--overwrite'?"),
        (["index", f"{SAMPLE}/val/*.tar", "--from-dali"], "val-000000.idx cannot be read (No such file or directory)"),
        (["pack", "no-such-folder", "--out", "y"], "no-such-folder cannot be read"),
    ],
)
def test_wrong_words_are_one_line(words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        run(words)
    assert told in str(caught.value).replace("no-such-folder", "no-such-folder") and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_home_folder(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(["pack", "~/my photos", "--out", "~/out", "--labels", "folders", "--workers", "1"]) == 0
    words = ["pack", "~/my photos", "--out", "~/more", "--labels", "folders", "--classes", "~/out", "--workers", "1"]
    assert run(words) == run(["index", "~/out/*.tar", "--index-dir", "~/indexes", "--workers", "1"]) == 0
    assert {"out", "more", "indexes"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("verb", ["pack", "index", "verify", "export"])
def test_help_begins_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run([verb, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.lstrip().startswith(f"Examples:\n  seer shards {verb} ")
    assert run(["--help"]) == 0 and capsys.readouterr().out == HELP


def test_sizes() -> None:
    sizes = {"1": 1, "256MB": 256_000_000, "1.5 gb": 1_500_000_000, "10k": 10_000, "2T": 2 * 10**12}
    assert {text: _bytes(text) for text in sizes} == sizes
    assert [said(size) for size in (7, 999, 10_240, 94_279_680, 2.5e9, 57e12)] == [
        "7 B", "999 B", "10.2 kB", "94.3 MB", "2.5 GB", "57 TB",
    ]  # fmt: skip


def test_packing_imports_no_torch(photos: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from seer.cli.shards import run; "
        "assert run(sys.argv[1:]) == 0; assert 'torch' not in sys.modules and 'webdataset' not in sys.modules"
    )
    command = [sys.executable, "-c", program, "pack", str(photos), "--out", str(tmp_path / "out")]
    start = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert time.monotonic() - start < 30


def test_processes_from_the_command_line(photos: Path, tmp_path: Path) -> None:
    words = ["pack", str(photos), "--out", str(tmp_path / "out"), "--samples", "1", "--workers", "2"]
    assert run(words) == 0
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3
