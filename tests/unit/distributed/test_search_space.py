import importlib.util

import numpy as np
import pytest

from distributed.config import ConfigError
from distributed.config_keys import validate_section
from distributed.reservation import bundles, num_fitting
from distributed.search_space import Domain, applicable, check_space, draw_points, on_steps
from distributed.sweep_config import SweepConfig
from distributed.sweep_report import TrialResult, points_of, write_report
from tests.conftest import TOY

RANGES = {
    "uniform": [0.25, 0.75],
    "loguniform": [1e-4, 1e-1],
    "randint": [3, 6],
    "quniform": [0.1, 0.5, 0.1],
    "qloguniform": [0.01, 1.0, 0.01],
    "qrandint": [4, 12, 4],
}


def space(**domains):
    return {key.replace("__", "."): Domain(**domain) for key, domain in domains.items()}


def sweep(**section):
    section = {"space": {"reward.exponent": {"grid": [1, 2]}}} | section
    return validate_section(SweepConfig, "sweep", section)


@pytest.mark.parametrize(("kind", "ends"), RANGES.items())
def test_every_draw_lies_in_its_range_and_reaches_both_halves(kind, ends):
    domain, rng = Domain(**{kind: ends}), np.random.default_rng(0)
    drawn = [domain.draw(rng) for _ in range(400)]
    low, high = domain.extremes
    assert min(drawn) >= low
    assert max(drawn) <= high
    middle = np.sqrt(low * high) if "log" in kind else (low + high) / 2
    below = sum(value <= middle for value in drawn) / len(drawn)
    assert 0.3 < below < 0.8  # four standard deviations are .1; steps move up to half a value across the middle
    if kind.startswith("q"):
        steps = np.array(drawn) / ends[2]
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-9)
    if "randint" in kind:
        assert all(isinstance(value, int) for value in drawn)
        assert {low, high} <= set(drawn)


def test_choice_draws_every_value_and_keeps_its_type():
    drawn = {repr(Domain(choice=[1, "a", None, True]).draw(np.random.default_rng(n))) for n in range(60)}
    assert drawn == {"1", "'a'", "None", "True"}


@pytest.mark.parametrize(
    ("kind", "given", "value", "kept"),
    [("uniform", [1, 2], 5.0, 2.0), ("qrandint", [4, 12, 4], 9, 8), ("randint", [0, 4], 9.6, 3),
     ("quniform", [0.1, 0.5, 0.1], 0.32, 0.3)],
)  # fmt: skip
def test_a_changed_value_is_brought_back(kind, given, value, kept):
    assert Domain(**{kind: given}).round(value) == kept


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no kind"),
        ({"grid": [1], "choice": [1]}, "choice and grid"),
        ({"uniform": [2, 1]}, "smaller one first"),
        ({"uniform": [0, float("inf")]}, "finite"),
        ({"loguniform": [0, 1]}, "must be positive"),
        ({"quniform": [0.1, 0.5, 0.15]}, "multiple of 0.15"),
        ({"quniform": [0.1, 0.5, 0]}, "greater than 0"),
        ({"randint": [0.5, 3]}, "integer"),
        ({"grid": []}, "at least 1"),
        ({"normal": [0, 1]}, "unknown key"),
    ],
)
def test_wrong_domains_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        sweep(space={"reward.exponent": given})


def test_grids_are_combined_and_random_values_shared_by_a_grid():
    given = space(
        reward__exponent={"grid": [1, 2, 3]},
        objective__gamma={"uniform": [0.1, 0.9]},
        run__max_seconds={"grid": [5, 6]},
    )
    points = draw_points(TOY, given, 2, np.random.default_rng(0))
    assert len(points) == 12
    assert len({point["objective.gamma"] for point in points}) == 2
    assert {(p["reward.exponent"], p["run.max_seconds"]) for p in points} == {(e, s) for e in (1, 2, 3) for s in (5, 6)}
    assert points == draw_points(TOY, given, 2, np.random.default_rng(0))


def test_a_condition_switches_a_key_off_and_its_grid_counts_once():
    given = space(
        objective__name={"grid": ["subtb", "sgfn_kl"]},
        objective__gamma={"grid": [0.1, 0.5], "when": {"objective.name": "sgfn_kl"}},
    )
    points = [applicable(TOY, given, point) for point in draw_points(TOY, given, 1, np.random.default_rng(0))]
    assert points == [
        {"objective.name": "subtb"},
        {"objective.name": "sgfn_kl", "objective.gamma": 0.1},
        {"objective.name": "sgfn_kl", "objective.gamma": 0.5},
    ]


