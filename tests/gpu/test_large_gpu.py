"""More elements than 32 bits count, through plans: 70,000 tokens at K' = 56,832."""

from __future__ import annotations

import gc

import pytest

import slidesparse_rt as ss

from .common import BACKENDS, BACKENDS_HERE, assert_same, reference, to_host, weight

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

M, N, K = 70_000, 64, 37_888
SLID = 56_832


def rows_at_the_edges():
    """First, last, and those around which an offset in elements or bytes passes 2^31 and 2^32."""
    rows = {0, 1, M - 2, M - 1}
    for row_length in (SLID, K, 2 * K):
        for bits in (31, 32):
            edge = 2**bits // row_length
            rows |= {edge - 1, edge, edge + 1}
    return sorted(row for row in rows if row < M)


def test_seventy_thousand_tokens():
    """In one launch and in several, on every backend: the same bits, and the reference's."""
    import torch

    assert ss.Pattern.parse("6:8").slid_k(K) == SLID
    assert M * SLID > M * K > 2**31
    gc.collect()
    torch.cuda.empty_cache()
    w = weight(0, N, K, "6:8")
    x = torch.randn((M, K), dtype=torch.bfloat16, device="cuda")
    # Rows of very different sizes: a row that is read in another's place shows.
    x *= torch.exp2(torch.arange(M, device="cuda") % 13).to(torch.bfloat16)[:, None]
    rows = rows_at_the_edges()
    assert len(rows) > 10
    expected = reference(w, "6:8", to_host(x[rows]), "int8")
    found = []
    for backend in BACKENDS_HERE:
        for limit in (8 << 30, 1 << 30):
            options = ss.PlanOptions(workspace_limit=limit)
            with ss.SparseGemmPlan(
                w, "6:8", backend=backend, device="cuda", options=options
            ) as plan:
                y = plan.run(x)
                torch.cuda.synchronize()
                # The quantized tokens of one launch lie in the workspace.
                whole = plan.nbytes > M * K
                assert whole == (limit > M * SLID), "split where it should not be, or not split"
            assert_same(to_host(y[rows]), expected)
            found.append(y)
    for y in found[1:]:
        assert torch.equal(y, found[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_of_more_than_2_to_the_31_elements(backend):
    """Offsets into the result, into the sums and into a wide out."""
    import torch

    m, n, k = 70_000, 31_000, 64
    assert m * n > 2**31
    gc.collect()
    torch.cuda.empty_cache()
    w = weight(1, n, k, "6:8")
    x = torch.randn((m, k), dtype=torch.bfloat16, device="cuda")
    rows = [0, 1, 2**31 // n - 1, 2**31 // n, 2**31 // n + 1, m - 1]
    expected = reference(w, "6:8", to_host(x[rows]), "int8")
    for limit in (16 << 30, 1 << 30):
        options = ss.PlanOptions(workspace_limit=limit)
        with ss.SparseGemmPlan(w, "6:8", backend=backend, device="cuda", options=options) as plan:
            wide = torch.full((m, n + 8), 7.0, dtype=torch.bfloat16, device="cuda")
            plan.run(x, out=wide[:, :n])
            assert_same(to_host(wide[rows, :n]), expected)
            assert bool((wide[:, n:] == 7).all())
            del wide
