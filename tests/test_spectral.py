"""Spectral norms against explicit Jacobians: their values, and every piece of evidence that comes with them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.weights import architecture, normal, svd_norm
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from empirics import spectral
from empirics.model import Layer, build
from empirics.probes import PlainAttention
from empirics.spectral import explicit_jacobian, explicit_opnorm, jacobian_products, lanczos_opnorm, lanczos_opnorms
from empirics.stacked import batches, stacked

EPS = {torch.float32: 1e-5, torch.float64: 1e-12}  # what rounding may add to a value


def with_singular_values(values: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    left, _ = torch.linalg.qr(normal(seed, rows, len(values)))
    right, _ = torch.linalg.qr(normal(seed + 1, columns, len(values)))
    return left @ torch.diag(values) @ right.T


def linear(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: matrix @ x


@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 30),
    seed=st.integers(0, 10_000),
    # Equal or apart: what stops at a residual of 1e-9 may stop at any of several values as close as that.
    decay=st.just(0.0) | st.floats(0.01, 3),
    scale=st.floats(-8, 8),
)
def test_lanczos_is_the_norm_of_a_matrix_and_never_above(
    rows: int, columns: int, seed: int, decay: float, scale: float
) -> None:
    """All spectra, up to the last vector: with as many steps as dimensions it is exact, to float64 rounding."""
    n = min(rows, columns)
    left, _ = torch.linalg.qr(normal(seed, rows, n))
    right, _ = torch.linalg.qr(normal(seed + 1, columns, n))
    values = 10**scale * torch.arange(1, n + 1, dtype=torch.float64) ** -decay
    matrix = left @ torch.diag(values) @ right.T
    estimate = lanczos_opnorm(lambda x: matrix @ x, torch.zeros(columns, dtype=torch.float64), tolerance=1e-9)
    truth = svd_norm(matrix)
    assert estimate.value <= truth * (1 + 1e-12)
    assert estimate.value == pytest.approx(truth, rel=1e-9)
    assert estimate.iterations <= n + 1


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-4])
def test_lanczos_keeps_its_tolerance_on_a_network(tolerance: float) -> None:
    """The residual bounds the distance to a singular value, and on these gaps to the largest."""
    model = build(architecture(d_model=12, n_heads=2, n_kv_heads=2, d_head=6, d_ffn=30), seed=0, dtype=torch.float64)
    layer, x = model.layers[0], normal(3, 1, 7, 12)
    plain = PlainAttention(layer.attention)

    def half(v: Tensor) -> Tensor:
        return v + plain(layer.attention_norm(v))

    truth = explicit_opnorm(half, x)
    estimate = lanczos_opnorm(half, x, tolerance=tolerance)
    assert truth * (1 - tolerance) <= estimate.value <= truth * (1 + 1e-12)
    assert estimate.residual < tolerance


def test_lanczos_stops_at_its_limit_with_a_lower_estimate() -> None:
    matrix = torch.diag(torch.linspace(1, 2, 200, dtype=torch.float64))
    estimate = lanczos_opnorm(lambda x: matrix @ x, torch.zeros(200, dtype=torch.float64), tolerance=1e-12, limit=5)
    assert estimate.iterations == 5
    assert 1.5 < estimate.value < 2
    assert estimate.residual > 1e-12


def test_lanczos_of_zero_is_zero() -> None:
    for weight in (torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.float64)):
        estimate = lanczos_opnorm(lambda x, weight=weight: weight @ x, torch.ones(4, dtype=weight.dtype))
        assert estimate.value == 0.0


def test_lanczos_does_not_depend_on_who_drew_before() -> None:
    matrix = normal(0, 20, 20)
    torch.manual_seed(1)
    first = lanczos_opnorm(lambda x: matrix @ x, torch.zeros(20, dtype=torch.float64), limit=3)
    torch.manual_seed(2)
    assert first == lanczos_opnorm(lambda x: matrix @ x, torch.zeros(20, dtype=torch.float64), limit=3)


def test_explicit_jacobian_of_a_known_map() -> None:
    x = normal(0, 2, 3)
    jacobian = explicit_jacobian(lambda v: v.square().sum(0), x)
    expected = torch.cat([torch.diag(2 * x[0]), torch.diag(2 * x[1])], dim=1)
    assert torch.equal(jacobian, expected)
    assert explicit_opnorm(lambda v: 3 * v, x) == pytest.approx(3, rel=1e-14)


# --- against the explicit Jacobian ------------------------------------------------------------------------------

LADDER = torch.linspace(1, 2, 40, dtype=torch.float64)
MATRICES = {
    "wide": normal(0, 20, 50),
    "tall": normal(0, 50, 20),
    "one input": normal(0, 9, 1),
    "one output": normal(0, 1, 9),
    "one number": normal(0, 1, 1),
    "rank one": torch.outer(normal(0, 30)[:30], normal(1, 20)[:20]),
    "rank three": with_singular_values(torch.tensor([3.0, 2.0, 1.0]).double(), 30, 25),
    "zero": torch.zeros(6, 8, dtype=torch.float64),
    "no input": torch.zeros(6, 0, dtype=torch.float64),
    "no output": torch.zeros(0, 6, dtype=torch.float64),
    "all singular values equal": with_singular_values(torch.ones(20).double(), 20, 20),
    "the largest repeated": with_singular_values(torch.tensor([2.0] * 4 + [1.9] * 30).double(), 40, 60),
    "crowded at the top": with_singular_values(LADDER, 40, 60),
    "one value far below": with_singular_values(torch.tensor([1.0, 1e-9]).double(), 12, 12),
    "tiny": 1e-30 * normal(0, 12, 12),
    "huge": 1e30 * normal(0, 12, 12),
}


@pytest.mark.parametrize("basis", [3, 8, 32])
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("name", MATRICES)
def test_the_norm_of_a_matrix(name: str, dtype: torch.dtype, basis: int) -> None:
    """Of a function through it, with a derivative that is not constant; and whatever the basis' size."""
    matrix = MATRICES[name].to(dtype)
    at = normal(5, matrix.shape[1]).to(dtype)
    start = matrix @ at

    def function(x: Tensor) -> Tensor:
        return torch.sinh(matrix @ x - start)  # of slope 1 there

    truth = svd_norm(matrix.double()) if matrix.numel() else 0.0
    estimate = lanczos_opnorm(function, at, tolerance=1e-3, basis=basis, limit=2000)
    assert estimate.kind == "lower estimate"
    assert "lower estimate" in repr(estimate)
    assert truth * (1 - 1e-3) <= estimate.value <= truth * (1 + EPS[dtype])
    if truth:
        assert not estimate.value <= 0.9 * truth  # so that a norm too small by a tenth would have been noticed
    assert truth <= estimate.likely_upper * (1 + EPS[dtype])
    assert estimate.likely_upper <= estimate.value * (1 + 1e-3) * (1 + 1e-15)
    assert estimate.residual <= 1e-3
    assert estimate.direction.shape == at.shape


