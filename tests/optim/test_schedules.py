import math

import pytest

from seer.errors import UserError
from seer.optim.schedules import WarmupCosine

# Values from facebookresearch/swav's schedule and from fvcore's classes with VISSL's interval scaling.
SWAV_LONG = WarmupCosine(0.3, 4.8, 0.0048, 3120, 249_600, style="swav")
SWAV_SMALL = WarmupCosine(0.0, 0.6, 0.0006, 0, 1_000_800, style="swav")
SEER_10B = {"start": 0.15, "peak": 9.3, "end": 0.0093, "total_steps": 126_008}
SEER_256GF = {"start": 0.15, "peak": 9.6, "end": 0.0096, "warmup_steps": 8000, "total_steps": 122_070}
ORIGINAL_FRACTION = 0.043648 * 126_008


@pytest.mark.parametrize(
    "schedule, values",
    [
        (SWAV_LONG, {0: 0.3, 1: 0.3014427701, 1560: 2.550721385, 3119: 4.8, 3120: 4.8}),
        (SWAV_LONG, {100_000: 3.192875908, 200_000: 0.4681759615, 249_599: 0.004800000195}),
        (SWAV_SMALL, {0: 0.6, 500_000: 0.300676313}),
        (WarmupCosine(**SEER_10B, warmup_steps=5500), {0: 0.15, 1: 0.1516636364, 2750: 4.725, 5499: 9.298336364}),
        (WarmupCosine(**SEER_10B, warmup_steps=5500), {5500: 9.3, 63_004: 4.987396154, 100_000: 1.036769076}),
        (WarmupCosine(**SEER_10B, warmup_steps=5500), {126_007: 0.0093000016}),
        (WarmupCosine(**SEER_10B, warmup_steps=5500, style="vissl"), {0: 0.15, 1: 0.1516636364, 5499: 9.298336364}),
        (WarmupCosine(**SEER_10B, warmup_steps=5500, style="vissl"), {5500: 9.256394957, 63_004: 4.65465}),
        (WarmupCosine(**SEER_10B, warmup_steps=5500, style="vissl"), {100_000: 0.952134557}),
        (WarmupCosine(**SEER_10B, warmup_steps=ORIGINAL_FRACTION, style="vissl"), {1: 0.1516636372, 2750: 4.725002342}),
        (WarmupCosine(**SEER_10B, warmup_steps=ORIGINAL_FRACTION, style="vissl"), {5500: 9.256394957}),
        (WarmupCosine(**SEER_256GF), {1: 0.15118125, 7999: 9.59881875, 8001: 9.599999998, 63_004: 5.072882575}),
        (WarmupCosine(**SEER_256GF), {100_000: 0.8684668237}),
        (WarmupCosine(**SEER_256GF, style="vissl"), {7999: 9.59881875, 8001: 9.49869939, 63_004: 4.561911202}),
        (WarmupCosine(**SEER_256GF, style="vissl"), {100_000: 0.7625321148}),
    ],
)
def test_published_values(schedule, values):
    for step, value in values.items():
        assert schedule.at(step) == pytest.approx(value, rel=6e-10, abs=6e-9 if step == 126_007 else 0), step


def test_where_the_two_parts_meet():
    rebased = WarmupCosine(**SEER_256GF)
    vissl = WarmupCosine(**SEER_256GF, style="vissl")
    swav = WarmupCosine(**SEER_256GF, style="swav")
    assert rebased.at(8000) == 9.6
    assert swav.at(7999) == swav.at(8000) == pytest.approx(9.6, rel=1e-15)
    assert vissl.at(8000) == pytest.approx(9.6 * (1 - 0.0106), rel=1e-3)  # already the cosine, below the peak
    assert vissl.at(7999) > vissl.at(8000)


@pytest.mark.parametrize("style", ["rebased", "swav", "vissl"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 100])
def test_rises_then_falls_and_stays_at_the_end(style, warmup):
    schedule = WarmupCosine(0.1, 2.0, 0.01, warmup, 100, style=style)
    rates = [schedule.at(step) for step in range(130)]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert all(0.01 <= rate <= 2.0 for rate in rates)
    if warmup < 100:
        assert rates[100:] == pytest.approx([0.01] * 30)
    if warmup:
        assert rates[0] == 0.1


def test_a_half_wave_is_halfway_in_its_middle():
    assert WarmupCosine(0, 1.0, 0.2, 10, 110).at(60) == pytest.approx(0.6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"start": -1.0},
        {"peak": math.nan},
        {"end": math.inf},
        {"warmup_steps": -1},
        {"warmup_steps": 101},
        {"total_steps": 0},
        {"style": "rebase"},
    ],
)
def test_bad_arguments(wrong):
    good = {"start": 0.1, "peak": 1.0, "end": 0.0, "warmup_steps": 10, "total_steps": 100}
    with pytest.raises(UserError, match="did you mean 'rebased'" if "style" in wrong else None):
        WarmupCosine(**{**good, **wrong})
    with pytest.raises(UserError):
        WarmupCosine(**good).at(-1)
