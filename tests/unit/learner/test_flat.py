"""All parameters in one vector."""

import numpy as np
import pytest
import torch
from torch import nn

from learner.flat import FlatParameters


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_tensors_are_views_of_the_vector():
    net = module()
    before = torch.cat([p.detach().reshape(-1).clone() for p in net.parameters()])
    flat = FlatParameters(net)
    assert torch.equal(flat.vector.detach(), before)
    with torch.no_grad():
        flat.vector[:12] = 7.0
        net[2].bias[1] = -3.0
    assert (net[0].weight == 7).all()
    assert float(flat.vector.detach()[-1]) == -3


def test_backward_fills_the_flat_gradient():
    net, twin = module(), module()
    flat, x = FlatParameters(net), torch.randn(5, 3)
    net(x).square().sum().backward()
    twin(x).square().sum().backward()
    expected = torch.cat([p.grad.reshape(-1) for p in twin.parameters()])
    assert torch.allclose(flat.vector.grad, expected)
    assert flat.vector.grad is flat.gradient
    flat.zero_grad()
    assert (flat.gradient == 0).all()
    net(x).square().sum().backward()  # still into the same memory
    assert torch.allclose(flat.gradient, expected)


def test_an_optimiser_of_the_vector_trains_the_module():
    net, twin, x = module(), module(), torch.randn(5, 3)
    flat = FlatParameters(net)
    ours, theirs = torch.optim.Adam([flat.vector], lr=0.1), torch.optim.Adam(twin.parameters(), lr=0.1)
    for _ in range(3):
        flat.zero_grad()
        twin.zero_grad()
        net(x).square().sum().backward()
        twin(x).square().sum().backward()
        ours.step()
        theirs.step()
    assert torch.allclose(net(x), twin(x), atol=1e-5)


@pytest.mark.parametrize(("max_norm", "norm_after"), [(2.5, 2.5), (100.0, 5.0)])
def test_gradients_are_clipped_to_the_norm(max_norm: float, norm_after: float):
    flat = FlatParameters(nn.Linear(2, 1, bias=False))
    flat.gradient.copy_(torch.tensor([3.0, -4.0]))
    assert float(flat.clip_gradient(max_norm)) == pytest.approx(5)
    assert float(flat.gradient.norm()) == pytest.approx(norm_after, rel=1e-5)
    assert float(flat.gradient[0] / flat.gradient[1]) == pytest.approx(-0.75)


def test_a_zero_gradient_stays_zero():
    flat = FlatParameters(nn.Linear(2, 1))
    flat.clip_gradient(1.0)
    assert (flat.gradient == 0).all()


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_load_copies(kind):
    net = module()
    flat, source = FlatParameters(net), kind(np.arange(26, dtype=np.float32))
    flat.load(source)
    source[:] = 0
    assert flat.vector.tolist() == list(range(26))
    assert net[0].weight.reshape(-1).tolist() == list(range(12))


@pytest.mark.parametrize("size", [25, 27, 1])
def test_weights_of_another_size_are_refused(size: int):
    flat = FlatParameters(module())
    before = flat.vector.detach().clone()
    with pytest.raises(ValueError, match=rf"\({size},\) values do not fit a network of 26"):
        flat.load(np.zeros(size, np.float32))
    assert torch.equal(flat.vector.detach(), before)
