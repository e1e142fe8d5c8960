"""A synthetic law of regulatory DNA with known probabilities: a Markov chain into which binding sites are pasted.

A chain of order one with the dinucleotides of the human genome; with some probability one of several JASPAR motifs,
each as likely, replaces the letters at a uniform start on a uniform strand. Hence, with π and P the chain's,

    p(x) = (1 - ρ) chain(x) + ρ mean over (motif, start s, strand) of site(x_s..x_{s+w-1}) · chain(the other letters)

in which `chain(the other letters)` bridges the gap by P^{w+1}. Both strands of a sequence are as likely as each other.
Shapes: n sequences, L positions, w positions of a motif; tokens A C G T = 0..3. Units: nats.
"""

import numpy as np
from pydantic import Field

from actors.oracles.base import OracleDataError
from actors.oracles.jaspar import LETTERS, PSEUDOCOUNT, motif_matrices
from learner.configs import StrictConfig
from learner.strands import reverse_complement

DINUCLEOTIDES = {
    "AA": 0.09791, "AC": 0.05040, "AG": 0.06994, "AT": 0.07727, "CA": 0.07260,
    "CC": 0.05210, "CG": 0.00985, "GA": 0.05934, "GC": 0.04265, "TA": 0.06567,
}  # fmt: skip
"""Shares of the human genome (hg19, counted by RSAT count-words, mikelove.wordpress.com/2011/12/02/2-mers), mean of both
strands; the six that are missing are reverse complements (TT as AA)."""
CHUNK = 4096
"""Sequences whose probability is computed at a time."""


class MotifLawConfig(StrictConfig):
    """Synthetic DNA of known probability."""

    motifs: tuple[str, ...] = Field(
        ("MA0046.3", "MA0114.5", "MA0102.5", "MA0745.3", "MA0047.4", "MA0062.4", "MA0079.5", "MA0060.4"), min_length=1
    )
    """JASPAR ids or names of the motifs that are pasted: HNF1A, HNF4A, CEBPA, SNAI2, FOXA2, GABPA, SP1, NFYA."""
    site_probability: float = Field(0.7, ge=0, le=1)
    """Share of sequences with a pasted site."""
    pseudocount: float = Field(PSEUDOCOUNT, ge=1e-6, le=1e6)
    """Added to the counts of each motif position, a quarter to each letter."""


class MotifLaw:
    """The law over sequences of one length: exact probabilities and exact samples."""

    def __init__(self, config: MotifLawConfig, length: int):
        """Raises OracleDataError for motifs that are unknown or wider than `length`."""
        self.config, self.length = config, length
        joint = _joint()
        self.initial = joint.sum(1)
        """float64 [4]: law of a letter of the chain."""
        self.transitions = joint / self.initial[:, None]
        """float64 [4, 4]: P(next letter | letter)."""
        motifs = motif_matrices(config.motifs, pseudocount=config.pseudocount, origin="replay.motif_law.motifs")
        self.sites = [np.exp(motif.log_odds) / 4 for motif in motifs]
        """float64 [w, 4] of each motif: the law of its letters, which are independent of each other."""
        for motif in motifs:
            if len(motif.log_odds) > length:
                raise OracleDataError(
                    f"replay.motif_law.motifs: {motif.matrix_id} ({motif.name}) is {len(motif.log_odds)} wide; "
                    f"allowed: up to environment.length {length}"
                )

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """int64 [count, L]."""
        tokens = np.empty((count, self.length), dtype=np.int64)
        tokens[:, 0] = _draw(np.broadcast_to(self.initial, (count, 4)), rng)
        for position in range(1, self.length):
            tokens[:, position] = _draw(self.transitions[tokens[:, position - 1]], rng)
        chosen = np.where(
            rng.random(count) < self.config.site_probability, rng.integers(len(self.sites), size=count), -1
        )
        for number, site in enumerate(self.sites):
            rows, width = np.flatnonzero(chosen == number), len(site)
            letters = _draw(np.broadcast_to(site, (len(rows), width, 4)), rng)
            is_reverse = rng.random(len(rows)) < 0.5
            letters[is_reverse] = reverse_complement(letters[is_reverse])
            starts = rng.integers(self.length - width + 1, size=len(rows))
            tokens[rows[:, None], starts[:, None] + np.arange(width)] = letters
        return tokens

    def log_prob(self, tokens: np.ndarray) -> np.ndarray:
        """float64 [n] of `tokens` int [n, L]; exact."""
        if tokens.shape[1] != self.length:
            raise ValueError(f"got sequences of {tokens.shape[1]} positions; allowed: {self.length}")
        parts = [self._log_prob(tokens[row : row + CHUNK].astype(np.int64)) for row in range(0, len(tokens), CHUNK)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def _log_prob(self, tokens: np.ndarray) -> np.ndarray:
        steps = np.log(self.transitions)[tokens[:, :-1], tokens[:, 1:]]
        until = np.concatenate([np.log(self.initial)[tokens[:, :1]], steps], 1).cumsum(1)  # log p of x_0..x_i
        with_site = np.mean([self._site_ratio(tokens, until, site) for site in self.sites], 0)
        share = self.config.site_probability
        return until[:, -1] + np.log(1 - share + share * with_site)

    def _site_ratio(self, tokens: np.ndarray, until: np.ndarray, site: np.ndarray) -> np.ndarray:
        """float64 [n]: p(x | a site of this motif was pasted) / chain(x), the mean over starts and strands."""
        length, width = self.length, len(site)
        starts = np.arange(length - width + 1)
        window = starts[:, None] + np.arange(width)
        letters = tokens[:, window]
        strands = [np.log(matrix)[np.arange(width), letters].sum(-1) for matrix in (site, site[::-1, ::-1])]
        bridge = np.log(np.linalg.matrix_power(self.transitions, width + 1))
        before, after = tokens[:, np.maximum(starts - 1, 0)], tokens[:, np.minimum(starts + width, length - 1)]
        across = np.where(starts == 0, np.log(self.initial)[after], bridge[before, after])
        across = np.where(starts + width == length, 0.0, across)
        # what the chain says of the window and of the step behind it, given the letter before
        padded = np.concatenate([np.zeros((len(tokens), 1)), until], 1)
        replaced = padded[:, np.minimum(starts + width + 1, length)] - padded[:, starts]
        return np.exp(np.stack(strands) + across - replaced).mean((0, 2))

    def entropy(self, count: int, rng: np.random.Generator) -> tuple[float, float]:
        """Monte-Carlo estimate of -E log p from `count` samples, and its standard error."""
        values = -self.log_prob(self.sample(count, rng))
        return float(values.mean()), float(values.std(ddof=1) / count**0.5)


def _joint() -> np.ndarray:
    """float64 [4, 4]: law of two neighbouring letters, the same on both strands; rows and columns have equal sums."""
    shares = np.zeros((4, 4))
    for pair, share in DINUCLEOTIDES.items():
        tokens = np.array([LETTERS.index(letter) for letter in pair])
        for first, second in (tokens, reverse_complement(tokens)):
            shares[first, second] = share
    return shares / shares.sum()


def _draw(probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int64 [...] of laws float [..., 4]."""
    bounds = probabilities.cumsum(-1)[..., :-1]
    return (rng.random((*probabilities.shape[:-1], 1)) >= bounds).sum(-1)
