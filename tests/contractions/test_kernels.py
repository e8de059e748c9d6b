"""The kernels against their definitions: on a GPU where there is one, and on the CPU by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxcurv.contractions import definitions as contractions
from fxcurv.contractions.kernels import available, sum_of_squared_products, sum_of_squared_products_reference

TESTS = Path(__file__).resolve().parent
SIZES = {  # v, n, s, g, o, i
    "linear": (3, 4, 1, 1, 20, 33),
    "convolution": (2, 2, 49, 1, 32, 27),
    "groups": (2, 3, 10, 3, 16, 16),
    "odd": (3, 2, 17, 2, 7, 70),
    "one pair": (1, 1, 65, 1, 65, 5),
    "many pairs": (7, 11, 3, 1, 9, 10),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "features last": lambda X: X,
    "positions last": lambda X: X.movedim(-3, -1).contiguous().movedim(-1, -3),
    "samples last": lambda X: X.movedim(-4, -1).contiguous().movedim(-1, -4),
    "cut": lambda X: torch.cat([X, X], -1)[..., : X.shape[-1]],
    "every other": lambda X: X.repeat_interleave(2, -3)[..., ::2, :, :],
    "expanded": lambda X: X[..., :1, :, :].expand_as(X),
}
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None and "CI" not in os.environ, reason="Triton is not installed"
)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def definition(S: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("vnsgo,nsgi->vngoi", S.double(), x.double()).square().sum((0, 1))


def cases(device: str) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Every size in one layout and type, and one size in every layout and type; large numbers in half precision."""
    tolerances = {torch.float32: 1e-5, torch.float16: 1e-5}
    if device == "cuda":
        tolerances[torch.bfloat16] = 1e-5  # the inputs are what they are: only sums and products are rounded
    for name, (v, n, s, g, o, i) in SIZES.items():
        yield name, draw(v, n, s, g, o).float().to(device), draw(n, s, g, i).float().to(device), 1e-5
    v, n, s, g, o, i = SIZES["odd"]
    for layout, to_layout in LAYOUTS.items():
        for dtype, tolerance in tolerances.items():
            S, x = (to_layout((100 * X).to(device, dtype)) for X in (draw(v, n, s, g, o), draw(n, s, g, i)))
            yield f"{layout}, {dtype}", S, x, tolerance


def check_kernel(device: str) -> None:
    """The kernel equals its definition, gives float32, the same bits again, and one shape to fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fxcurv.contractions.triton_kernels import sum_of_squared_products as fused

    assert available(torch.device(device))
    for name, S, x, tolerance in cases(device):
        value, expected = fused(S, x), definition(S, x)
        error = float((value.double() - expected).abs().max() / expected.max())
        assert value.dtype == torch.float32, name
        assert error < tolerance, f"{name}: off by {error:.3g}"
        assert torch.equal(value, fused(S, x)), f"{name}: not the same bits"
        assert torch.equal(value, sum_of_squared_products(S, x)), f"{name}: the kernel is not taken"
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = fused(mode.from_tensor(S), mode.from_tensor(x))
        assert (fake.shape, fake.dtype, fake.device.type) == (value.shape, value.dtype, device), name
    print(f"{name} was the last of the cases")


def check_compiled(architecture: int) -> None:
    """The kernel compiles to machine code for an architecture of NVIDIA's, without such a device."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from fxcurv.contractions.triton_kernels import blocks_for, tiles

    class Nowhere:
        """A driver that says what to compile for, and cannot run it."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(Nowhere())  # pyright: ignore[reportArgumentType]
    blocks, warps = blocks_for(64, 64, 49)
    for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")):
        S, x = torch.empty(3, 2, 49, 1, 64, dtype=dtype), torch.empty(2, 49, 1, 64, dtype=dtype)
        arguments = ((S, x), torch.empty(2, 1, 64, 64), (3, 2, 49, 1, 64, 64, 2), (S.stride(), x.stride()))
        kernel = tiles.warmup(*arguments, OPTIONS=(*blocks, precision), num_warps=warps, grid=(1, 2))
        assert kernel.asm["cubin"]
        assert ("mma" in kernel.asm["ptx"]) == (dtype != torch.float32 or precision == "tf32")
    print(f"sm_{architecture} was the last of the cases")


def in_a_process(call: str, interpret: bool, cache: Path) -> str:
    """What a call of this file prints in a process of its own: Triton reads its environment when it is imported."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parents[1]), str(TESTS.parent), str(TESTS)]),
        "TRITON_INTERPRET": str(int(interpret)),
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    command = [sys.executable, "-c", f"import test_kernels; test_kernels.{call}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_triton
def test_the_kernel_equals_its_definition_in_the_interpreter(tmp_path: Path) -> None:
    assert "last of the cases" in in_a_process("check_kernel('cpu')", True, tmp_path)


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler comes for Linux")
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_the_kernel_compiles_for_gpus(architecture: int, tmp_path: Path) -> None:
    assert "last of the cases" in in_a_process(f"check_compiled({architecture})", False, tmp_path)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_equals_its_definition_on_a_gpu() -> None:
    check_kernel("cuda")


@pytest.mark.parametrize("chunk", [1, 1000, 1 << 22])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_the_reference_equals_the_definition(
    size: str, layout: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contractions, "CHUNK", chunk)
    v, n, s, g, o, i = SIZES[size]
    S, x = LAYOUTS[layout](draw(v, n, s, g, o)), LAYOUTS[layout](draw(n, s, g, i))
    kept = S.clone(), x.clone()
    value = sum_of_squared_products(S, x)
    torch.testing.assert_close(value, definition(S, x), rtol=1e-12, atol=1e-12)
    assert torch.equal(S, kept[0])
    assert torch.equal(x, kept[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_reference_accumulates_in_float32(dtype: torch.dtype) -> None:
    S, x = (100 * draw(3, 2, 17, 2, 7)).to(dtype), (100 * draw(2, 17, 2, 70)).to(dtype)
    value = sum_of_squared_products_reference(S, x)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), definition(S, x), rtol=1e-4, atol=0)


def test_nothing_is_zero_and_one_entry_is_a_product() -> None:
    assert sum_of_squared_products(draw(0, 2, 3, 1, 8), draw(2, 3, 1, 8)).equal(torch.zeros(1, 8, 8).double())
    assert sum_of_squared_products(draw(3, 2, 0, 1, 8), draw(2, 0, 1, 8)).equal(torch.zeros(1, 8, 8).double())
    S, x = draw(3, 2, 5, 6, 1), draw(2, 5, 6, 1)
    torch.testing.assert_close(sum_of_squared_products(S, x), definition(S, x))


def test_without_a_gpu_or_an_interpreter_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not available(torch.device("cpu"))
    assert not available(torch.device("meta"))
