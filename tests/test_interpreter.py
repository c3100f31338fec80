"""The repaired interpreter against torch's own bf16 casts and products."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fastattn.kernels import interpreter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where no GPU is")


@triton.jit
def cast_kernel(source, target, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + offs, tl.load(source + offs, mask=offs < n, other=0.0), mask=offs < n)


@triton.jit
def round_to_zero_kernel(source, target, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(target + offs, tl.load(source + offs).to(tl.bfloat16, fp_downcast_rounding="rtz"))


@triton.jit
def dot_kernel(a, b, out, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    product = tl.dot(tl.load(a + offs), tl.load(b + offs), input_precision=PRECISION)
    tl.store(out + offs, product.to(out.dtype.element_ty))


@triton.jit
def second(a, b):
    return b


@triton.jit
def compare_kernel(a, b, out, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x, y = tl.load(a + offs), tl.load(b + offs)
    number = out.dtype.element_ty
    tl.store(out + offs, (x > y).to(number))
    tl.store(out + BLOCK + offs, (x > y).to(number) + (x != y).to(number))


@triton.jit
def promotion_kernel(short, wide, half, out, sums, BLOCK: tl.constexpr):
    """out (BLOCK, BLOCK, 3): int32 · int64, fp16 · int32, int32 · a number that is none; sums (BLOCK,): int32 + int64"""
    offs = tl.arange(0, BLOCK)
    rows, columns = tl.load(short + offs)[:, None], tl.load(wide + offs)[None, :]
    to = out + (offs[:, None] * BLOCK + offs[None, :]) * 3
    tl.store(to, rows * columns)
    tl.store(to + 1, tl.load(half + offs)[None, :] * rows)
    tl.store(to + 2, rows * 0.5 + columns % 3)
    tl.store(sums + offs, tl.load(short + offs) + tl.load(wide + offs))


@triton.jit
def misuse_kernel(x, out, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tile = tl.load(x + offs)
    if WHAT == "add":
        tile = tile + tile
    elif WHAT == "compare":
        tile = tl.where(tile > tile, tile, tile)
    elif WHAT == "negate":
        tile = -tile
    elif WHAT == "absolute":
        tile = tl.abs(tile)
    elif WHAT == "sum":
        tile = tl.sum(tile, 0) + tl.zeros([BLOCK], tl.float32)
    elif WHAT == "scan":
        tile = tl.associative_scan(tile, 0, second)
    elif WHAT == "fma":
        tile = tl.fma(tile, tile, tile)
    elif WHAT == "atomic":
        tl.atomic_add(out + offs, tile)
    tl.store(out + offs, tile)


@triton.jit
def allowed_kernel(x, out, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tile = tl.load(x + offs, mask=offs < BLOCK - 1, other=2.5)
    chosen = tl.where(offs % 2 == 0, tile, tl.full([BLOCK], 1.5, tl.bfloat16))
    tl.store(out + offs, tl.reshape(tl.reshape(chosen, [2, BLOCK // 2]), [BLOCK]))


def nasty_float32() -> torch.Tensor:
    """Every class of fp32: zeros, denormals, exact halves between bf16 values, overflow, infinities, NaNs."""
    exponents = torch.arange(256, dtype=torch.int64)
    mantissas = torch.tensor(
        [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x17FFF, 0x18000, 0x18001, 0x7F8000, 0x7FFFFF]
    )
    patterns = (exponents[:, None] << 23 | mantissas[None, :]).flatten()
    patterns = torch.cat([patterns, patterns | 1 << 31])
    return torch.where(patterns >= 1 << 31, patterns - (1 << 32), patterns).to(torch.int32).view(torch.float32)


def all_bfloat16() -> torch.Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def assert_same_bits(result: torch.Tensor, expected: torch.Tensor) -> None:
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[result.element_size()]
    nan = expected.isnan()
    assert torch.equal(result.isnan(), nan)
    assert torch.equal(result.view(bits)[~nan], expected.view(bits)[~nan])


@pytest.mark.parametrize(
    ("source", "dtype"),
    [
        pytest.param(nasty_float32(), torch.bfloat16, id="fp32-to-bf16"),
        pytest.param(all_bfloat16(), torch.float32, id="bf16-to-fp32"),
        pytest.param(all_bfloat16(), torch.float16, id="bf16-to-fp16"),
        pytest.param(all_bfloat16(), torch.float64, id="bf16-to-fp64"),
        pytest.param(all_bfloat16().view(torch.float16), torch.bfloat16, id="fp16-to-bf16"),
        pytest.param(nasty_float32(), torch.float16, id="fp32-to-fp16"),
        pytest.param(torch.arange(-40000, 40000, 7, dtype=torch.int32), torch.bfloat16, id="int-to-bf16"),
    ],
)
def test_casts_agree_with_torch_bit_for_bit(source, dtype):
    result = torch.full(source.shape, float("nan"), dtype=dtype)
    cast_kernel[(triton.cdiv(source.numel(), 4096),)](source, result, source.numel(), BLOCK=4096)
    assert_same_bits(result, source.to(dtype))


def test_bf16_to_int_truncates_like_torch():
    source = torch.linspace(-300, 300, 1024).to(torch.bfloat16)
    result = torch.zeros(1024, dtype=torch.int32)
    cast_kernel[(1,)](source, result, 1024, BLOCK=1024)
    assert torch.equal(result, source.to(torch.int32))


def test_rounding_towards_zero_keeps_the_upper_half():
    source = torch.randn(512)
    result = torch.empty(512, dtype=torch.bfloat16)
    round_to_zero_kernel[(1,)](source, result, BLOCK=512)
    assert torch.equal(result.float().view(torch.int32), source.view(torch.int32) & ~0xFFFF)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dot_accumulates_in_fp32(dtype):
    a, b = torch.randn(2, 32, 32).to(dtype)
    result = torch.full((32, 32), float("nan"))
    dot_kernel[(1,)](a, b, result, PRECISION="ieee", BLOCK=32)
    torch.testing.assert_close(result.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_tf32_products_lose_the_bits_that_the_hardware_drops():
    a, b = torch.randn(2, 32, 32)
    exact, tf32 = torch.empty(2, 32, 32)
    dot_kernel[(1,)](a, b, exact, PRECISION="ieee", BLOCK=32)
    dot_kernel[(1,)](a, b, tf32, PRECISION="tf32", BLOCK=32)
    error = (tf32 - exact).abs().max()
    assert 1e-4 < error < 1e-2


def test_tf32_rounding_at_its_edges():
    step = 2.0**-10
    values = np.array([1.0, 1 + step / 2, 1 + step * 0.49, -(1 + step / 2), np.inf, -np.inf, np.nan], dtype=np.float32)
    expected = np.array([1.0, 1 + step, 1.0, -(1 + step), np.inf, -np.inf, np.nan], dtype=np.float32)
    np.testing.assert_array_equal(interpreter.round_to_tfloat32(values), expected)


@pytest.mark.parametrize("what", ["add", "compare", "negate", "absolute", "sum", "scan", "fma", "atomic"])
def test_bf16_arithmetic_in_a_kernel_raises(what):
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"bfloat16.*upcast"):
        misuse_kernel[(1,)](x, torch.zeros_like(x), WHAT=what, BLOCK=16)


def test_moving_bf16_is_allowed():
    x = torch.arange(16, dtype=torch.bfloat16)
    out = torch.zeros_like(x)
    allowed_kernel[(1,)](x, out, BLOCK=16)
    expected = torch.where(torch.arange(16) % 2 == 0, x, 1.5)
    assert torch.equal(out, expected)


def test_installing_twice_changes_nothing():
    before = dict(vars(triton.runtime.interpreter.InterpreterBuilder))
    interpreter.install()
    assert dict(vars(triton.runtime.interpreter.InterpreterBuilder)) == before


def test_the_language_is_restored_after_a_launch_even_if_it_fails():
    before = tl.load
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(TypeError):
        misuse_kernel[(1,)](x, x, WHAT="add", BLOCK=16)
    assert tl.load is before
    cast_kernel[(1,)](x, x.clone(), 16, BLOCK=16)
    assert tl.load is before


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.float16, torch.float32], ids=str)
def test_a_comparison_cast_to_its_operands_type_is_a_number(dtype):
    a, b, out = torch.arange(16).to(dtype), torch.full((16,), 5).to(dtype), torch.full((2, 16), 7).to(dtype)
    compare_kernel[(1,)](a, b, out, BLOCK=16)
    assert torch.equal(out, torch.stack([(a > b).to(dtype), (a > b).to(dtype) + (a != b).to(dtype)]))


def test_operands_of_several_types_are_promoted():
    short, wide = torch.arange(-8, 8, dtype=torch.int32), torch.arange(16, dtype=torch.int64) + 2**33
    half, out = torch.linspace(-2, 2, 16, dtype=torch.float16), torch.zeros(16, 16, 3, dtype=torch.float64)
    sums = torch.zeros_like(wide)
    promotion_kernel[(1,)](short, wide, half, out, sums, BLOCK=16)
    rows, columns = short[:, None], wide[None, :]
    assert torch.equal(out[..., 0], (rows * columns).double())
    assert torch.equal(out[..., 1], (half[None, :] * rows.half()).double())
    assert torch.equal(out[..., 2], (rows.float() * 0.5 + (columns % 3).float()).double())
    assert torch.equal(sums, short + wide)
