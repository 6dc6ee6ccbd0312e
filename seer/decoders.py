"""Which libraries make crops of image files here: their names, what is installed, what to install (free of torch)."""

from __future__ import annotations

from collections.abc import Sequence

from seer.errors import UserError

# The fastest first (benchmarks/bench_loader.py). Bad images are the same in all, because Pillow judges them; crops
# differ by a level or so in 255.
#   simplejpeg    decodes JPEGs, torch resizes; Pillow, of either build, decodes other formats
#   pillow-simd   a build of Pillow that resizes faster; the plain one is then not there
DECODERS = ("simplejpeg+pillow-simd", "pillow-simd", "simplejpeg", "pillow")

PILLOW_SIMD = "data_shards/install_pillow_simd.sh"
_REMEDIES = {
    "simplejpeg": "pip install 'seer[fast]'",
    "pillow-simd": PILLOW_SIMD,
    "pillow": "pip uninstall pillow-simd && pip install --force-reinstall pillow",
}
# What simplejpeg gains where it is missing.
_GAINS = {"pillow": "about twice as fast", "pillow-simd": "about a tenth faster"}


def installed_decoders() -> list[str]:
    """Those of `DECODERS` that this environment has, the fastest first."""
    import PIL

    # Versions of pillow-simd end in .postN.
    parts = {"pillow-simd" if ".post" in PIL.__version__ else "pillow"}
    try:
        import simplejpeg
    except ImportError:
        pass
    else:
        parts.add(simplejpeg.__name__)
    return [name for name in DECODERS if parts.issuperset(name.split("+"))]


def require_decoder(decoder: str, installed: Sequence[str]) -> None:
    """Refuses a decoder that is not among the installed ones.

    Raises:
        UserError: with what to install.
    """
    if decoder not in installed:
        missing = [part for part in decoder.split("+") if part not in installed]
        raise UserError(
            f"data.decoder={decoder} is not installed (there is {', '.join(installed)})",
            "all processes of a run decode alike, as long as it goes on",
            " && ".join(_REMEDIES[part] for part in missing),
        )


def missing_speed(installed: Sequence[str]) -> tuple[str, str] | None:
    """What would make crops faster than the installed decoders do, and its command; None: nothing."""
    gain = _GAINS.get(installed[0])
    return (f"simplejpeg makes crops {gain}", _REMEDIES["simplejpeg"]) if gain else None
