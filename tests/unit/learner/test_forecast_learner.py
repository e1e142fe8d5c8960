"""The forecasting learner on series whose conditional laws can be enumerated."""

import numpy as np
import pandas as pd
import pytest
import torch

from actors.environments.time_series import PathScorer, TimeSeriesTask, path_environment
from actors.forecasting import ForecastWorker
from actors.rollout import ActorsConfig
from actors.series import DataConfig, Series
from learner import exact
from learner.dynamics import DynamicsConfig
from learner.forecast import ForecastConfig, ForecastLearner, step_errors
from learner.gflownet import LearnerConfig
from learner.networks import TransformerConfig
from learner.networks.context import single_context
from learner.objectives.config import ObjectiveConfig
from learner.policy import Policy
from learner.rewards import RewardConfig

NETWORK = TransformerConfig(name="transformer", hidden_size=16, num_layers=1, num_heads=2)
BETA = 2.0


def chain(stay: float, rows: int = 400) -> TimeSeriesTask:
    """A Markov chain on {0, 1}, of which a window shows two rows and the future is three."""
    rng, values = np.random.default_rng(0), [0.0]
    for _ in range(rows - 1):
        values.append(values[-1] if rng.random() < stay else 1 - values[-1])
    data = DataConfig(
        path="unused.csv", time_column="t", targets=("y",), window=2, horizon=3, num_bins=2, centre="none",
        bin_margin=0,
    )  # fmt: skip
    return TimeSeriesTask(data, Series(pd.RangeIndex(rows), ("y",), np.array(values)[:, None]))


def make(task: TimeSeriesTask, *, noise: float = 0.0, steps: int = 300, generator=None, **objective):
    environment = path_environment(task.config, noise)
    settings = ForecastConfig(name="forecast", **(generator or {}))
    objective_config = ObjectiveConfig(**objective)
    learner = ForecastLearner(
        environment.space, generator=settings, data=task.learner_data(), network=NETWORK, objective=objective_config,
        dynamics=DynamicsConfig(batch_size=32), reward=RewardConfig(exponent=BETA, floor=1e-30),
        learner=LearnerConfig(batch_size=256, learning_rate=5e-3, warmup_steps=10, ema_decay=0.98, device="cpu"),
        total_steps=steps, seed=0,
    )  # fmt: skip
    policy = Policy(environment.space, NETWORK, **objective_config.policy_heads, shape=task.shape)
    worker = ForecastWorker(
        environment,
        PathScorer(task, "mse"),
        policy,
        ActorsConfig(batch_size=256, epsilon=0.1),
        paths_per_window=2,
        seed=1,
    )
    return learner, worker


def train(learner, worker, steps: int = 300) -> None:
    for version in range(steps):
        worker.set_weights(learner.weights(), version)
        learner.update(worker.rollout()[0])


def laws(learner, worker, task: TimeSeriesTask):
    """For each distinct window: learned law, exp(-β E[err]), E[exp(-β err)], and the law of the futures in the data."""
    worker.set_weights(learner.evaluation_weights().policy, 0)
    space, kernel, data = worker.environment.space, worker.environment.kernel, task.learner_data()
    tokens, _ = space.enumerate()
    for window in np.unique(data.windows, axis=0):
        members = (data.windows == window).all((1, 2))
        futures = torch.from_numpy(data.futures[members])
        paths = torch.from_numpy(task.bins.decode(tokens))
        errors = step_errors(paths[:, None], futures[None], "mse").sum(-1).double().numpy()
        policies = exact.policy_tables(worker.policy, single_context(torch.from_numpy(window)))
        law, _ = exact.realised_law(space, policies, kernel)
        of_mean, mean_of = np.exp(-BETA * errors.mean(1)), np.exp(-BETA * errors).mean(1)
        codes = data.tokens[members] @ np.array([4, 2, 1])
        yield law, of_mean / of_mean.sum(), mean_of / mean_of.sum(), np.bincount(codes, minlength=8) / len(codes)


@pytest.mark.parametrize(
    ("objective", "forward_looking"), [("subtb", True), ("subtb", False), ("tb", True), ("gfn_db", True)]
)
def test_where_the_window_says_the_future_the_law_is_the_reward_s(objective, forward_looking):
    """The chain alternates: TV <= .05 to exp(-β err(ŷ, y)) for each window."""
    task = chain(stay=0.0, rows=100)
    learner, worker = make(
        task, name=objective, dynamics="none", generator={"forward_looking": forward_looking}, steps=200
    )
    train(learner, worker, 200)
    for law, of_mean, mean_of, _ in laws(learner, worker, task):
        assert np.allclose(of_mean, mean_of)
        assert of_mean.max() > 0.5
        assert exact.total_variation(of_mean, law) <= 0.05


