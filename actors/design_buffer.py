"""The replay buffer of masked diffusion: trajectories as for any generator, and beside them the memory bank."""

from pathlib import Path

from actors.memory_bank import MemoryBank, SavedBankError
from actors.replay_buffer import Draw, ReplayBuffer, ReplayConfig, SavedBufferError
from actors.trajectories import TrajectoryBatch, trajectories_of

BANK_FILE = "memory_bank.npz"


class DesignBuffer(ReplayBuffer):
    """Every batch that is stored passes the bank too; draws bring `num_banked` of its members."""

    def __init__(
        self,
        config: ReplayConfig,
        num_steps: int,
        *,
        seed: int,
        num_actions: int,
        num_banked: int,
    ):
        super().__init__(config, num_steps, seed=seed, num_actions=num_actions)
        self.bank, self.num_banked = MemoryBank(config.bank, num_steps, seed=seed), num_banked

    def add(self, batch: TrajectoryBatch, source: str, number: int) -> int:
        """As `ReplayBuffer.add`; a batch that came before does not reach the bank either."""
        accepted = super().add(batch, source, number)
        if accepted:
            self.bank.add(batch.tokens, batch.scores)
        return accepted

    def set_offline(self, batch: TrajectoryBatch) -> None:
        """Only the bank, if members are drawn from it, takes of `batch` what it admits: the learner has the data itself."""
        if self.num_banked:
            self.bank.add(batch.tokens, batch.scores)

    def draw(self, num_fresh: int, num_dynamics: int) -> Draw:
        """As `ReplayBuffer.draw`, and members of the bank if it has any."""
        drawn = super().draw(num_fresh, num_dynamics)
        if not self.num_banked or not len(self.bank):
            return drawn
        members = self.bank.sample(self.num_banked)
        banked = trajectories_of(members.tokens)
        banked.scores[:] = members.rewards
        return drawn._replace(banked=banked)

    def statistics(self) -> dict[str, float]:
        """Those of the buffer and of the bank."""
        return super().statistics() | self.bank.statistics()

    def save(self, path: Path) -> None:
        """Write buffer and bank, the latter beside it."""
        super().save(path)
        self.bank.save(path.with_name(BANK_FILE))

    def load(self, path: Path) -> None:
        """Continue from a saved buffer and its bank; raises SavedBufferError."""
        super().load(path)
        try:
            self.bank.load(path.with_name(BANK_FILE))
        except SavedBankError as error:
            raise SavedBufferError(str(error)) from error
