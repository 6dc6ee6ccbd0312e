"""Text that fits, and pictures that are whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

from seer import pictures
from seer.errors import UserError
from seer.pictures import fitted, font, save_png

DRAW = ImageDraw.Draw(Image.new("RGB", (10, 10)))


@pytest.mark.parametrize("bitmap", [False, True], ids=["Pillow", "pillow-simd"])
@pytest.mark.parametrize("text", ["a", "a photograph " * 20, "a\nb\0c\udce4", "\u65e5\u672c " * 40, ""])
def test_any_text_fits_and_can_be_drawn(text: str, bitmap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if bitmap:
        monkeypatch.setattr(pictures, "font", lambda size: ImageFont.load_default_imagefont())
    used = pictures.font(13)
    found = fitted(DRAW, text, 13, 100)
    DRAW.text((0, 0), found, font=used)
    assert DRAW.textlength(found, font=used) <= 100
    if found != text and len(text) > 10:
        longer = fitted(DRAW, text, 13, 130)
        assert len(longer) > len(found) and longer[: len(found) - 3] == found[:-3]


def test_a_picture_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "a.png"
    save_png(Image.new("RGB", (7, 5)), file)
    with Image.open(file) as read:
        assert read.size == (7, 5)
    before = file.read_bytes()

    def full(*places: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"a\.png cannot be written \(No space left on device\)"):
        save_png(Image.new("RGB", (70, 50)), file)
    assert file.read_bytes() == before and [*file.parent.iterdir()] == [file]


def test_the_font_is_made_once() -> None:
    assert font(13) is font(13) is not font(14)
