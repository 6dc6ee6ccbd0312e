#!/usr/bin/env bash
# Replaces Pillow by pillow-simd (the same module PIL, faster resizing) in one Python environment on x86-64.
#   data_shards/install_pillow_simd.sh [--no-avx2] [PYTHON]      PYTHON: the environment's; default: python3 on PATH
# It compiles with AVX2 where this machine has it. A CPU without AVX2 then kills the process with SIGILL: give --no-avx2
# when the environment also serves older CPUs. The environment is touched only after the new build decoded a WebP and a
# JPEG. Two distributions own PIL/, so a shim named `pillow` (no modules) goes with it and keeps `pip check` clean.
# Installing another pillow later brings back the plain one: run this again after that.
set -euo pipefail

version=12.1.1.post0
python=python3 flavour=avx2
fail() { echo "install_pillow_simd: $*" >&2; exit 1; }
for argument in "$@"; do
  case $argument in
    --no-avx2) flavour=sse4 ;;
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) fail "unknown option $argument: there is --no-avx2" ;;
    *) python=$argument ;;
  esac
done
[ "$(uname -m)" = x86_64 ] || fail "$(uname -m) machine: pillow-simd is x86-64 only; keep the plain pillow"
grep -qsw avx2 /proc/cpuinfo || flavour=sse4
command -v "$python" >/dev/null || fail "no such Python: $python"
"$python" -m pip --version >/dev/null 2>&1 || fail "$python has no pip: make it with '$python -m ensurepip'"

work=$(mktemp -d "${TMPDIR:-/tmp}/pillow-simd-XXXXXX")
log=$work/log
trap 'status=$?; [ $status != 0 ] || rm -rf "$work"' EXIT
# quietly WHAT COMMAND...: the output goes to the log, whose name a failure tells.
quietly() { "${@:2}" >>"$log" 2>&1 || fail "$1 failed: the reason is at the end of $log"; }

# Decodes what it encodes; prints what is there. PYTHONPATH may point it to a build that is not installed yet.
proof='
import io, sys
from PIL import Image, features
import PIL
assert PIL.__version__ == sys.argv[1], PIL.__version__
for name, kind in (("jpg", "JPEG"), ("zlib", "PNG"), ("webp", "WEBP"), ("libtiff", "TIFF")):
    assert features.check(name), f"built without {name}"
    data = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 100, 50)).save(data, kind)
    pixel = Image.open(data).convert("RGB").resize((8, 8), Image.Resampling.BILINEAR).getpixel((4, 4))
    assert max(abs(a - b) for a, b in zip(pixel, (200, 100, 50))) < 8, (kind, pixel)
print("PIL", PIL.__version__, *(f"{name} {features.version(name)}" for name in ("jpg", "zlib", "webp", "libtiff")))
'
installed='
from importlib.metadata import metadata, version
import sys
assert version("pillow-simd") == version("pillow") == sys.argv[1] and sys.argv[2] in metadata("pillow")["Summary"]
'
if "$python" -c "$installed" "$version" "$flavour" 2>/dev/null && "$python" -c "$proof" "$version" 2>/dev/null; then
  echo "install_pillow_simd: $version ($flavour) is already installed"
  exit 0
fi

compiler=${CC:-cc}
packages=()
command -v "${compiler%% *}" >/dev/null || packages+=(gcc libc6-dev)
has() { [ -f "$1" ] || echo | $compiler -E -include stdio.h -include "$1" -xc - >/dev/null 2>&1; }
while read -r header package; do
  has "$header" || packages+=("$package")
done <<END
zlib.h zlib1g-dev
jpeglib.h libjpeg-dev
webp/demux.h libwebp-dev
tiffio.h libtiff-dev
$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h python3-dev
END
if [ ${#packages[@]} != 0 ]; then
  { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; } || fail "missing: as root, apt-get install ${packages[*]}"
  echo "install_pillow_simd: apt-get install ${packages[*]}"
  export DEBIAN_FRONTEND=noninteractive
  quietly "apt-get update" apt-get update -q
  quietly "apt-get install" apt-get install -qy --no-install-recommends "${packages[@]}"
fi

echo "install_pillow_simd: compiling $version ($flavour), a minute or two"
[ "$flavour" = sse4 ] || export CC="$compiler -mavx2"
# pip's cache knows a wheel by version only, not by compiler flags: without --no-cache-dir the other flavour could come.
quietly "the build" "$python" -m pip wheel --no-cache-dir --no-deps --no-binary pillow-simd \
  -C jpeg=enable -C webp=enable -C tiff=enable -w "$work" "pillow-simd==$version"
quietly "unpacking" "$python" -m zipfile -e "$work"/pillow_simd-*.whl "$work/tried"
PYTHONPATH=$work/tried quietly "the trial" "$python" -c "$proof" "$version"

"$python" - "$work" "$version" "$flavour" <<'END'
import sys, zipfile

folder, version, flavour = sys.argv[1:]
info = f"pillow-{version}.dist-info"
with zipfile.ZipFile(f"{folder}/pillow-{version}-py3-none-any.whl", "w") as wheel:
    wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: pillow\nVersion: {version}\n"
                   f"Summary: stands for pillow, {flavour}\nRequires-Dist: pillow-simd=={version}\n")
    wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: seer\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
END
quietly "pip uninstall" "$python" -m pip uninstall -qy pillow pillow-simd
quietly "pip install" "$python" -m pip install -q --no-index --no-deps "$work"/pillow_simd-*.whl "$work"/pillow-*.whl
"$python" -c "$proof" "$version" || fail "the installed build does not decode; see above"
[ "$flavour" = sse4 ] || echo "install_pillow_simd: needs a CPU with AVX2 (SIGILL otherwise; --no-avx2 builds without)"
