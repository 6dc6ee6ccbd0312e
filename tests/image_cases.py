"""One image of every form of every format, and numpy's word on how a viewer shows it."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
from crafted_images import CHANNELS, encoded, jpeg_marker, png, tiff
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float64]
Case = tuple[bytes, Floats, float]  # the file, (H, W, 3) as it should look, greatest difference allowed

HEIGHT, WIDTH = 11, 16
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def samples(channels: int, depth: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 2**depth, (HEIGHT, WIDTH, channels))


def over_white(colour: Floats, opacity: Floats) -> Floats:
    """Colours (H, W, 3 or 1) in 0..255, opacity (H, W, 1) in 0..1."""
    return np.broadcast_to(colour * opacity + 255 * (1 - opacity), (*colour.shape[:2], 3))


def smooth() -> NDArray[np.uint8]:
    """Colours that change slowly, so that a JPEG keeps them; every orientation looks different."""
    y, x = np.mgrid[:48, :64]
    return np.stack([40 + 3 * x, 230 - 4 * y, 60 + x + y], -1).astype(np.uint8)


def image_of(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels)


def png_cases() -> Iterator[tuple[str, Case]]:
    for colour, depths in DEPTHS.items():
        for depth in depths:
            for transparent in (False, True) if colour in (0, 2, 3) else (False,):
                for interlaced in (False, True):
                    words = ["png", f"colour{colour}", f"{depth}bit", "tRNS" * transparent, "adam7" * interlaced]
                    yield "-".join(filter(None, words)), png_case(colour, depth, transparent, interlaced)


def png_case(colour: int, depth: int, transparent: bool, interlaced: bool) -> Case:
    top = 2**depth - 1
    values, palette, transparency = samples(CHANNELS[colour], depth), b"", b""
    opacity = np.ones((HEIGHT, WIDTH, 1))
    if colour == 3:
        table = np.random.default_rng(1).integers(0, 256, (top + 1, 3), np.uint8)
        palette, shown = table.tobytes(), table[values[..., 0]].astype(np.float64)
        if transparent:  # of the first entries only: the others are opaque
            alpha = np.append(np.linspace(0, 200, top).astype(np.uint8), np.uint8(255))
            transparency, opacity = alpha[:-1].tobytes(), alpha[values] / 255
    else:
        shown = values[..., : 3 if colour in (2, 6) else 1] / top * 255
        if colour in (4, 6):
            opacity = values[..., -1:] / top
        if transparent:
            key = values[5, 6] if colour == 2 or depth == 16 else np.array([top // 3])
            opacity = 1.0 - (values == key).all(-1, keepdims=True)
            transparency = struct.pack(f">{len(key)}H", *key)
    data = png(values, colour, depth, palette=palette, transparency=transparency, interlaced=interlaced)
    # 16 bits are cut to 8, colour and opacity each: below two levels together.
    return data, over_white(shown, opacity), 2 if colour in (4, 6) and depth == 16 else 1


def tiff_cases() -> Iterator[tuple[str, Case]]:
    for order in "<>":
        name = {"<": "little", ">": "big"}[order]
        for depth in (1, 2, 4, 8, 12, 16):
            if (order, depth) == (">", 12):
                continue  # Pillow cannot
            for white_is_zero in (False, True):
                if white_is_zero and (depth, order) in ((12, "<"), (16, ">")):
                    continue  # Pillow cannot
                values = samples(1, depth)
                shown = values / (2**depth - 1) * 255
                if white_is_zero:
                    shown = 255 - shown
                data = tiff(values, 0 if white_is_zero else 1, depth, order=order)
                yield f"tiff-grey-{depth}bit-{name}{'-white0' * white_is_zero}", (data, np.repeat(shown, 3, -1), 1)
        for depth in (8, 16):
            values = samples(4, depth)
            share = values / (2**depth - 1)
            slack = depth // 8
            rgb = tiff(values[..., :3], 2, depth, order=order)
            yield f"tiff-rgb-{depth}bit-{name}", (rgb, share[..., :3] * 255, 1)
            cmyk = tiff(values, 5, depth, order=order)
            yield f"tiff-cmyk-{depth}bit-{name}", (cmyk, 255 * (1 - share[..., :3]) * (1 - share[..., 3:]), slack)
            rgba = tiff(values, 2, depth, order=order, tags={338: 2})
            yield f"tiff-rgba-{depth}bit-{name}", (rgba, over_white(share[..., :3] * 255, share[..., 3:]), slack)
            values[..., :3] = np.minimum(values[..., :3], values[..., 3:])
            share = values / (2**depth - 1)
            whole = tiff(values, 2, depth, order=order, tags={338: 1})
            shown = 255 * (share[..., :3] + 1 - share[..., 3:])
            yield f"tiff-rgba-premultiplied-{depth}bit-{name}", (whole, shown, slack + 1)
        values = samples(2, 8)
        data = tiff(values, 1, 8, order=order, tags={338: 2})
        yield f"tiff-grey-alpha-{name}", (data, over_white(values[..., :1] * 1.0, values[..., 1:] / 255), 1)


def jpeg_cases() -> Iterator[tuple[str, Case]]:
    pixels = smooth()
    image = image_of(pixels)
    best = {"quality": 95, "subsampling": 0}
    baseline = encoded(image, "JPEG", **best)
    yield "jpeg", (baseline, pixels * 1.0, 6)
    yield "jpeg-420", (encoded(image, "JPEG", quality=95), pixels * 1.0, 12)
    yield "jpeg-progressive", (encoded(image, "JPEG", progressive=True, **best), pixels * 1.0, 6)
    yield "jpeg-restart-markers", (encoded(image, "JPEG", restart_marker_blocks=2, **best), pixels * 1.0, 6)
    yield "jpeg-rgb", (encoded(image, "JPEG", keep_rgb=True, **best), pixels * 1.0, 6)
    yield "jpeg-trailing-garbage", (baseline + b"\xff\xd8<html>" * 99, pixels * 1.0, 6)
    yield "jpeg-with-a-second-picture", (baseline + encoded(Image.new("RGB", (9, 9)), "JPEG"), pixels * 1.0, 6)
    grey = np.asarray(image.convert("L"))
    yield "jpeg-grey", (encoded(image.convert("L"), "JPEG", quality=95), np.repeat(grey[..., None], 3, -1) * 1.0, 4)

    key = np.full((48, 64, 1), 90, np.uint8)  # black on top of the colours
    shown = pixels * (1 - key / 255)
    cmyk = encoded(Image.fromarray(np.concatenate([255 - pixels, key], -1), "CMYK"), "JPEG", quality=95)
    yield "jpeg-cmyk", (cmyk, shown, 8)
    adobe = jpeg_marker(cmyk, 0xEE)
    length = 2 + int.from_bytes(cmyk[adobe + 2 : adobe + 4], "big")
    yield "jpeg-cmyk-without-adobe-marker", (cmyk[:adobe] + cmyk[adobe + length :], shown, 8)
    # YCCK: the file holds cyan, magenta and yellow as if they were red, green and blue, as YCbCr, and inverted black;
    # Adobe's marker says so by its last byte.
    ycc = np.asarray(image_of(255 - pixels).convert("YCbCr"))
    stored = np.concatenate([255 - ycc, key], -1)  # Pillow inverts all four when it writes
    ycck = bytearray(encoded(Image.fromarray(stored, "CMYK"), "JPEG", quality=95))
    ycck[adobe + length - 1] = 2
    yield "jpeg-ycck", (bytes(ycck), shown, 8)


def other_cases() -> Iterator[tuple[str, Case]]:
    pixels = smooth()
    image = image_of(pixels)
    alpha = np.where(np.arange(64) % 2, 200, 0).astype(np.uint8) + np.zeros((48, 1), np.uint8)
    layer = image.copy()
    layer.putalpha(Image.fromarray(alpha))
    composed = over_white(pixels * 1.0, alpha[..., None] / 255)
    later = Image.new("RGBA", image.size, (255, 0, 0, 255))

    yield "webp-lossy", (encoded(image, "WEBP", quality=95), pixels * 1.0, 20)
    yield "webp-lossless", (encoded(image, "WEBP", lossless=True), pixels * 1.0, 0)
    yield "webp-alpha", (encoded(layer, "WEBP", lossless=True, exact=True), composed, 1)
    animation = {"save_all": True, "append_images": [later]}
    yield "webp-animated", (encoded(layer, "WEBP", lossless=True, exact=True, **animation), composed, 1)
    yield "png-trailing-garbage", (encoded(image, "PNG") + b"<html>", pixels * 1.0, 0)
    yield "apng", (encoded(layer, "PNG", **animation), composed, 1)
    yield "apng-with-a-picture-of-its-own", (encoded(layer, "PNG", default_image=True, **animation), composed, 1)

    few = image.quantize(100)
    shown = np.asarray(few.convert("RGB")) * 1.0
    yield "gif", (encoded(few, "GIF"), shown, 0)
    yield "gif-interlaced", (encoded(few, "GIF", interlace=True), shown, 0)
    yield "gif-animated", (encoded(few, "GIF", **animation), shown, 0)
    grey = np.asarray(image.convert("L"))
    yield "gif-grey", (encoded(image.convert("L"), "GIF"), np.repeat(grey[..., None], 3, -1) * 1.0, 0)
    see_through = np.where(np.asarray(few)[..., None] == 7, 255.0, shown)
    assert (see_through != shown).any()
    yield "gif-transparent", (encoded(few, "GIF", transparency=7, optimize=False), see_through, 0)
    small = bytearray(encoded(few, "GIF"))
    at = small.index(b"," + struct.pack("<HHHH", 0, 0, 64, 48))
    small[6:10], small[at + 1 : at + 5] = struct.pack("<HH", 80, 60), struct.pack("<HH", 5, 9)
    canvas = np.full((60, 80, 3), 255.0)
    canvas[9:57, 5:69] = shown
    yield "gif-frame-smaller-than-the-picture", (bytes(small), canvas, 0)

    yield "bmp", (encoded(image, "BMP"), pixels * 1.0, 0)
    yield "bmp-palette", (encoded(few, "BMP"), shown, 0)
    yield "bmp-grey", (encoded(image.convert("L"), "BMP"), np.repeat(grey[..., None], 3, -1) * 1.0, 0)
    bits = np.asarray(image.convert("1"))[..., None] * 255.0
    yield "bmp-two-levels", (encoded(image.convert("1"), "BMP"), np.repeat(bits, 3, -1), 0)
    yield "bmp-alpha", (encoded(layer, "BMP"), pixels * 1.0, 0)  # 32 bits without a mask of alpha: no transparency
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        yield f"tiff-{compression}", (encoded(image, "TIFF", compression=compression), pixels * 1.0, 0)
    yield "tiff-jpeg", (encoded(image, "TIFF", compression="jpeg", quality=95), pixels * 1.0, 16)
    yield "tiff-fax", (encoded(image.convert("1"), "TIFF", compression="group4"), np.repeat(bits, 3, -1), 0)
    yield "tiff-first-page", (encoded(image, "TIFF", **animation), pixels * 1.0, 0)
    yield "tiff-palette", (encoded(few, "TIFF"), shown, 0)


CASES: dict[str, Case] = {
    name: case for cases in (png_cases, tiff_cases, jpeg_cases, other_cases) for name, case in cases()
}
