"""All parameters in one vector."""

import numpy as np
import pytest
import torch
from torch import nn

from learner.flat import FlatAdam, FlatParameters


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


def trained_by(optimiser: FlatAdam, net: nn.Module, num_steps: int) -> None:
    for step in range(num_steps):
        optimiser.weights.zero_grad()
        net(torch.full((5, 3), step + 1.0)).square().sum().backward()
        optimiser.step()


def test_adam_is_that_of_torch_with_a_step_size_for_each_stretch():
    net, twin = module(), module()
    flat, parts = FlatParameters(net), list(twin.parameters())
    ours = FlatAdam(flat, [(slice(parts[0].numel(), None), 0.1), (slice(parts[0].numel()), 0.03)], betas=(0.8, 0.95))
    theirs = torch.optim.Adam(
        [{"params": parts[1:], "lr": 0.05}, {"params": parts[:1], "lr": 0.015}], betas=(0.8, 0.95)
    )
    ours.factor = 0.5
    assert ours.learning_rates == [0.05, 0.015]
    for step in range(5):
        twin.zero_grad()
        twin(torch.full((5, 3), step + 1.0)).square().sum().backward()
        theirs.step()
    trained_by(ours, net, 5)
    torch.testing.assert_close(flat.vector.data, torch.cat([p.detach().flatten() for p in parts]), rtol=1e-5, atol=1e-6)


def test_adam_goes_on_from_its_state():
    net, twin = module(), module()
    first, whole = (FlatAdam(FlatParameters(m), [(slice(None), 0.1)], betas=(0.9, 0.99)) for m in (net, twin))
    trained_by(whole, twin, 2)
    trained_by(first, net, 2)
    again = FlatAdam(first.weights, [(slice(None), 0.1)], betas=(0.9, 0.99))
    state = first.state_dict()
    again.load_state_dict(state)
    trained_by(whole, twin, 3)
    trained_by(again, net, 3)
    assert torch.equal(again.weights.vector, whole.weights.vector)
    assert (state["count"], again.state_dict()["count"]) == (2, 5)
    assert not torch.equal(state["means"], again.state_dict()["means"])  # a copy


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
