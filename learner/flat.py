"""All parameters of a module in one vector: one optimiser kernel, one norm, one copy to broadcast."""

import numpy as np
import torch
from torch import Tensor, nn


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

    def part(self, start: int, end: int | None) -> nn.Parameter:
        """A stretch of `vector`, with its gradient, as a parameter that an optimiser can treat apart."""
        part = nn.Parameter(self.vector.data[start:end])
        part.grad = self.gradient[start:end]
        return part

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
