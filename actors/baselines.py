"""Search without a learned model: uniform draws, Metropolis–Hastings chains and a genetic algorithm.

Baselines to set beside trained samplers. They work on designs, the intended sequences, of fixed length: the oracle is
asked about the designs themselves, and the environment's noise acts only when the finished designs are made. Every
design put to the oracle counts as one call, also if it was asked about before. Shapes: n designs, T positions, V tokens.
"""

from typing import Protocol

import numpy as np

from actors.environments.sequence import SequenceEnvironment
from actors.oracles.base import Oracle
from learner.rewards import RewardConfig, valid_log_rewards, valid_scores


class SearchBaseline(Protocol):
    """Improves n designs step by step."""

    designs: np.ndarray
    """int16 [n, T]: tokens of the present designs."""
    scores: np.ndarray
    """float32 [n]: what the oracle said of them, NaN and negative scores included."""
    num_oracle_calls: int
    """Designs that the oracle was asked about so far, the first n included."""

    def step(self) -> None:
        """One step for all n designs at once."""
        ...


class _Search:
    """Uniformly drawn and scored designs, the start of every baseline."""

    def __init__(
        self,
        environment: SequenceEnvironment,
        oracle: Oracle,
        reward: RewardConfig,
        num_designs: int,
        rng: np.random.Generator,
    ):
        """Raises ValueError for an environment of variable length, and for less than one design."""
        if environment.space.variable_length:
            raise ValueError("search baselines need sequences of fixed length: environment.variable_length false")
        if num_designs < 1:
            raise ValueError(f"num_designs: got {num_designs}; allowed: 1 or more")
        self.num_oracle_calls = 0
        self._space, self._oracle, self._reward, self._rng = environment.space, oracle, reward, rng
        self._num_designs = num_designs
        self.designs = self._uniform_designs()
        self.scores = self._score(self.designs)

    def _uniform_designs(self) -> np.ndarray:
        shape = (self._num_designs, self._space.max_length)
        return self._rng.integers(self._space.num_tokens, size=shape, dtype=np.int16)

    def _score(self, designs: np.ndarray) -> np.ndarray:
        lengths = np.full(len(designs), self._space.max_length, dtype=np.int16)
        self.num_oracle_calls += len(designs)
        return np.asarray(self._oracle.score(designs, lengths), dtype=np.float32)

    def _substitute(self, designs: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """`designs` int16 [m, T] with a uniformly drawn different token wherever `chosen` bool [m, T]."""
        shifts = self._rng.integers(1, self._space.num_tokens, size=np.count_nonzero(chosen), dtype=np.int16)
        changed = designs.copy()
        changed[chosen] = (designs[chosen] + shifts) % self._space.num_tokens
        return changed


class UniformSearch(_Search):
    """No search at all: each step draws all designs anew, uniformly."""

    def step(self) -> None:
        """Draw and score n new designs."""
        self.designs = self._uniform_designs()
        self.scores = self._score(self.designs)


class MetropolisHastings(_Search):
    """n independent chains that tend to p(x) ∝ R(x), the final reward (Metropolis et al. 1953, Hastings 1970).

    A step proposes, at one uniformly drawn position, a uniformly drawn different token, and accepts it with probability
    min(1, R(y)/R(x)). An invalid score counts as R = 0, and is accepted from another invalid one only. The proposal is
    fixed, unlike that of MARS (Xie et al. 2021, arXiv 2103.10432), which is learned and whose target is annealed: a
    figure of this baseline says nothing of MARS. `learner.exact_baselines.metropolis_law` is the exact law of a chain.
    """

    def step(self) -> None:
        """One proposal in every chain."""
        positions = self._rng.integers(self._space.max_length, size=(self._num_designs, 1))
        proposals = self._substitute(self.designs, np.arange(self._space.max_length) == positions)
        scores = self._score(proposals)
        now, proposed = (valid_log_rewards(each, self._reward) for each in (self.scores, scores))
        with np.errstate(invalid="ignore"):
            log_ratio = np.where(np.isneginf(now), 0.0, np.minimum(proposed - now, 0.0))
        accepted = self._rng.random(self._num_designs) < np.exp(log_ratio)
        self.designs = np.where(accepted[:, None], proposals, self.designs)
        self.scores = np.where(accepted, scores, self.scores)


class GeneticSearch(_Search):
    """A generational genetic algorithm that maximises the score (Holland 1975; Goldberg 1989); R itself plays no part.

    The best distinct designs survive (De Jong 1975); all others are children: two parents, each the better of a few
    drawn at random (tournaments; Goldberg and Deb 1991), exchange what lies between two cuts (two-point crossover), and
    each position then mutates to a different token at a rate of 1/T (Mühlenbein 1992). An invalid score is worse than
    any valid one. Survivors keep the score that they have, so a generation costs n calls less their number.
    """

    def __init__(
        self,
        environment: SequenceEnvironment,
        oracle: Oracle,
        reward: RewardConfig,
        num_designs: int,
        rng: np.random.Generator,
        *,
        num_survivors: int | None = None,
        tournament_size: int = 2,
        mutation_rate: float | None = None,
    ):
        """`num_survivors`: n/20 rounded up if None; `mutation_rate` per position: 1/T if None. Raises ValueError."""
        num_survivors = -(-num_designs // 20) if num_survivors is None else num_survivors
        mutation_rate = 1 / environment.space.max_length if mutation_rate is None else mutation_rate
        if num_designs < 2 or not 0 <= num_survivors < num_designs:
            raise ValueError(f"num_survivors: got {num_survivors} of {num_designs} designs; allowed: 0..n-1, of n >= 2")
        if tournament_size < 1:
            raise ValueError(f"tournament_size: got {tournament_size}; allowed: 1 or more")
        if not 0 <= mutation_rate <= 1:
            raise ValueError(f"mutation_rate: got {mutation_rate}; allowed: 0..1")
        super().__init__(environment, oracle, reward, num_designs, rng)
        self._num_survivors, self._tournament_size = num_survivors, tournament_size
        self._mutation_rate = mutation_rate

    def step(self) -> None:
        """One generation; survivors come first in `designs`, best first."""
        fitness = np.where(valid_scores(self.scores), self.scores, -np.inf)
        survivors = self._survivors(fitness)
        num_children = self._num_designs - len(survivors)
        first, second = (self.designs[self._tournaments(fitness, num_children)] for _ in range(2))
        children = self._crossover(first, second)
        children = self._substitute(children, self._rng.random(children.shape) < self._mutation_rate)
        self.scores = np.concatenate([self.scores[survivors], self._score(children)])
        self.designs = np.concatenate([self.designs[survivors], children])

    def _survivors(self, fitness: np.ndarray) -> np.ndarray:
        """Indices of the best distinct designs, best first; fewer than `num_survivors` if there are no more."""
        order = np.argsort(-fitness, kind="stable")
        _, first = np.unique(self.designs[order], axis=0, return_index=True)
        return order[np.sort(first)[: self._num_survivors]]

    def _tournaments(self, fitness: np.ndarray, count: int) -> np.ndarray:
        """Indices [count] of the fittest among `tournament_size` designs drawn with replacement."""
        drawn = self._rng.integers(self._num_designs, size=(count, self._tournament_size))
        return drawn[np.arange(count), fitness[drawn].argmax(1)]

    def _crossover(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Children int16 [m, T]: of the second parent between two uniformly drawn cuts, of the first elsewhere."""
        length = self._space.max_length
        cuts = np.sort(self._rng.integers(length + 1, size=(len(first), 2)), axis=1)
        places = np.arange(length)
        inside = (cuts[:, :1] <= places) & (places < cuts[:, 1:])
        return np.where(inside, second, first)
