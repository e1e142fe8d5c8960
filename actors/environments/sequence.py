"""Append-token sequences, of fixed or variable length. Shapes: B sequences, T steps, A actions."""

from collections.abc import Sequence

import numpy as np
from pydantic import Field, field_validator, model_validator

from actors.environments.noise import NoiseProcess, NoiseSampler, UniformSubstitution
from learner.configs import StrictConfig
from learner.space import SequenceSpace


class EnvironmentConfig(StrictConfig):
    """Which sequences are generated, and how noisy generation is."""

    alphabet: str = "ACGT"
    """One character a token; its order is the order of the token indices."""
    length: int = Field(8, ge=1, le=4096)
    """Tokens of a sequence; the largest number if `variable_length`."""
    variable_length: bool = False
    """Whether sequences may end early, by an end token."""
    min_length: int = Field(1, ge=0)
    """Least number of tokens; only if `variable_length`."""
    noise: float = Field(0.25, ge=0, le=1)
    """α: probability that the intended token is replaced by a uniformly drawn one; 0: deterministic."""

    @field_validator("alphabet")
    @classmethod
    def _distinct_printable(cls, value: str) -> str:
        if not 2 <= len(value) <= 64 or len(set(value)) != len(value) or not (value.isascii() and value.isprintable()):
            raise ValueError("2 to 64 different printable ASCII characters are allowed")
        if set(value) & set(" ,>\"'"):
            raise ValueError("blanks, commas, quotes and '>' are not allowed: they have a meaning in CSV or FASTA")
        return value

    @model_validator(mode="after")
    def _lengths_fit(self) -> "EnvironmentConfig":
        if self.variable_length and self.min_length > self.length:
            raise ValueError(f"min_length {self.min_length} is larger than length {self.length}")
        return self


class SequenceError(ValueError):
    """A sequence that the environment cannot have produced."""


class SequenceEnvironment:
    """The space of sequences, its noise process, and the translation between strings and tokens."""

    def __init__(self, config: EnvironmentConfig, noise: NoiseProcess | None = None):
        self.config = config
        self.space = SequenceSpace(
            num_tokens=len(config.alphabet),
            max_length=config.length,
            variable_length=config.variable_length,
            min_length=config.min_length if config.variable_length else config.length,
        )
        noise = UniformSubstitution(config.noise) if noise is None else noise
        self.kernel = noise.kernel(self.space.allowed)
        """float64 [T, A, A]: K_t(x|a)."""
        self.noise = NoiseSampler(self.kernel)
        self.intact = NoiseSampler(UniformSubstitution(0.0).kernel(self.space.allowed))
        """The same environment with its noise switched off."""
        self._letters = np.frombuffer(config.alphabet.encode("ascii"), dtype=np.uint8)
        self._token_of = np.full(256, -1, dtype=np.int16)
        self._token_of[self._letters] = np.arange(len(self._letters))

    def lengths(self, tokens: np.ndarray, num_steps: np.ndarray) -> np.ndarray:
        """int16 [B]: tokens of each finished trajectory, the end token not counted."""
        if not self.space.variable_length:
            return num_steps.astype(np.int16)
        last = np.take_along_axis(tokens, num_steps[:, None].astype(np.int64) - 1, 1)[:, 0]
        return (num_steps - (last == self.space.end)).astype(np.int16)

    def sequences(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Sequences as fixed-width bytes, dtype S[T], from `tokens` int [B, T] and `lengths` int [B]."""
        letters = self._letters[np.minimum(tokens, len(self._letters) - 1)]
        letters = np.where(np.arange(tokens.shape[1]) < lengths[:, None], letters, 0).astype(np.uint8)
        return np.ascontiguousarray(letters).view(f"S{tokens.shape[1]}")[:, 0]

    def tokens(self, sequences: Sequence[str], *, origin: str) -> tuple[np.ndarray, np.ndarray]:
        """`tokens` int16 [B, T] (zero beyond the end) and `lengths` int16 [B] of strings.

        Raises SequenceError naming `origin`, the place in it and the sequence, for a letter outside the alphabet or a
        length outside the space.
        """
        longest, shortest = self.space.max_length, self.space.min_length
        lengths = np.fromiter((len(s) for s in sequences), dtype=np.int64, count=len(sequences))
        bad = np.flatnonzero((lengths > longest) | (lengths < shortest))
        if len(bad):
            allowed = f"{shortest}..{longest}" if shortest < longest else str(longest)
            raise SequenceError(
                f"{origin}: sequence {bad[0] + 1} ({_shown(sequences[bad[0]])}) has length {lengths[bad[0]]}; allowed: {allowed}"
            )
        joined = "".join(s.ljust(longest, "\0") for s in sequences).encode("utf-32-le", errors="surrogatepass")
        letters = np.frombuffer(joined, dtype=np.uint32).reshape(len(sequences), longest)
        tokens = np.where(letters < 256, self._token_of[np.minimum(letters, 255)], -1)
        wrong = (tokens < 0) & (np.arange(longest) < lengths[:, None])
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise SequenceError(
                f"{origin}: sequence {row + 1} ({_shown(sequences[row])}) has {sequences[row][column]!r} at position "
                f"{column + 1}; allowed: the letters of {self.config.alphabet!r}"
            )
        return np.maximum(tokens, 0), lengths.astype(np.int16)

    def as_actions(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """int16 [B, T]: the actions that spell finished sequences, with the end token where one is needed."""
        actions = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, self.space.end)
        return actions.astype(np.int16)


def _shown(sequence: str) -> str:
    return repr(sequence if len(sequence) <= 40 else sequence[:37] + "...")
