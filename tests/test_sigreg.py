"The statistic against complex arithmetic, its gradient, what it sees and what it refuses"
import cmath
import math
import random

import pytest
import torch
from torch import nn

from lab_lm.nets.sigreg import covariance_term, directions_of, expected, sigreg, unit_rows, variance_term


def by_loops(z, lines, points):
    "Epps and Pulley's statistic with complex numbers, one direction after the other"
    out = []
    for line in lines.T.tolist():
        x, total = [sum(a * b for a, b in zip(row, line)) for row in z.tolist()], 0.
        for k in range(points):
            t = 3 * k / (points - 1)
            gap = sum(cmath.exp(1j * t * v) for v in x) / len(x) - math.exp(-t * t / 2)
            total += 3 / (points - 1) * (1 if k in (0, points - 1) else 2) * math.exp(-t * t / 2) * abs(gap) ** 2
        out.append(len(x) * total)
    return sum(out) / len(out)


def test_sigreg_is_the_published_statistic():
    for _ in range(10):
        n, d, points = random.randrange(1, 30), random.randrange(1, 9), random.randrange(2, 20)
        z, lines = torch.randn(n, d, dtype=torch.float64) * 2 + 3, directions_of(d, 7, random.randrange(10**6)).double()
        if unit_rows(z): continue
        assert float(sigreg(z, lines, points=points)) == pytest.approx(by_loops(z, lines, points), rel=1e-9)


def test_sigreg_draws_by_seed_and_has_the_right_gradient():
    z = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    assert sigreg(z, 20, 3) == sigreg(z, 20, 3) != sigreg(z, 20, 4)
    for scale in ('raw', 'sphere'): assert torch.autograd.gradcheck(lambda x: sigreg(x, 20, 3, scale=scale), z)
    assert torch.autograd.gradcheck(covariance_term, z) and torch.autograd.gradcheck(variance_term, z)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    lines = directions_of(5, 20, 3).double()
    assert sigreg(z @ turn, turn.T @ lines).item() == pytest.approx(sigreg(z, lines).item()) # Turning all turns nothing


def test_sigreg_pulls_a_collapse_apart_where_the_covariance_term_is_content():
    for make in (lambda: .001 * torch.randn(64, 8), lambda: .001 * torch.randn(64, 8) + 5, lambda: torch.randn(64, 1) @ torch.randn(1, 8)):
        z = make().detach().requires_grad_()
        before, spread = sigreg(z, 256).item(), z.detach().std(0).log().mean()
        assert before > 2 * expected()
        for step in range(100):
            push = torch.autograd.grad(sigreg(z, 32, step), z)[0]
            with torch.no_grad(): z -= push
        assert sigreg(z, 256).item() < before / 2
        if spread < -3: assert z.detach().std(0).log().mean() > spread + 3
    assert covariance_term(.001 * torch.randn(64, 8)) < 1e-5 and covariance_term(torch.ones(64, 8)) == 0
    still = torch.ones(4, 3, requires_grad=True)
    (variance_term(still) + covariance_term(still) + sigreg(still)).backward()
    assert still.grad.isfinite().all()


def test_vectors_of_length_one_are_named_and_at_the_right_scale_told_apart():
    for d in (2, 48, 384):
        even = nn.functional.normalize(torch.randn(256, d), dim=1)
        with pytest.raises(ValueError, match="scale='sphere'"): sigreg(even)
        assert unit_rows(even) and not unit_rows(even * 1.01) and not unit_rows(torch.cat([even, torch.zeros(1, d)]))
        cone = nn.functional.normalize(torch.randn(256, d) + 5 * d ** .5 * torch.eye(d)[0], dim=1)
        assert sigreg(cone, scale='sphere') > 10 * sigreg(even, scale='sphere')
    assert sigreg(torch.ones(5, 1)).isfinite() # In one dimension length 1 is right
    for bad in (torch.randn(3), torch.randn(0, 4), torch.randn(4, 0)):
        with pytest.raises(ValueError, match='rows of a matrix'): sigreg(bad)