def test_a_condition_may_refer_to_a_default_of_the_base_experiment():
    given = space(objective__subtb_decay={"uniform": [0.5, 1.5], "when": {"objective.name": "subtb"}})
    assert applicable(TOY, given, {"objective.subtb_decay": 0.7}) == {"objective.subtb_decay": 0.7}
    other = TOY | {"objective": {"name": "tb"}}
    assert applicable(other, given, {"objective.subtb_decay": 0.7}) == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            space(objective__gama={"uniform": [0.1, 0.9]}),
            "sweep.space.objective.gama: 0.1 is not allowed .*unknown key",
        ),
        (
            space(objective__gamma={"uniform": [0.1, 1.0]}),
            "sweep.space.objective.gamma: 1.0 is not allowed .*less than 1",
        ),
        (space(objective__name={"choice": ["subtb", "dqn"]}), "'dqn' is not allowed"),
        (space(nothing__here={"grid": [1]}), "unknown key"),
        (space(objective__gamma={"grid": [0.5], "when": {"objective.gamma": 0.5}}), "refers to itself"),
        (
            space(
                objective__gamma={"grid": [0.1], "when": {"objective.name": "sgfn_kl"}},
                reward__exponent={"grid": [2], "when": {"objective.gamma": 0.1}},
            ),
            "objective.gamma has a condition itself",
        ),
    ],
)
def test_a_key_or_value_that_no_trial_could_have_is_an_error_at_once(given, message):
    with pytest.raises(ConfigError, match=message):
        check_space(TOY, given)


def test_points_whose_keys_contradict_each_other_are_an_error_at_once():
    base = TOY | {"replay": {"replay_share": 0.5}}
    given = space(dynamics__mode={"grid": ["off_policy", "on_policy"]}, replay__priority_exponent={"grid": [0, 2]})
    with pytest.raises(ConfigError, match=r"the point .*on_policy.* is not allowed"):
        draw_points(base, given, 1, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"seeds": [1, 1]}, "each may be listed once"),
        ({"space": {"run.seed": {"grid": [1]}}}, "varied by sweep.seeds"),
        ({"search": "optuna"}, "is a grid"),
        ({"search": "bayes"}, "random"),
        ({"scheduler": {"name": "pbt"}, "seeds": [0, 1]}, "one seed"),
        ({"scheduler": {"name": "pbt"}, "max_concurrent": 2}, "take turns"),
        ({"scheduler": {"name": "pbt"}, "space": {"network.hidden_size": {"choice": [8]}}}, "cannot change while"),
        ({"scheduler": {"name": "pbt"}, "space": {"objective.name": {"choice": ["tb"]}}}, "cannot change while"),
        ({"scheduler": {"name": "pbt"}, "space": {"replay.capacity": {"choice": [8]}}}, "cannot change while"),
        (
            {"scheduler": {"name": "pbt"}, "search": "optuna", "space": {"reward.exponent": {"choice": [1]}}},
            "search: random",
        ),
        ({"num_sample": 3}, "unknown key"),
        ({"space": {}}, "at least 1"),
    ],
)
def test_wrong_sections_are_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        sweep(**section)


def test_a_search_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install hyperopt"):
        sweep(search="hyperopt", space={"reward.exponent": {"uniform": [1, 2]}})


def test_a_trial_reserves_its_driver_its_learner_and_every_rollout_actor(toy):
    config = toy(**{"run.backend": "ray", "actors.num_rollout_actors": 3, "actors.num_cpus": 0.5})
    assert bundles(sweep(), config) == [{"CPU": 0.25}, {"CPU": 1.0}, {"CPU": 0.5}, {"CPU": 0.5}, {"CPU": 0.5}]
    assert bundles(sweep(trial_num_cpus=2), toy()) == [{"CPU": 2.0}]


@pytest.mark.parametrize(
    ("device", "has_gpu", "reserved"),
    [("auto", True, 1.0), ("auto", False, 0.0), ("cuda", False, 1.0), ("cpu", True, 0.0)],
)
def test_the_learner_of_a_trial_reserves_a_gpu_where_it_will_use_one(toy, device, has_gpu, reserved):
    for backend, bundle in (("ray", 1), ("serial", 0)):
        config = toy(**{"run.backend": backend, "learner.device": device})
        assert bundles(sweep(), config, has_gpu)[bundle].get("GPU", 0.0) == reserved


