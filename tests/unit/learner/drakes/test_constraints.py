"""Constraints: the penalty of one-hots against plain string searches, gradients, and the check for reports."""

import re
from itertools import groupby

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.nn.functional import one_hot

from actors.denoising import draw_sequences
from learner.drakes.config import DrakesConfig
from learner.drakes.constraints import IUPAC, ConstraintConfig, constraint_penalties, violation_metrics
from learner.drakes.learner import DrakesLearner

PARSE = TypeAdapter(ConstraintConfig).validate_python
COMPLEMENT = str.maketrans("ACGTRYSWKMBDHVN", "TGCAYRSWMKVHDBN")


def rule(name: str, **settings):
    return PARSE({"name": name, **settings})


def random_tokens(count: int, length: int, *, letters: int = 4, seed: int = 0) -> Tensor:
    return torch.randint(letters, (count, length), generator=torch.Generator().manual_seed(seed))


def texts(tokens: Tensor) -> list[str]:
    return ["".join("ACGT"[t] for t in row) for row in tokens.tolist()]


def tokens_of(*sequences: str) -> Tensor:
    return torch.tensor([["ACGT".index(letter) for letter in s] for s in sequences])


def encode(tokens: Tensor) -> Tensor:
    return one_hot(tokens, 4).double()


def site_count(text: str, motifs: list[str], *, both_strands: bool) -> int:
    strands = {m.replace("U", "T") for m in motifs}
    if both_strands:
        strands |= {m.translate(COMPLEMENT)[::-1] for m in strands}
    patterns = ["(?=" + "".join(f"[{IUPAC[letter]}]" for letter in m) + ")" for m in strands]
    return sum(len(re.findall(p, text)) for p in patterns)


@pytest.mark.parametrize("both_strands", [True, False])
@pytest.mark.parametrize("motifs", [["GA"], ["ACG", "CGT"], ["AT", "CWG", "RY"], ["N"], ["UAG", "GNNC", "AAAAAAAAA"]])
def test_soft_and_hard_counts_of_sites_are_those_of_a_string_search(motifs, both_strands):
    constraint = rule("forbidden_motifs", motifs=motifs, both_strands=both_strands)
    tokens = random_tokens(60, 12)
    expected = [site_count(text, motifs, both_strands=both_strands) for text in texts(tokens)]
    assert constraint.violations(tokens).tolist() == expected
    np.testing.assert_allclose(constraint.penalty(encode(tokens)), expected, atol=1e-12)
    assert motifs == ["UAG", "GNNC", "AAAAAAAAA"] or any(expected)


def test_a_palindrome_counts_once_and_a_motif_longer_than_the_sequence_never():
    constraint = rule("forbidden_motifs", motifs=["GAATTC", "GAATTC"])
    assert constraint.violations(tokens_of("AAGAATTCAA", "GAATTGAAAA")).tolist() == [1, 0]
    assert constraint.violations(tokens_of("GAATT")).tolist() == [0]
    assert rule("forbidden_motifs", motifs=["GGTCTC"]).violations(tokens_of("AGAGACCA")).tolist() == [1]
    one_strand = rule("forbidden_motifs", motifs=["GGTCTC"], both_strands=False)
    assert one_strand.violations(tokens_of("AGAGACCA")).tolist() == [0]


@pytest.mark.parametrize("max_run", [1, 2, 3, 7, 8, 20])
def test_soft_and_hard_excess_of_runs_are_those_of_counted_runs(max_run):
    constraint = rule("homopolymer", max_run=max_run)
    tokens = torch.cat([random_tokens(60, 8, letters=2), tokens_of("AAAAAAAA", "AAAATTTT")])
    runs = [[len(list(group)) for _, group in groupby(text)] for text in texts(tokens)]
    expected = [sum(max(0, run - max_run) for run in row) for row in runs]
    assert constraint.violations(tokens).tolist() == expected
    np.testing.assert_allclose(constraint.penalty(encode(tokens)), expected, atol=1e-12)


def test_gc_is_judged_sequence_by_sequence():
    constraint = rule("gc_content", target=0.5)
    mixture = tokens_of("AAAATTTT", "GGGGCCCC", "ACGTACGT")
    np.testing.assert_allclose(constraint.penalty(encode(mixture)), [0.25, 0.25, 0], atol=1e-12)
    assert constraint.violations(mixture).tolist() == [1, 1, 0]


def test_a_dead_band_costs_nothing_within():
    constraint = rule("gc_content", target=0.4, dead_band=0.1)
    tokens = tokens_of("CCCCCAAAAA", "CCCAAAAAAA", "CCCCCCCAAA", "AAAAAAAAAA")
    np.testing.assert_allclose(constraint.penalty(encode(tokens)), [0, 0, 0.04, 0.09], atol=1e-12)
    assert constraint.violations(tokens).tolist() == [0, 0, 1, 1]


