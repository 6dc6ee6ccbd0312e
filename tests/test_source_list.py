"""Sources as a configuration names them."""

from __future__ import annotations

import pytest

from seer.compose import compose
from seer.errors import UserError
from seer.source_list import Source, quotas, read_sources


def test_sources_on_the_command_line() -> None:
    word = "data.mixture=[web 0.8 /w/part-{000..127}.tar, own 3e-1 my photos/[a-c]*.tar]"
    config = compose(["run_dir=RUN", word])
    assert read_sources(config.data.mixture) == [
        Source("web", 0.8, "/w/part-{000..127}.tar"),
        Source("own", 0.3, "my photos/[a-c]*.tar"),
    ]
    assert [str(source) for source in read_sources(["a  2.12345678 b c.tar"])] == ["a 2.12345678 b c.tar"]


@pytest.mark.parametrize(
    "text", ["", "web", "web 1", "web W/*.tar", "web W/*.tar 1", "web 0 a", "web -1 a", "web inf a", "web nan a"]
)
def test_what_is_no_source(text: str) -> None:
    with pytest.raises(UserError, match="NAME WEIGHT PATTERN"):
        read_sources(["own 1 a.tar", text])


def test_a_name_that_comes_twice() -> None:
    with pytest.raises(UserError, match="names web twice"):
        read_sources(["web 1 a.tar", "web 2 b.tar"])


@pytest.mark.parametrize("weight", [1.0, 1e308, 5e-324, 1.7976931348623157e308])
def test_weights_of_any_size_fill_a_batch(weight: float) -> None:
    assert quotas([weight] * 3, 64) == [22, 21, 21]
    assert quotas([weight, 1e-320], 64) in ([64, 0], [0, 64])
