"""The masked driver of colour and blur is the other one, in one graph of fixed shapes that reads no value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from host_sync import NoHostSync
from tiny_run import tiny_config
from torch import Tensor

from seer import build
from seer.data import photometric_masked as masked
from seer.data import photometric_operations as operations
from seer.data.photometric import photometric
from seer.data.photometric_parameters import (
    DRAWS,
    GRAYSCALE,
    JITTER,
    ORDER,
    ORDERS,
    SIGMA,
    PhotometricSpec,
    photometric_parameters,
)

# Of normalised values, whose unit is about 4.5 times that of [0, 1]. The same calls on other rows differ by roundings;
# a compiler sums the means in another order, and hue makes more of that.
ROUNDINGS = {torch.float32: 1e-6, torch.float64: 1e-12}
COMPILED = {torch.float32: 5e-5, torch.float64: 1e-12}
SPEC = PhotometricSpec()
NOTHING = replace(SPEC, jitter_probability=0, grayscale_probability=0, blur_probability=0)
DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _compiled_by_nobody_before() -> Iterator[None]:
    yield
    torch.compiler.reset()


def crops(count: int, height: int = 14, width: int | None = None) -> Tensor:
    shape = (count, height, width or height, 3)
    pixels = np.random.default_rng(count).integers(0, 256, shape, np.uint8)
    pixels[:, 0, :4] = [[0, 0, 0], [255, 255, 255], [90, 90, 90], [255, 0, 0]]  # no hue, no chroma, pure colour
    return torch.from_numpy(pixels)


def drawn(count: int, spec: PhotometricSpec = SPEC, seed: int = 0) -> Tensor:
    return torch.from_numpy(photometric_parameters(np.random.default_rng(seed).random((count, DRAWS)), spec))


def every_combination() -> Tensor:
    """All orders with jitter, grayscale and blur on and off: 192 rows."""
    found = drawn(len(ORDERS) * 8, replace(SPEC, blur_probability=1))
    columns = np.array([*product(range(len(ORDERS)), (0, 1), (0, 1), (0, 1))], np.float32)
    found[:, [ORDER, JITTER, GRAYSCALE]] = torch.from_numpy(columns[:, :3])
    found[:, SIGMA] *= torch.from_numpy(columns[:, 3])
    return found


def difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape and one.dtype == other.dtype
    return float((one - other).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_combination_is_equal(dtype: torch.dtype) -> None:
    parameters = every_combination()
    for height, width in ((14, 14), (12, 20), (4, 4)):
        given = crops(len(parameters), height, width)
        found = masked.photometric_masked(given, parameters, SPEC, dtype)
        assert found.is_contiguous() and not found.requires_grad
        assert difference(found, photometric(given, parameters, SPEC, dtype)) < ROUNDINGS[dtype]


@pytest.mark.parametrize(
    "spec",
    [
        replace(SPEC, jitter_probability=0),
        replace(SPEC, hue=0),
        replace(SPEC, hue=0.5),
        replace(SPEC, grayscale_probability=0),
        replace(SPEC, grayscale_probability=1),
        replace(SPEC, blur_probability=0),
        NOTHING,
    ],
)
def test_what_a_distribution_never_does_is_left_out(spec: PhotometricSpec) -> None:
    parameters = drawn(50, spec)
    found = masked.photometric_masked(crops(50), parameters, spec)
    assert difference(found, photometric(crops(50), parameters, spec)) < ROUNDINGS[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_does_not_apply_is_exactly_nothing(dtype: torch.dtype) -> None:
    parameters = drawn(20)
    parameters[:, [JITTER, GRAYSCALE, SIGMA]] = 0  # the factors, turns and orders stay
    found = masked.photometric_masked(crops(20, 16), parameters, SPEC, dtype)
    assert torch.equal(found, masked.photometric_masked(crops(20, 16), parameters, NOTHING, dtype))


def test_no_shape_and_no_branch_depends_on_a_value() -> None:
    parameters = every_combination()
    with NoHostSync():
        masked.photometric_masked(crops(len(parameters)), parameters, SPEC)
    there = torch.device("meta")  # where there are no values
    numbers = masked.coefficients(parameters, torch.float32).to(there)
    bands = operations.bands(14, there, torch.float32)
    assert masked.chain(crops(len(parameters)).to(there), numbers, (bands, bands), SPEC).shape == (192, 3, 14, 14)


def test_one_graph_a_resolution_whatever_surrounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    shapes = [(30, 14, 14, 3), (45, 10, 10, 3)]
    run = masked.compiled_photometric(shapes, SPEC, torch.float32, torch.device("cpu"))
    around = [nullcontext(), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16)]
    for number, surrounded in enumerate(around):
        for shape in shapes:
            given, parameters = crops(*shape[:3]), drawn(shape[0], seed=number)
            with surrounded:
                found = run(given, parameters)
            assert found.dtype == torch.float32 and not found.requires_grad
            assert difference(found, photometric(given, parameters, SPEC)) < ROUNDINGS[torch.float32]
    assert len(graphs) == 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_it_is_equal(device: str, dtype: torch.dtype) -> None:
    parameters, there = every_combination(), torch.device(device)
    shapes = [(len(parameters), 14, 14, 3), (len(parameters), 12, 20, 3)]
    run = masked.compiled_photometric(shapes, SPEC, dtype, there)
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in shapes * 2:
            given = crops(*shape[:3])
            found = run(given.to(there), parameters)
            for reference in (given, given.to(there)):
                expected = photometric(reference, parameters, SPEC, dtype)
                assert difference(found.cpu(), expected.cpu()) < COMPILED[dtype]


@pytest.mark.gpu
def test_the_host_does_not_wait_for_a_gpu() -> None:
    parameters, given = every_combination(), crops(192).to("cuda")
    run = masked.compiled_photometric([(192, 14, 14, 3)], SPEC, torch.float32, torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(given, parameters)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def cuda_without_a_compiler(tmp_path: Path) -> Callable[[Tensor, Tensor], Tensor]:
    return build.photometric_of(tiny_config(tmp_path / "run", "none.tar"), torch.device("cuda"))


def test_without_a_compiler_operations_run_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("\nFailed to find C compiler.\nmore words")

    monkeypatch.setattr(build, "compiled_photometric", refuse)
    run = cuda_without_a_compiler(tmp_path)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "(RuntimeError: Failed to find C compiler.)" in told and "To compile them" in told
    assert torch.equal(run(crops(9), drawn(9)), photometric(crops(9), drawn(9), SPEC))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    cuda_without_a_compiler(tmp_path)
    assert capsys.readouterr().err == "", "another process of this machine says it"


@pytest.mark.slow
def test_a_compiler_that_is_really_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The compiler's own errors, met on a CPU."""
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # nothing is found there
    on_cpu = lambda shapes, spec, dtype, _: masked.compiled_photometric(shapes, spec, dtype, torch.device("cpu"))  # noqa: E731
    monkeypatch.setattr(build, "compiled_photometric", on_cpu)
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        run = cuda_without_a_compiler(tmp_path)
    assert "no-such-compiler" in capsys.readouterr().err
    assert torch.equal(run(crops(9), drawn(9)), photometric(crops(9), drawn(9), SPEC))
