"""Rollouts of policies that read their own earlier intentions.

The histogram is judged by a chi-square test at level 1e-4 with a fixed seed.
"""

import numpy as np
import pytest
import torch
from scipy import stats

from actors.environments.sequence import EnvironmentConfig, SequenceEnvironment
from actors.rollout import draw_trajectories
from actors.trajectories import TrajectoryBatch
from learner.networks import NetworkConfig, TransformerConfig
from learner.networks.prefixes import join_symbols
from learner.policy import Policy
from tests.reference import randomise

SETTINGS = [
    {"alphabet": "ACG", "length": 4, "noise": 0.3},
    {"alphabet": "AC", "length": 5, "noise": 0.3, "variable_length": True, "min_length": 1},
    {"alphabet": "AC", "length": 3, "noise": 0.0, "variable_length": True, "min_length": 0},
]


def transformer(thought_context: bool, layers: int = 2) -> TransformerConfig:
    return TransformerConfig(
        name="transformer", hidden_size=8, num_heads=2, num_layers=layers, thought_context=thought_context
    )


def make_policy(environment: SequenceEnvironment, config: NetworkConfig) -> Policy:
    policy = Policy(environment.space, config)
    randomise(policy, seed=1, scale=0.4)
    return policy


@torch.no_grad()
def log_policy(policy: Policy, batch: TrajectoryBatch) -> np.ndarray:
    """log π(·|s_t, h_t) [B, T, A] by `forward` on the finished trajectories, no prefix merged with another."""
    count, steps = batch.tokens.shape
    symbols = join_symbols(batch.tokens, batch.actions, policy.space.num_actions, policy.thought_context)
    outputs = policy(torch.from_numpy(symbols), torch.arange(count * (steps + 1)))
    return outputs.log_policy.view(count, steps + 1, -1)[:, :-1].numpy()


def chosen(log_probs: np.ndarray, batch: TrajectoryBatch) -> np.ndarray:
    """Those of the intended tokens, [B, T]; 0 beyond the end."""
    taken = np.take_along_axis(log_probs, batch.actions[..., None].astype(np.int64), 2)[..., 0]
    return np.where(np.arange(taken.shape[1]) < batch.num_steps[:, None], taken, 0)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("thought_context", [False, True], ids=["tokens", "thoughts"])
@pytest.mark.parametrize(("temperature", "epsilon"), [(1.0, 0.0), (2.0, 0.3)])
def test_stored_log_probs_are_those_of_the_finished_trajectories(settings, thought_context, temperature, epsilon):
    environment = SequenceEnvironment(EnvironmentConfig(**settings))
    policy = make_policy(environment, transformer(thought_context))
    batch = draw_trajectories(
        policy, environment, environment.noise, 400, np.random.default_rng(2), temperature=temperature, epsilon=epsilon
    )
    allowed = environment.space.allowed
    powers = np.exp(log_policy(policy, batch) / temperature)
    mixed = (1 - epsilon) * powers / powers.sum(-1, keepdims=True) + epsilon * allowed / allowed.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        expected = chosen(np.log(mixed), batch)
    np.testing.assert_allclose(batch.log_behaviour, expected, rtol=0, atol=2e-5)
    if settings["noise"]:
        assert (batch.actions != batch.tokens).any()
    if environment.space.variable_length:
        assert len(set(batch.num_steps.tolist())) > 2


def test_thoughts_change_what_is_drawn():
    """The test above can tell: with other thoughts behind the same tokens, the probabilities are others."""
    environment = SequenceEnvironment(EnvironmentConfig(**SETTINGS[0]))
    policy = make_policy(environment, transformer(True))
    batch = draw_trajectories(policy, environment, environment.noise, 400, np.random.default_rng(3))
    right = chosen(log_policy(policy, batch), batch)
    intact = TrajectoryBatch(**{**batch.arrays(), "actions": batch.tokens})
    wrong = chosen(log_policy(policy, intact), batch)
    np.testing.assert_allclose(wrong[:, 0], right[:, 0], atol=1e-6)  # nothing was thought before the first step
    differing = (batch.actions != batch.tokens)[:, :-1].cumsum(1) > 0
    assert np.median(np.abs(wrong - right)[:, 1:][differing]) > 1e-2
    np.testing.assert_allclose(wrong[:, 1:][~differing], right[:, 1:][~differing], atol=2e-5)


def test_pairs_of_strings_follow_their_law():
    """All (realised, intended) strings of two letters and three steps: 64 cells, 100,000 trajectories."""
    environment = SequenceEnvironment(EnvironmentConfig(alphabet="AC", length=3, noise=0.4))
    policy, count = make_policy(environment, transformer(True, layers=1)), 100_000
    batch = draw_trajectories(policy, environment, environment.noise, count, np.random.default_rng(4))
    codes = (batch.tokens * 2 + batch.actions).astype(np.int64) @ [16, 4, 1]
    tokens, actions = (np.stack(part, 1).astype(np.int16) for part in zip(*map(unpacked, range(64)), strict=True))
    every = TrajectoryBatch(
        **{
            **batch[:64].arrays(),
            "tokens": tokens.T.copy(),
            "actions": actions.T.copy(),
            "num_steps": batch.num_steps[:64],
        }
    )
    law = np.exp(chosen(log_policy(policy, every), every).astype(np.float64).sum(1))
    for step in range(3):
        law *= environment.kernel[step, every.actions[:, step], every.tokens[:, step]]
    assert law.sum() == pytest.approx(1, abs=1e-5)
    assert law.min() * count > 4
    assert stats.chisquare(np.bincount(codes, minlength=64), count * law / law.sum()).pvalue > 1e-4


def unpacked(code: int) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.array([code // 16, code // 4 % 4, code % 4])
    return pairs // 2, pairs % 2


@pytest.mark.parametrize("thought_context", [False, True], ids=["tokens", "thoughts"])
def test_each_distinct_prefix_is_extended_once(thought_context: bool, monkeypatch: pytest.MonkeyPatch):
    environment = SequenceEnvironment(EnvironmentConfig(alphabet="AC", length=4, noise=0.5))
    policy, sizes = make_policy(environment, transformer(thought_context)), []
    extend = policy.extend

    def counted(state, parents, symbols):
        sizes.append(len(symbols))
        return extend(state, parents, symbols)

    monkeypatch.setattr(policy, "extend", counted)
    draw_trajectories(policy, environment, environment.noise, 20_000, np.random.default_rng(5))
    assert sizes == ([4, 16, 64] if thought_context else [2, 4, 8])


def test_given_intentions_need_no_network():
    environment = SequenceEnvironment(EnvironmentConfig(**SETTINGS[1]))
    policy = make_policy(environment, transformer(True))
    intended = np.tile(np.int16([0, 1, 0, 1, 2]), (50, 1))
    batch = draw_trajectories(policy, environment, environment.noise, 50, np.random.default_rng(6), intended=intended)
    for b, steps in enumerate(batch.num_steps):
        assert (batch.actions[b, :steps] == intended[b, :steps]).all()
        assert np.isnan(batch.log_behaviour[b, :steps]).all()
