"""The configuration of objectives: defaults, what follows from it, and what is refused."""

import pytest
import torch
from pydantic import ValidationError

from learner.objectives.config import DEFAULT_WEIGHTS, ObjectiveConfig
from learner.objectives.losses import LOSSES, objective_loss
from tests.reference import fixed_space
from tests.reference_objectives import random_toy

WITHOUT_TERMS = {"kl_weight": 0.0, "exploration_weight": 0.0}


def test_null_weights_mean_the_defaults():
    names = list(DEFAULT_WEIGHTS)
    for objective in LOSSES:
        expected = [0.01, 0.001] if objective == "sgfn_kl" else [0, 0]
        assert [ObjectiveConfig(name=objective).weight(name) for name in names] == expected
        given = ObjectiveConfig(name=objective, kl_weight=0.3, exploration_weight=0.0)
        assert [given.weight(name) for name in names] == [0.3, 0.0]


def test_null_step_size_of_log_z_means_a_parameter_for_tb_only():
    assert {name: ObjectiveConfig(name=name).log_z_step_size for name in LOSSES} == {
        name: 0.05 if name == "tb" else None for name in LOSSES
    }
    for name in LOSSES:
        config = ObjectiveConfig(name=name, log_z_learning_rate=0.2)
        assert config.log_z_step_size == 0.2
        assert config.policy_heads["own_log_z"]


def test_heads_follow_from_the_objective():
    def heads(**objective) -> dict:
        return dict(ObjectiveConfig(**objective).policy_heads)

    assert heads() == {"backward_head": False, "lookahead_steps": 0, "own_log_z": False, "values": False}
    assert {name for name in LOSSES if heads(name=name)["values"]} == {"ppo"}
    assert heads(lookahead_weight=0.1, lookahead_steps=5)["lookahead_steps"] == 5
    assert heads(lookahead_steps=5)["lookahead_steps"] == 0
    with_head = {name for name in LOSSES if heads(name=name, backward="learned")["backward_head"]}
    assert with_head == {"sgfn_db", "sgfn_kl", "tb", "subtb"}
    assert {name for name in LOSSES if not ObjectiveConfig(name=name).uses_dynamics} == {"gfn_db", "soft_q", "ppo"}


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "sgfn_kl", "kl": "posterior", "backward": "learned"},
        {"name": "sgfn_db", "kl": "posterior", "backward": "learned", "kl_weight": 0.1},
        *({"name": name, "kl": "posterior", "kl_weight": 0.1} for name in ("gfn_db", "soft_q", "ppo")),
        {"name": "tb", "dynamics": "none", "kl": "posterior", "kl_weight": 0.1},
    ],
    ids=str,
)
def test_a_posterior_that_is_not_there_is_refused(objective: dict):
    with pytest.raises(ValidationError, match="kl: posterior"):
        ObjectiveConfig(**objective)
    ObjectiveConfig(**(objective | {"kl": "flow"}))
    ObjectiveConfig(**(objective | WITHOUT_TERMS))


@pytest.mark.parametrize("name", ["gfn_db", "soft_q", "ppo"])
def test_a_posterior_that_does_not_count_needs_no_dynamics(name: str):
    config = ObjectiveConfig(name=name, kl="posterior", kl_weight=0.0, exploration_weight=0.1)
    assert torch.isfinite(objective_loss(random_toy(fixed_space(3, 3)).step(config))[0])


def test_stochastic_objectives_need_dynamics():
    for name in LOSSES:
        if name.startswith("sgfn"):
            with pytest.raises(ValidationError, match="dynamics: none"):
                ObjectiveConfig(name=name, dynamics="none")
        else:
            config = ObjectiveConfig(name=name, dynamics="none", backward="learned")
            assert not config.uses_dynamics
            assert not config.uses_backward_head


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "dqn"), ("backward", "uniform"), ("gamma", 0.0), ("gamma", 1.0), ("entropy_quantile", 0.5),
        ("entropy_quantile", 1.01), ("kl_weight", -0.1), ("exploration_weight", float("nan")), ("subtb_decay", 0.0),
        ("subtb_decay", 101.0), ("max_importance_weight", 0.9), ("lookahead_steps", 0), ("lookahead_weight", -1.0),
        ("log_z_learning_rate", 0.0), ("ppo_clip", 1.0), ("backward_support", 0.0), ("lambda_kl", 0.1),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(key: str, value: object):
    with pytest.raises(ValidationError, match=key):
        ObjectiveConfig(**{key: value})