@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 10_000),
    basis=st.integers(3, 9),
)
def test_the_norm_of_a_network(sizes: tuple[int, int, int], seed: int, basis: int) -> None:
    inputs, hidden, outputs = sizes
    first, second = normal(seed, hidden, inputs), normal(seed + 1, outputs, hidden)

    def function(x: Tensor) -> Tensor:
        return (second @ torch.relu(first @ x)).tanh().view(outputs, 1)

    x = normal(seed + 2, inputs)
    truth = explicit_opnorm(function, x)
    estimate = lanczos_opnorm(function, x, tolerance=1e-3, basis=basis, seed=seed)
    assert truth * (1 - 1e-3) <= estimate.value <= truth * (1 + 1e-12)


@pytest.mark.parametrize("name", ["constant", "constant in part", "fused attention", "scalar"])
def test_products_are_those_of_the_explicit_jacobian(name: str) -> None:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "constant": lambda x: torch.ones(3, 2, dtype=x.dtype),
        "constant in part": lambda x: torch.stack([x[0], torch.ones_like(x[0])]),
        "fused attention": lambda x: scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
        "scalar": lambda x: x.square().sum(),
    }
    function, x = functions[name], normal(0, 4, 3)
    elementary = PRODUCT_OF.get(name, function)
    jacobian = explicit_jacobian(elementary, x)
    product, adjoint = jacobian_products(function, x)
    v, w = normal(1, 4, 3), torch.randn_like(function(x))
    torch.testing.assert_close(product(v).flatten(), jacobian @ v.flatten(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adjoint(w).flatten(), jacobian.T @ w.flatten(), rtol=1e-12, atol=1e-12)


PRODUCT_OF: dict[str, Callable[[Tensor], Tensor]] = {
    "fused attention": lambda x: (x @ x.T / math.sqrt(3)).softmax(-1) @ x
}


# --- the evidence -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("basis", [3, 5, 32])
def test_value_and_residual_are_those_of_the_direction(limit: int, basis: int) -> None:
    """Whether it has converged or not, and across restarts."""
    jacobian = with_singular_values(LADDER, 50, 60)
    estimate = lanczos_opnorm(linear(jacobian), normal(0, 60), tolerance=0, limit=limit, basis=basis)
    assert estimate.iterations == limit
    v = estimate.direction
    stretched = jacobian @ v
    assert v.norm().item() == pytest.approx(1, rel=1e-13)
    assert stretched.norm().item() == pytest.approx(estimate.value, rel=1e-12)
    left = jacobian.T @ stretched / estimate.value - estimate.value * v
    assert left.norm().item() / estimate.value == pytest.approx(estimate.residual, rel=1e-9)


def test_a_small_residual_is_not_enough() -> None:
    """The identity and one direction 5 % above it: the first vector's residual is small and its value 5 % too low."""
    jacobian = torch.eye(1000, dtype=torch.float64)
    jacobian[0, 0] = 1.05
    x = torch.zeros(1000, dtype=torch.float64)
    first = lanczos_opnorm(linear(jacobian), x, tolerance=1e-2, limit=1)
    assert first.residual < 1e-2
    assert first.value < 1.001
    assert first.likely_upper > 1.05
    assert lanczos_opnorm(linear(jacobian), x, tolerance=1e-2).value == pytest.approx(1.05, rel=1e-12)


@pytest.mark.parametrize("basis", [3, 6, 32])
def test_likely_upper_errs_only_where_the_start_is_unlucky(basis: int) -> None:
    """A start no more unlucky than its chance says leads to no error at all; one that is much more so, to some."""
    values = torch.cat([torch.linspace(0, 1, 99, dtype=torch.float64), torch.tensor([1.02]).double()])
    jacobian, x = torch.diag(values), torch.zeros(100, dtype=torch.float64)
    errors = 0
    for seed in range(40):
        start = torch.randn(100, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        chance = float((start[-1] / start.norm()).abs()) * math.sqrt(200 / math.pi)
        for limit in (2, 5, 9, 16):
            kept = {"limit": limit, "seed": seed, "basis": basis, "tolerance": 0.0}
            fair = lanczos_opnorm(linear(jacobian), x, chance=min(0.999 * chance, 0.999), **kept)
            assert fair.value <= 1.02 * (1 + 1e-12)
            assert fair.likely_upper >= 1.02 * (1 - 1e-12)
            errors += lanczos_opnorm(linear(jacobian), x, chance=min(10 * chance, 0.999), **kept).likely_upper < 1.02
    assert errors > 0


def test_the_tolerance_is_kept_over_random_starts() -> None:
    """On a spectrum without a gap, where a residual of the tolerance's size is reached long before."""
    jacobian, x = torch.diag(torch.linspace(0, 1, 500, dtype=torch.float64)), torch.zeros(500, dtype=torch.float64)
    estimates = [lanczos_opnorm(linear(jacobian), x, tolerance=1e-2, seed=seed) for seed in range(50)]
    assert all(0.99 <= estimate.value <= 1 + 1e-12 for estimate in estimates)
    assert all(1 <= estimate.likely_upper <= 1.01 * estimate.value * (1 + 1e-12) for estimate in estimates)
    assert len({estimate.value for estimate in estimates}) == 50


def test_memory_is_the_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    largest: list[int] = []
    orthonormal = spectral._orthonormal

    def watched(vectors: Tensor, bases: Tensor, floor: np.ndarray) -> tuple[Tensor, np.ndarray]:
        storage = bases.untyped_storage().nbytes() // (bases.element_size() * bases.shape[0] * bases.shape[2])
        largest.append(storage)
        return orthonormal(vectors, bases, floor)

    monkeypatch.setattr(spectral, "_orthonormal", watched)
    jacobian = torch.diag(torch.linspace(0, 1, 300, dtype=torch.float64))
    x = torch.zeros(300, dtype=torch.float64)
    estimate = lanczos_opnorm(linear(jacobian), x, tolerance=1e-3, basis=6, limit=1000)
    assert estimate.iterations > 50
    assert max(largest) == 7  # one more on the right: the next
    assert 0.999 <= estimate.value <= 1 + 1e-12


# --- many at once -----------------------------------------------------------------------------------------------


def test_many_at_once_are_as_one_by_one() -> None:
    """However soon each converges, and for how long it is then carried along."""
    matrices = torch.stack(
        [
            normal(0, 30, 30),
            torch.zeros(30, 30, dtype=torch.float64),
            with_singular_values(torch.ones(1, dtype=torch.float64), 30, 30),
            with_singular_values(torch.linspace(1, 1.1, 30, dtype=torch.float64), 30, 30),
            torch.eye(30, dtype=torch.float64),
        ]
    )
    x = torch.zeros(5, 30, dtype=torch.float64)
    for basis in (4, 32):
        together = lanczos_opnorms(lambda v: (matrices @ v[..., None])[..., 0], x, tolerance=1e-4, basis=basis)
        for matrix, x_n, one in zip(matrices, x, together, strict=True):
            alone = lanczos_opnorm(linear(matrix), x_n, tolerance=1e-4, basis=basis)
            assert one.iterations == alone.iterations
            assert one.value == pytest.approx(alone.value, rel=1e-12)
            assert one.likely_upper == pytest.approx(alone.likely_upper, rel=1e-6)
            assert one.residual == pytest.approx(alone.residual, rel=1e-3, abs=1e-12)


def test_layers_go_together_if_they_are_of_one_form() -> None:
    a = architecture(n_layers=6, window=3, global_every=3)
    layers = list(build(a, seed=0).layers)
    assert batches(layers, 10) == [[0, 1, 3, 4], [2, 5]]
    assert batches(layers, 2**16) == [[0, 1], [2, 5], [3, 4]]
    assert batches(layers, 2**20) == [[n] for n in range(6)]
    assert batches([torch.nn.Linear(4096, 4096, device="meta")] * 3, 1) == [[0], [1], [2]]
    assert batches([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3, bias=False), torch.nn.Identity()], 1) == [
        [0],
        [1],
        [2],
    ]


def test_stacked_modules_are_the_modules() -> None:
    layers = list(build(architecture(n_layers=3), seed=0, dtype=torch.float64).requires_grad_(False).layers)
    x = normal(0, 3, 1, 7, architecture().d_model)
    expected = torch.stack([layer.attention_update(row) for layer, row in zip(layers, x, strict=True)])  # type: ignore[operator]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel goes through a batch one by one, which torch warns about
        found = stacked(layers, Layer.attention_update)(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(stacked(layers[:1], Layer.attention_update)(x[:1]), expected[:1])


# --- what cannot be done ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"basis": 2}, {"limit": 0}, {"tolerance": -1.0}, {"chance": 0.0}, {"chance": 1.0}])
def test_options_that_will_not_do(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="use at least 3"):
        lanczos_opnorm(lambda x: x, torch.ones(2), **options)  # type: ignore[arg-type]


def test_a_dtype_that_will_not_do() -> None:
    with pytest.raises(ValueError, match="convert"):
        lanczos_opnorm(lambda x: x, torch.ones(2, dtype=torch.bfloat16))


def test_a_derivative_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="not finite"):
        lanczos_opnorm(torch.sqrt, torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("strength", [0.03, 0.1, 0.3])
def test_identity_and_a_small_branch(strength: float, dtype: torch.dtype) -> None:
    """What most of a half-layer's products are: each step takes off a multiple of what it leaves, for many steps.

    A basis that is not passed over twice loses its orthogonality here, and the value comes out up to tenfold.
    """
    n = 512
    matrix = torch.eye(n, dtype=dtype) + strength * normal(7, n, n).to(dtype) / math.sqrt(n)
    truth = svd_norm(matrix)
    for seed in range(4):
        estimate = lanczos_opnorm(linear(matrix), torch.ones(n, dtype=dtype), tolerance=1e-4, seed=seed)
        assert estimate.value == pytest.approx(truth, rel=1e-2)
        assert estimate.value <= truth * (1 + EPS[dtype])
        # The direction is a unit vector that the matrix stretches by the value.
        assert float(estimate.direction.norm()) == pytest.approx(1.0, abs=EPS[dtype])
        assert float((matrix @ estimate.direction).norm()) == pytest.approx(estimate.value, rel=1e-4)