def test_where_it_does_not_the_law_is_that_of_the_mean_error():
    """A squared log-ratio regresses on E[log R | window, ŷ]: TV <= .05 to exp(-β E[err]), but not to E[exp(-β err)]."""
    task = chain(stay=0.8)
    learner, worker = make(task, name="subtb", dynamics="none", steps=300)
    train(learner, worker)
    found = list(laws(learner, worker, task))
    assert len(found) == 4
    for law, of_mean, _, _ in found:
        assert exact.total_variation(of_mean, law) <= 0.05
    assert max(exact.total_variation(mean_of, law) for law, _, mean_of, _ in found) > 0.1


def test_the_true_conditional_law_is_learned_through_noise():
    """With noise the policy corrects for it: what is realised comes as near as the kernel permits."""
    task = chain(stay=0.8)
    learner, worker = make(task, noise=0.1, name="sgfn_db")
    train(learner, worker)
    for law, of_mean, _, _ in laws(learner, worker, task):
        assert exact.total_variation(of_mean, law) <= 0.05


def test_the_likelihood_pulls_to_the_law_of_the_data():
    task = chain(stay=0.8)
    distances = []
    for weight in (0.0, 100.0):
        learner, worker = make(task, name="subtb", dynamics="none", generator={"likelihood_weight": weight}, steps=200)
        train(learner, worker, 200)
        distances.append(max(exact.total_variation(data, law) for law, _, _, data in laws(learner, worker, task)))
    assert distances[0] > 0.15
    assert distances[1] < 0.08


def test_log_z_depends_on_the_window():
    """tb, whose log Z is a parameter of its own: with windows it is that plus an output of the network."""
    task = chain(stay=0.8)
    learner, worker = make(task, name="tb", dynamics="none", steps=300)
    train(learner, worker)
    data, tokens = task.learner_data(), worker.environment.space.enumerate()[0]
    found, expected = [], []
    for window in np.unique(data.windows, axis=0):
        futures = torch.from_numpy(data.futures[(data.windows == window).all((1, 2))])
        errors = step_errors(torch.from_numpy(task.bins.decode(tokens))[:, None], futures[None], "mse").sum(-1).mean(1)
        expected.append(float((-BETA * errors).logsumexp(0)))
        root = learner.policy.start(single_context(torch.from_numpy(window)))
        found.append(float(learner.policy.at(root).log_flow.detach()))
    assert np.ptp(expected) > 0.1
    assert found == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("thoughts", [False, True])
def test_terms_on_true_futures_are_what_they_say(thoughts):
    """At the uniform start: log K nats, and the error of the mean of all bins."""
    task = chain(stay=0.8)
    generator = {"likelihood_weight": 1.0, "value_weight": 1.0}
    learner, worker = make(
        task, noise=0.1, name="sgfn_db", generator=generator, lookahead_weight=1.0, lookahead_steps=2
    )
    if thoughts:
        assert torch.equal(learner._as_symbols(torch.tensor([[0, 1]]), True), torch.tensor([[0, 3]]))
    batch, _ = worker.rollout()
    metrics = learner.update(batch)
    assert metrics["future_ce"] == pytest.approx(np.log(2), abs=0.02)
    assert metrics["lookahead_ce"] == pytest.approx(np.log(2), abs=1e-5)
    data = task.learner_data()
    futures = data.futures[np.unique(batch.contexts)]
    assert metrics["future_error"] == pytest.approx(((data.bin_values.mean(1) - futures) ** 2).mean(), abs=0.05)


def test_rollouts_carry_the_window_they_continue():
    task = chain(stay=0.8)
    _, worker = make(task)
    batch, _ = worker.rollout()
    values, counts = np.unique(batch.contexts, return_counts=True)
    assert len(values) == 128
    assert (counts == 2).all()
    scores = PathScorer(task, "mse").score(np.column_stack([batch.contexts, batch.tokens]), batch.num_steps)
    assert np.array_equal(scores, batch.scores)


def test_resuming_learns_the_same():
    """State of a learner with noisy windows: the noise belongs to the step."""
    task, results = chain(stay=0.8), []
    for stop in (3, None):
        learner, worker = make(task, name="subtb", generator={"window_noise": 0.2})
        for step in range(6):
            if step == stop:
                state, old = learner.state_dict(), worker.state_dict()
                learner, worker = make(task, name="subtb", generator={"window_noise": 0.2})
                learner.load_state_dict(state)
                worker.load_state_dict(old)
            worker.set_weights(learner.weights(), step)
            learner.update(worker.rollout()[0])
        results.append(learner.weights())
    assert np.array_equal(*results)