def test_the_nearest_attainable_share_is_no_violation():
    assert rule("gc_content", target=0.5).violations(tokens_of("ACG", "AAG", "AAA", "CCC")).tolist() == [0, 0, 1, 1]


def test_the_gradient_of_gc_reaches_c_and_g_alone():
    x = random_tokens(6, 5, seed=3)
    x = (encode(x) * 0.9 + 0.025).requires_grad_()
    (gradient,) = torch.autograd.grad(rule("gc_content", target=0.3).penalty(x).sum(), x)
    share = x.detach()[..., 1:3].sum((1, 2)) / 5
    expected = torch.zeros_like(x)
    expected[..., 1:3] = (2 * (share - 0.3) / 5)[:, None, None]
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)


RULES = [
    rule("gc_content", target=0.3, dead_band=0.05),
    rule("forbidden_motifs", motifs=["CCW", "GAT"]),
    rule("homopolymer", max_run=2),
]


@pytest.mark.parametrize("constraint", RULES, ids=lambda c: c.name)
def test_penalties_are_differentiable_and_push_violations(constraint):
    soft = torch.rand(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).softmax(-1)
    assert torch.autograd.gradcheck(constraint.penalty, soft.requires_grad_())
    violating = encode(tokens_of("CCCATC", "GATCCC")).requires_grad_()
    (gradient,) = torch.autograd.grad(constraint.penalty(violating).sum(), violating)
    assert (gradient.abs().sum((1, 2)) > 0).all()
    assert ((gradient * violating).sum((1, 2)) > 0).all()


def test_the_penalties_are_weighted_sums():
    x = encode(random_tokens(9, 8))
    rules = [r.model_copy(update={"weight": w}) for r, w in zip(RULES, (2, 3, 0.5), strict=True)]
    total, metrics = constraint_penalties(rules, x)
    parts = [r.penalty(x) for r in rules]
    assert total.tolist() == pytest.approx((2 * parts[0] + 3 * parts[1] + 0.5 * parts[2]).tolist())
    assert [float(m) for m in metrics.values()] == pytest.approx([float(part.mean()) for part in parts])
    assert list(metrics) == ["gc_content_penalty", "forbidden_motifs_penalty", "homopolymer_penalty"]
    assert constraint_penalties([], x)[0].tolist() == [0] * 9
    twice, metrics = constraint_penalties([rules[2], rules[2]], x)
    assert twice.tolist() == pytest.approx(parts[2].tolist())
    assert float(metrics["homopolymer_penalty"]) == pytest.approx(2 * float(parts[2].mean()))


def test_the_policy_gradient_obeys_them():
    """The reward is the same everywhere, so only the rule is learned: the share of G and C falls from a half to near 0."""
    settings = {
        "name": "drakes",
        "denoiser": {"hidden_size": 8, "num_layers": 1, "num_heads": 2},
        "rollout": {"estimator": "reinforce", "num_steps": 4},
        "constraints": [{"name": "gc_content", "target": 0, "weight": 5}],
        "standardise": False,
        "learning_rate": 0.02,
        "scheduler": "constant",
        "batch_size": 32,
    }
    config = DrakesConfig.model_validate(settings)
    learner = DrakesLearner(
        config, 4, 4, data=np.zeros((1, 4), np.int64), scores=None, device=torch.device("cpu"), total_steps=25, seed=0
    )
    shares = []
    for seed in range(25):
        fresh = draw_sequences(learner.model, 32, config.rollout, seed=seed)
        fresh.scores[:] = 0.5
        metrics = learner.update(fresh)
        share = np.isin(fresh.tokens, (1, 2)).mean(1)
        assert metrics["gc_content_penalty"] == pytest.approx(np.square(share).mean())
        shares.append(share.mean())
    assert shares[0] > 0.35
    assert shares[-1] < 0.15


def test_the_report_counts_sequences():
    tokens = tokens_of("AAATCG", "CCTAGA", "ACGTAC", "ACTACT")
    metrics = violation_metrics([rule("homopolymer", max_run=2), rule("forbidden_motifs", motifs=["CCT"])], tokens)
    assert metrics == {"homopolymer_violated": 0.25, "forbidden_motifs_violated": 0.25, "any_violated": 0.5}
    assert violation_metrics([], tokens) == {"any_violated": 0}
    with pytest.raises(ValueError, match="no sequence"):
        violation_metrics([], tokens[:0])


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"name": "forbidden_motifs", "motifs": ["GAX"]}, "motifs"),
        ({"name": "forbidden_motifs", "motifs": []}, "motifs"),
        ({"name": "gc_content", "target": 1.5}, "target"),
        ({"name": "homopolymer", "max_run": 0}, "max_run"),
        ({"name": "homopolymer", "maximum": 3}, "maximum"),
        ({"name": "tm"}, "name"),
    ],
)
def test_wrong_settings_are_named(settings, place):
    with pytest.raises(ValidationError, match=place):
        PARSE(settings)
