"""What is installed is what is in the repository, and the files around the package say what they must."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import seer

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
INSTALLER = "data_shards/install_pillow_simd.sh"


def files(folder: str, *endings: str) -> list[Path]:
    """Paths relative to the repository, byproducts left out."""
    found = [path for ending in endings for path in (ROOT / folder).rglob("*" + ending)]
    return sorted(path.relative_to(ROOT) for path in found if "__pycache__" not in path.parts)


def package_of(folder: Path) -> str:
    name = ".".join(folder.parts)
    return re.sub(r"^conf\b", "seer.conf", name)


def shell_scripts() -> list[Path]:
    return sorted([*files("launch", ".sh"), *files("data_shards", ".sh"), Path(".ci/run")])


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd)


def install_pillow_simd(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run("bash", ROOT / INSTALLER, *arguments)


def test_one_version() -> None:
    assert PROJECT["project"]["version"] == seer.__version__


def test_every_folder_with_code_or_configuration_is_a_listed_package() -> None:
    holding = {package_of(path.parent) for path in files("seer", ".py", ".yaml") + files("conf", ".py", ".yaml")}
    assert holding == set(PROJECT["tool"]["setuptools"]["packages"])


def test_the_wheel_holds_every_module_and_every_configuration_file(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    for path in [*files("seer", ".py", ".yaml", "py.typed"), *files("conf", ".py", ".yaml")]:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes((ROOT / path).read_bytes())
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    out.mkdir()
    # The build hook that pip calls, without pip's isolation, which would need the network.
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    built = run(sys.executable, "-c", build, out, cwd=source)
    assert built.returncode == 0, built.stderr
    (wheel,) = out.glob("seer-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    outside = {
        re.sub(r"^conf/", "seer/conf/", path.as_posix())
        for path in [*files("seer", ".py", "py.typed"), *files("conf", ".py", ".yaml")]
    }
    assert "seer/conf/train.yaml" in inside
    assert inside == outside


@pytest.mark.parametrize("script", shell_scripts(), ids=str)
def test_shell_scripts_parse_and_can_be_run(script: Path) -> None:
    checked = run("bash", "-n", ROOT / script)
    assert checked.returncode == 0, checked.stderr
    assert (ROOT / script).stat().st_mode & 0o111, f"{script} is not executable"


def test_the_image_installs_pillow_simd_by_the_script_and_starts_seer() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.search(rf"^RUN {re.escape(INSTALLER)}\b", dockerfile, re.MULTILINE)
    (simplejpeg,) = PROJECT["project"]["optional-dependencies"]["fast"]
    assert f"'{simplejpeg}'" in dockerfile
    assert re.search(r"^USER (?!root)", dockerfile, re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["seer"\]$', dockerfile, re.MULTILINE)


def test_the_build_context_has_exactly_what_the_image_copies() -> None:
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    copied = {source for line in copies for source in line.split()}
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    assert lines.index("*") < min(number for number, line in enumerate(lines) if line.startswith("!"))
    assert copied == {line[1:] for line in lines if line.startswith("!")}
    assert [source for source in copied if not (ROOT / source).exists()] == []


def test_the_readme_shows_both_commands_at_its_beginning() -> None:
    beginning = (ROOT / "README.md").read_text().splitlines()[:20]
    for command in ("make demo", "make test"):
        assert any(command in line for line in beginning), command


def test_hooks_need_no_network() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"]
    assert {hook["language"] for repo in hooks["repos"] for hook in repo["hooks"]} <= {"system", "pygrep"}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--avx512"], "--no-avx2"), (["/nowhere/python"], "/nowhere/python")],
)
def test_the_pillow_simd_script_refuses_in_one_line(arguments: list[str], word: str) -> None:
    refused = install_pillow_simd(*arguments)
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert refused.stderr.count("\n") == 1
    assert word in refused.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pillow_simd_replaces_pillow_and_everything_agrees(tmp_path: Path) -> None:
    """Compiles for minutes; needs a package index, and root where headers are missing."""
    python = tmp_path / "env" / "bin" / "python"
    assert run(sys.executable, "-m", "venv", tmp_path / "env").returncode == 0
    pillow = run(python, "-m", "pip", "install", "pillow>=11")
    assert pillow.returncode == 0, pillow.stderr

    installed = install_pillow_simd(python)
    if "as root" in installed.stderr:
        pytest.skip(installed.stderr)
    assert installed.returncode == 0, installed.stderr
    assert run(python, "-m", "pip", "check").returncode == 0
    versions = "from importlib.metadata import version; print(version('pillow'), version('pillow-simd'))"
    first, second = run(python, "-c", versions).stdout.split()
    assert first == second and ".post" in first
    webp = "import io; from PIL import Image; b = io.BytesIO(); Image.new('RGB', (9, 7)).save(b, 'WEBP'); "
    assert run(python, "-c", webp + "print(Image.open(b).convert('RGB').size)").stdout == "(9, 7)\n"

    again = install_pillow_simd(python)
    assert again.returncode == 0
    assert "already installed" in again.stdout

    # Its PIL, and everything else from here: all forms of images, and the decoders that are built on it.
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "tests.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    decoders = "from seer.decoders import installed_decoders; print(*installed_decoders())"
    assert run(python, "-c", decoders).stdout == "simplejpeg+pillow-simd pillow-simd simplejpeg\n"
    files = [f"tests/data/test_{name}.py" for name in ("cutters", "crops", "decode", "image_formats", "fuzz_images")]
    tested = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    assert tested.returncode == 0, tested.stdout[-3000:]
