"""A straightforward implementation to compare with: masked one-hot inputs, one network call a step, plain Adam."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from actors.environments.sequence import SequenceEnvironment
from actors.trajectories import TrajectoryBatch
from learner.rewards import RewardConfig, log_reward


def mlp(inputs: int, outputs: int, hidden: int, layers: int) -> nn.Sequential:
    """ReLU layers."""
    sizes = [inputs, *[hidden] * layers]
    parts = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*parts, nn.Linear(hidden, outputs))


class Transformer(nn.Module):
    """PyTorch's encoder over the positions of one-hot states [.., T·A + extra]; what is extra joins the mean."""

    def __init__(self, steps: int, inputs: int, outputs: int, hidden: int, layers: int):
        super().__init__()
        self.steps, self.width = steps, inputs // steps
        self.extra = inputs - steps * self.width
        self.embedding = nn.Linear(self.width, hidden)
        self.positions = nn.Parameter(torch.randn(steps, hidden) * 0.5)
        layer = nn.TransformerEncoderLayer(hidden, 4, 4 * hidden, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(hidden + self.extra, outputs)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[.., outputs]."""
        flat = states.flatten(0, -2)
        one_hot = flat[:, : self.steps * self.width].unflatten(1, (self.steps, self.width))
        pooled = self.encoder(self.embedding(one_hot) + self.positions).mean(1)
        joined = torch.cat([pooled, flat[:, self.steps * self.width :]], 1)
        return self.head(joined).unflatten(0, states.shape[:-1])


class NaiveSGFN:
    """SGFN-DB with a learned backward head on fixed-length sequences, or DB without a dynamics model.

    `trunk(inputs, outputs)` makes each of the networks.
    """

    def __init__(self, environment: SequenceEnvironment, trunk: Callable[[int, int], nn.Module], *, dynamics: bool):
        space = environment.space
        self.steps, self.actions = space.max_length, space.num_actions
        width = self.steps * self.actions
        self.environment = environment
        self.policy = trunk(width, 2 * self.actions + 1)
        self.dynamics = trunk(width + self.actions, self.actions) if dynamics else None
        modules = [self.policy] if self.dynamics is None else [self.policy, self.dynamics]
        parameters = [p for module in modules for p in module.parameters()]
        self.optimiser = torch.optim.Adam(parameters, lr=1e-3, foreach=False)

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Masked one-hot [B, T+1, T*A] of all prefixes."""
        one_hot = nn.functional.one_hot(tokens, self.actions).float()
        mask = torch.tril(torch.ones(self.steps + 1, self.steps), -1)
        return (one_hot[:, None] * mask[None, :, :, None]).flatten(2)

    @torch.no_grad()
    def sample(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Realised and intended tokens int64 [count, T]."""
        tokens = torch.zeros(count, self.steps, dtype=torch.int64)
        actions = torch.zeros_like(tokens)
        state = torch.zeros(count, self.steps, self.actions)
        for step in range(self.steps):
            logits = self.policy(state.flatten(1))[:, : self.actions]
            actions[:, step] = torch.multinomial(logits.softmax(-1), 1)[:, 0]
            realised = self.environment.noise.realise(step, actions[:, step].numpy(), rng.random(count))
            tokens[:, step] = torch.from_numpy(realised)
            state[torch.arange(count), step, tokens[:, step]] = 1
        return tokens.numpy(), actions.numpy()

    def update(self, batch: TrajectoryBatch, reward: RewardConfig) -> float:
        """One step on policy, flows and dynamics."""
        tokens = torch.from_numpy(batch.tokens.astype(np.int64))
        actions = torch.from_numpy(batch.actions.astype(np.int64))
        states = self.states(tokens)
        log_dynamics = torch.zeros(tokens.shape)
        if self.dynamics is not None:
            taken = nn.functional.one_hot(actions, self.actions).float()
            outcomes = self.dynamics(torch.cat([states[:, :-1], taken], -1)).log_softmax(-1)
            log_dynamics = outcomes.gather(-1, tokens[..., None])[..., 0]
        here, there = self.policy(states[:, :-1]), self.policy(states[:, 1:])
        log_pf = here[..., : self.actions].log_softmax(-1).gather(-1, actions[..., None])[..., 0]
        log_pb = torch.zeros_like(log_pf)
        if self.dynamics is not None:
            log_pb = there[..., self.actions : -1].log_softmax(-1).gather(-1, actions[..., None])[..., 0]
        end = log_reward(torch.from_numpy(batch.scores), reward)
        following = torch.cat([there[:, :-1, -1], end[:, None]], 1)
        residuals = here[..., -1] + log_pf + log_dynamics.detach() - following - log_pb
        loss = residuals.square().mean() - log_dynamics.mean()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return float(loss.detach())