def test_rollout_actors_of_a_trial_are_where_their_resource_is(toy):
    config = toy(**{"run.backend": "ray", "actors.rollout_resource": "cpu_node"})
    assert bundles(sweep(), config)[2] == {"CPU": 0.5, "cpu_node": 0.001}
    with pytest.raises(ConfigError, match=r"allowed in a sweep.*: a number"):
        bundles(sweep(), toy(**{"run.backend": "ray", "actors.num_rollout_actors": "auto"}))


def test_values_that_a_search_leaves_between_steps_are_moved_onto_them():
    given = space(reward__exponent={"qloguniform": [1, 4, 0.5]}, objective__name={"choice": ["tb"]})
    assert on_steps(given, {"reward.exponent": 1.3, "objective.name": "tb", "run.seed": 3}) == {
        "reward.exponent": 1.5, "objective.name": "tb", "run.seed": 3,
    }  # fmt: skip


def test_bundles_are_placed_whole():
    assert num_fitting([{"CPU": 1.0}, {"CPU": 0.5}], [{"CPU": 4.0}]) == 2
    assert num_fitting([{"CPU": 1.0}] * 4, [{"CPU": 2.0}, {"CPU": 2.0}]) == 1
    assert num_fitting([{"CPU": 3.0}], [{"CPU": 2.0}, {"CPU": 2.0}]) == 0  # enough in all, but on no node
    assert num_fitting([{"CPU": 1.0, "GPU": 1.0}], [{"CPU": 8.0}]) == 0
    assert num_fitting([{"CPU": 1.0}], []) == 0


def trial(number, exponent, seed, value, status="done"):
    metrics = {} if value is None else {"excess_kl": value}
    return TrialResult(f"t{number}", {"reward.exponent": exponent, "run.seed": seed}, status, metrics, "")


def test_points_are_judged_by_the_median_of_their_seeds_and_failed_trials_do_not_count(tmp_path):
    results = [
        trial(0, 1, 0, 0.3), trial(1, 1, 1, 0.1), trial(2, 1, 2, 0.2),
        trial(3, 2, 0, 0.15), trial(4, 2, 1, 0.05, "failed"), trial(5, 2, 2, 0.17, "stopped"),
    ]  # fmt: skip
    whole, lacking = points_of(results, sweep(), "excess_kl", TOY)
    assert whole.point == {"reward.exponent": 1}
    assert whole.value == pytest.approx(0.2)
    assert lacking.value == pytest.approx(0.16)  # better, but a trial of it failed
    assert lacking.statuses == ["done", "failed", "stopped"]
    results[4] = trial(4, 2, 1, 0.05)
    assert points_of(results, sweep(), "excess_kl", TOY)[0].point == {"reward.exponent": 2}
    assert points_of(results, sweep(mode="max"), "excess_kl", TOY)[0].point == {"reward.exponent": 1}
    write_report(tmp_path, sweep(), "excess_kl", TOY, results)
    assert (tmp_path / "points.csv").read_text().splitlines()[1] == "2,0.15,0.05,0.17,3,3"
    assert "exponent: 2" in (tmp_path / "best.yaml").read_text()
    assert (tmp_path / "sweep.png").stat().st_size > 5_000


def test_a_sweep_without_a_single_figure_still_leaves_its_table(tmp_path):
    points = write_report(tmp_path, sweep(), "excess_kl", TOY, [trial(0, 1, 0, None, "failed")])
    assert np.isnan(points[0].value)
    assert not (tmp_path / "best.yaml").exists()
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "domains",
    [
        {"reward.exponent": {"grid": [1, 2]}, "objective.gamma": {"choice": [0.2, 0.5]}},
        {"reward.exponent": {"choice": [1, 2]}, "objective.gamma": {"loguniform": [0.1, 0.6]}, "actors.epsilon": {"choice": [0]}},
        {"reward.exponent": {"choice": [1, 2]}},
    ],
)  # fmt: skip
def test_plots_of_grids_ranges_and_single_points(tmp_path, domains):
    settings = sweep(space=domains)
    points = draw_points(TOY, settings.space, 3, np.random.default_rng(0))
    results = [TrialResult(str(n), p, "done", {"excess_kl": 0.1 * n}, "") for n, p in enumerate(points)]
    for some in (results, results[:1]):
        write_report(tmp_path, settings, "excess_kl", TOY, some)
        assert (tmp_path / "sweep.png").stat().st_size > 5_000
