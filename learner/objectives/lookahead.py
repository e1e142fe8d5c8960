"""Look-ahead: at each prefix, predict the next k realised tokens. Shapes: B batch, T steps, A actions, k ahead."""

from torch import Tensor
from torch.nn import functional

IGNORED = -100


def lookahead_targets(tokens: Tensor, mask: Tensor, num_ahead: int) -> Tensor:
    """x_t..x_{t+k-1} at each prefix t, int64 [B, T, k]; `IGNORED` past the end. `tokens` int64, `mask` bool [B, T]."""
    padded = functional.pad(tokens.masked_fill(~mask, IGNORED), (0, num_ahead - 1), value=IGNORED)
    return padded.unfold(1, num_ahead, 1)


def lookahead_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of `targets` int64 [B, T, k] under `logits` float [B, T, k, A]."""
    return functional.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=IGNORED)
