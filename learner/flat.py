"""All parameters of a module in one vector: one optimiser kernel, one norm, one copy to broadcast."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adam import adam


class FlatParameters:
    """`vector` float32 [P] and its gradient hold every parameter of `module`, whose tensors become views of them.

    Call `zero_grad` here, never on the module: a gradient that is set to None would lose its view.
    """

    def __init__(self, module: nn.Module):
        parameters = list(module.parameters())
        self.vector = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in parameters]))
        self.gradient = torch.zeros_like(self.vector)
        self.vector.grad = self.gradient
        start = 0
        for p in parameters:
            end = start + p.numel()
            p.data = self.vector.data[start:end].view_as(p)
            p.grad = self.gradient[start:end].view_as(p)
            start = end

    def zero_grad(self) -> None:
        """Reset the gradient in place."""
        self.gradient.zero_()

    def clip_gradient(self, max_norm: float) -> Tensor:
        """Scale the gradient to an L2 norm of at most `max_norm`; returns the norm before, without waiting for a GPU."""
        norm = self.gradient.norm()
        if norm.is_cuda or not norm <= max_norm:  # on the CPU, where reading the norm costs nothing, seldom
            self.gradient.mul_(torch.clamp(max_norm / (norm + 1e-12), max=1.0))
        return norm

    def load(self, vector: np.ndarray | Tensor) -> None:
        """Copy `vector` float32 [P] into the parameters.

        Raises ValueError if its size is not P.
        """
        if tuple(vector.shape) != tuple(self.vector.shape):
            raise ValueError(f"weights of {tuple(vector.shape)} values do not fit a network of {self.vector.numel()}")
        if isinstance(vector, np.ndarray) and self.vector.device.type == "cpu":
            self.vector.data.numpy()[:] = vector  # one copy, also from arrays that are read-only
        else:
            self.vector.data.copy_(torch.tensor(vector) if isinstance(vector, np.ndarray) else vector)


class FlatAdam:
    """Adam (Kingma & Ba 2015, arXiv 1412.6980) on `weights`, whose stretches may have step sizes of their own.

    PyTorch's fused kernel by its functional form: `torch.optim.Adam` would load torch's compiler, 1.5 s and 70 MB a process.
    """

    def __init__(
        self, weights: FlatParameters, step_sizes: Sequence[tuple[slice, float]], *, betas: tuple[float, float]
    ):
        """`step_sizes`: that of each stretch, no two of which overlap."""
        self.weights, self.step_sizes, self.betas = weights, list(step_sizes), betas
        self.factor = 1.0
        """Share of the step sizes that the next step takes."""
        self._means, self._squares = torch.zeros_like(weights.gradient), torch.zeros_like(weights.gradient)
        self._count = torch.zeros((), device=weights.vector.device)

    @property
    def learning_rates(self) -> list[float]:
        """Step sizes of the next step, by stretch."""
        return [size * self.factor for _, size in self.step_sizes]

    @torch.no_grad()
    def step(self) -> None:
        """Move the weights against their gradient."""
        everything = (self.weights.vector, self.weights.gradient, self._means, self._squares)
        for (rows, _), learning_rate in zip(self.step_sizes, self.learning_rates, strict=True):
            weights, gradient, mean, square = ([values[rows]] for values in everything)
            adam(
                weights, gradient, mean, square, [], [self._count.clone()],  # which the kernel counts up
                fused=True, lr=learning_rate, beta1=self.betas[0], beta2=self.betas[1], eps=1e-8,
                weight_decay=0.0, amsgrad=False, maximize=False,
            )  # fmt: skip
        self._count += 1

    def state_dict(self) -> dict[str, Any]:
        """A copy of the moments, and the number of steps."""
        return {"count": int(self._count), "means": self._means.clone(), "squares": self._squares.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`; raises ValueError for moments that do not belong to these weights."""
        for name, own in (("means", self._means), ("squares", self._squares)):
            value = state[name]
            if value.shape != own.shape or value.dtype != torch.float32 or not torch.isfinite(value).all():
                raise ValueError(f"optimiser: {name} are not {len(own)} finite numbers (float32)")
        if (state["squares"] < 0).any():
            raise ValueError("optimiser: squares has negative numbers")
        if type(state["count"]) is not int or not 0 <= state["count"] < 2**53:
            raise ValueError(f"optimiser: count: got {str(state['count'])[:40]!r}; allowed: a number of steps")
        self._means.copy_(state["means"])
        self._squares.copy_(state["squares"])
        self._count.fill_(state["count"])
