"""The learner with transformers: which networks read thoughts, and toys trained to their target."""

import itertools

import numpy as np
import pytest
import torch

from actors.environments.noise import UniformSubstitution
from actors.environments.sequence import EnvironmentConfig, SequenceEnvironment
from actors.rollout import draw_trajectories
from actors.trajectories import TrajectoryBatch, empty_batch
from learner import exact
from learner.dynamics import DynamicsConfig, DynamicsModel
from learner.gflownet import GFlowNetLearner, LearnerConfig
from learner.networks import MLPConfig, NetworkConfig, TransformerConfig
from learner.networks.prefixes import join_symbols
from learner.objectives.config import ObjectiveConfig
from learner.policy import Policy
from learner.rewards import RewardConfig
from learner.space import SequenceSpace
from tests.reference import draw_paths, fixed_space, randomise, real_steps, variable_space

MLP = MLPConfig(hidden_size=12, num_layers=1, kmer_sizes=())


def transformer(thought_context: bool) -> TransformerConfig:
    return TransformerConfig(
        name="transformer", hidden_size=16, num_heads=2, num_layers=1, thought_context=thought_context
    )


PLAIN, THOUGHTS = transformer(False), transformer(True)
PAIRS = [(PLAIN, MLP), (THOUGHTS, MLP), (PLAIN, PLAIN), (THOUGHTS, THOUGHTS), (MLP, THOUGHTS), (THOUGHTS, PLAIN)]
NAMES = ["plain-mlp", "thoughts-mlp", "plain-plain", "thoughts-thoughts", "mlp-thoughts", "thoughts-plain"]


def make_learner(
    space: SequenceSpace, network: NetworkConfig, dynamics: NetworkConfig, *, objective: str = "sgfn_db", **settings
) -> GFlowNetLearner:
    sizes = {"batch_size": 256, "learning_rate": 5e-3, "ema_decay": 0.95, "warmup_steps": 5, "device": "cpu"}
    return GFlowNetLearner(
        space,
        network=network,
        objective=ObjectiveConfig(name=objective, **settings.pop("objective_settings", {})),
        dynamics=DynamicsConfig(network=dynamics, mode="on_policy", learning_rate=settings.pop("dynamics_rate", 1e-2)),
        reward=RewardConfig(exponent=2.0),
        learner=LearnerConfig(**sizes | settings.pop("learner", {})),
        total_steps=settings.pop("steps", 100),
        seed=0,
    )


@torch.no_grad()
def value_at(model: Policy | DynamicsModel, tokens: list[int], actions: list[int]) -> torch.Tensor:
    """What a model says step by step after `tokens` and `actions`."""
    state = model.start()
    for token, action in zip(tokens, actions, strict=True):
        symbol = token * model.space.num_actions + action if model.thought_context else token
        state = model.extend(state, torch.tensor([0]), torch.tensor([symbol]))
    outputs = model.at(state)
    return outputs[0] if isinstance(outputs, torch.Tensor) else outputs


def naive_loss(learner: GFlowNetLearner, batch: TrajectoryBatch, log_rewards: np.ndarray, objective: str) -> float:
    """Mean squared residual over real steps, each state evaluated by itself."""
    total, count = 0.0, 0
    for b, t, prefix, action, token in real_steps(batch):
        thoughts = batch.actions[b, : t + 1].tolist()
        policy = value_at(learner.policy, list(prefix), thoughts[:-1])
        after = (
            log_rewards[b]
            if t + 1 == batch.num_steps[b]
            else float(value_at(learner.policy, [*prefix, token], thoughts).log_flow)
        )
        outcome = value_at(learner.dynamics, list(prefix), thoughts[:-1])[:, token].exp().double().numpy()
        joint = policy.log_policy[0].exp().double().numpy() * outcome
        step = np.log(joint[action])
        if objective == "sgfn_db":
            step -= np.log(joint[action] / joint.sum())
        else:
            step = np.log(joint.sum())
        total += (float(policy.log_flow) + step - after) ** 2
        count += 1
    return total / count


