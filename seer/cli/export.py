"""`seer export`: a run's weights as a file that others load."""

from __future__ import annotations

from seer.cli.arguments import Arguments, path
from seer.errors import UserError
from seer.files import refuse_address

HELP = """\
Examples:
  seer export --run RUN --format timm --out regnety.safetensors

Writes the backbone of a run's newest checkpoint; the run may still be living. The file's metadata says how the network
is built, how images are prepared, and which lines of Python load it with timm.
"""


def run(argv: list[str]) -> int:
    """Exit code of `seer export ARGV`."""
    arguments = Arguments("seer export", HELP)
    arguments.add_argument("--run", required=True, metavar="RUN", help="the run's folder")
    arguments.add_argument("--format", choices=["timm"], default="timm", help="whose names the weights have")
    arguments.add_argument("--out", required=True, type=path, metavar="FILE", help="the file, *.safetensors")
    given = arguments.parse(argv)
    refuse_address(given.out)
    if given.out.suffix != ".safetensors":
        example = given.out / "regnety.safetensors" if given.out.is_dir() else f"{given.out}.safetensors"
        raise UserError(
            f"--out {given.out}", "timm chooses the loader by the ending .safetensors", f"use --out {example}"
        )
    # torch is imported from here on, so that help and misspelt options answer at once.
    from seer.cli.saved_run import load_run
    from seer.handoff.timm_format import export_timm, timm_snippet

    saved = load_run(given.run)
    out = export_timm(saved.backbone, given.out, image_size=saved.config.data.large.size, step=saved.step)
    print(f"{out}: {saved.config.backbone.name}, step {saved.step}. To load it:\n")
    print(timm_snippet(saved.backbone.architecture(), out), end="")
    return 0