@pytest.mark.parametrize("space", [fixed_space(3, 3), variable_space(2, 4, 1)], ids=str)
@pytest.mark.parametrize("objective", ["sgfn_db", "sgfn_marginal"])
@pytest.mark.parametrize(("network", "dynamics"), PAIRS, ids=NAMES)
def test_loss_equals_the_naive_one(space, objective, network, dynamics):
    """The first step with steps of size nothing: the loss is that of the given weights."""
    learner = make_learner(
        space, network, dynamics, objective=objective, dynamics_rate=1e-30, learner={"learning_rate": 1e-30}
    )
    learner.step = 1  # past whatever the first step sets up
    randomise(learner.policy, seed=1, scale=0.3)
    randomise(learner.dynamics, seed=2, scale=0.3)
    batch = draw_paths(space, UniformSubstitution(0.3).kernel(space.allowed), 25, seed=3)
    expected = naive_loss(learner, batch, 2 * np.log(batch.scores.astype(np.float64)), objective)
    assert learner.update(batch)["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("network", "dynamics"), PAIRS, ids=NAMES)
def test_dynamics_cross_entropy_equals_the_naive_one(network, dynamics):
    space = variable_space(2, 3, 1)
    learner = make_learner(space, network, dynamics, dynamics_rate=1e-30, learner={"learning_rate": 1e-30})
    randomise(learner.dynamics, seed=4, scale=0.3)
    batch = draw_paths(space, UniformSubstitution(0.3).kernel(space.allowed), 25, seed=5)
    terms = [
        -float(value_at(learner.dynamics, list(prefix), batch.actions[b, :t].tolist())[action, token])
        for b, t, prefix, action, token in real_steps(batch)
    ]
    assert learner.update(batch)["dynamics_ce"] == pytest.approx(np.mean(terms), rel=1e-4)


OTHER_OBJECTIVES = [
    ("sgfn_kl", {}),
    ("tb", {}),
    ("subtb", {}),
    ("sgfn_db", {"backward": "learned", "lookahead_weight": 0.1}),
    ("gfn_db", {}),
    ("soft_q", {}),
    ("ppo", {}),
]


@pytest.mark.parametrize(("objective", "settings"), OTHER_OBJECTIVES, ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_objective_takes_thoughts(objective: str, settings: dict, precision: str):
    space = variable_space(2, 3, 1)
    learner = make_learner(
        space, THOUGHTS, THOUGHTS, objective=objective, objective_settings=settings, learner={"precision": precision}
    )
    before = learner.weights()
    batch = draw_paths(space, UniformSubstitution(0.3).kernel(space.allowed), 40, seed=6)
    for _ in range(3):
        metrics = learner.update(batch)
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert np.isfinite(learner.weights()).all()
    assert (learner.weights() != before).any()


# --- toys trained to their target -------------------------------------------------------------------------------------


@torch.no_grad()
def brute_force_law(policy: Policy, kernel: np.ndarray) -> np.ndarray:
    """p(x) of fixed-length strings: Σ over all strings of intentions of Π_t π(a_t|x_<t, a_<t) K_t(x_t|a_t)."""
    space = policy.space
    steps, size = space.max_length, space.num_tokens
    strings = np.array(list(itertools.product(range(size), repeat=steps)))
    law = np.zeros(len(strings))
    for i, tokens in enumerate(strings):
        for actions in strings:
            symbols = torch.from_numpy(join_symbols(tokens[None], actions[None], size, policy.thought_context))
            rows = policy(symbols, torch.arange(steps)).log_policy.exp().double().numpy()
            law[i] += np.prod([rows[t, actions[t]] * kernel[t, actions[t], tokens[t]] for t in range(steps)])
    return law


def train(network: NetworkConfig, dynamics: NetworkConfig, objective: str, steps: int) -> dict[str, float]:
    env = SequenceEnvironment(EnvironmentConfig(alphabet="AB", length=3, noise=0.25))
    scores = np.random.default_rng(1).uniform(0.6, 1, 8)
    learner = make_learner(env.space, network, dynamics, objective=objective, steps=steps)
    rng = np.random.default_rng(2)
    for _ in range(steps):
        batch = draw_trajectories(learner.policy, env, env.noise, 256, rng)
        batch.scores[:] = scores[batch.tokens @ np.int64([4, 2, 1])]
        learner.update(batch)
    learner.policy_weights.load(learner.evaluation_weights().policy)
    target = exact.target_tree(env.space, 2 * np.log(scores))
    law = brute_force_law(learner.policy, env.kernel)
    assert law.sum() == pytest.approx(1, abs=1e-5)
    if not learner.policy.thought_context:
        table_law, _ = exact.realised_law(env.space, exact.policy_tables(learner.policy), env.kernel)
        np.testing.assert_allclose(table_law, law, atol=1e-6)
    uniform = exact.total_variation(target.law, np.full(8, 1 / 8))
    with torch.no_grad():
        log_z = float(learner.policy.at(learner.policy.start()).log_flow)
    return {
        "tv": exact.total_variation(target.law, law),
        "uniform_tv": uniform,
        "log_z_error": log_z - target.log_z,
        "dynamics_tv": dynamics_tv(learner.dynamics, env.kernel),
    }


@torch.no_grad()
def dynamics_tv(model: DynamicsModel, kernel: np.ndarray) -> float:
    """Mean over all prefixes (and thoughts) and intentions of the distance between P̂ and the true kernel."""
    space, distances = model.space, []
    strings = np.array(list(itertools.product(range(space.num_tokens), repeat=space.max_length)))
    for tokens, actions in itertools.product(strings, strings):
        symbols = join_symbols(tokens[None], actions[None], space.num_actions, model.thought_context)
        tables = model(torch.from_numpy(symbols), torch.arange(space.max_length)).exp().double().numpy()
        distances.append(0.5 * np.abs(tables - kernel).sum(-1).mean())
    return float(np.mean(distances))


@pytest.mark.parametrize(
    ("network", "dynamics", "objective"),
    [*((*pair, "sgfn_db") for pair in PAIRS), (THOUGHTS, MLP, "tb")],
    ids=[*NAMES, "thoughts-mlp-tb"],
)
def test_a_toy_is_learned(network: NetworkConfig, dynamics: NetworkConfig, objective: str):
    """The distances of seed 0 are about .006; the limits are five times those."""
    result = train(network, dynamics, objective, steps=150)
    assert result["uniform_tv"] > 0.1
    assert result["tv"] < 0.03
    assert abs(result["log_z_error"]) < 0.02
    assert result["dynamics_tv"] < 0.05


def test_batches_of_one_trajectory_and_of_none_but_ends():
    space = variable_space(2, 3, 0)
    learner = make_learner(space, THOUGHTS, THOUGHTS)
    batch = empty_batch(3, 1)
    batch.tokens[:, 0] = batch.actions[:, 0] = space.end
    batch.num_steps[:], batch.scores[:] = 1, 0.5
    metrics = learner.update(batch)
    assert all(np.isfinite(value) for value in metrics.values())
