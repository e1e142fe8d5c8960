"""What the policy and the flows are trained to satisfy."""

from typing import Literal

from pydantic import Field, model_validator

from learner.configs import StrictConfig
from learner.policy import PolicyHeads

DEFAULT_WEIGHTS = {"kl_weight": 0.01, "exploration_weight": 0.001}
"""Of the terms that make sgfn_kl of sgfn_db."""


class ObjectiveConfig(StrictConfig):
    """An objective and the weights of the terms that may join it."""

    name: Literal["sgfn_marginal", "sgfn_db", "sgfn_kl", "gfn_db", "tb", "subtb", "soft_q", "ppo"] = "subtb"
    """sgfn_db: detailed balance with the learned dynamics; sgfn_marginal: the same with intentions summed out; sgfn_kl:
    sgfn_db with divergence and exploration terms; tb, subtb: trajectory and sub-trajectory balance; gfn_db: without
    dynamics (exact only if noise is 0). To compare with: soft_q and ppo, which seek reward, not proportion to it."""
    dynamics: Literal["learned", "none"] = "learned"
    """tb, subtb: none takes intended tokens for realised ones and trains no dynamics model (exact only if noise is 0)."""
    backward: Literal["posterior", "learned"] = "posterior"
    """P_B(a|s') by Bayes from policy and dynamics, or a softmax head limited to possible actions."""
    backward_support: float = Field(1e-3, gt=0, lt=1)
    """backward learned: an action is possible if the dynamics model gives the outcome more than this probability."""
    log_z_learning_rate: float | None = Field(None, gt=0, le=10)
    """Adam step size of log Z = log F(s_0) as a parameter of its own; null: 0.05 for tb, otherwise an output of the
    network."""
    subtb_decay: float = Field(1.0, gt=0, le=100)
    """subtb: a sub-trajectory of n steps weighs decay^n; towards 0 detailed balance, towards infinity tb."""
    gamma: float = Field(0.5, gt=0, lt=1)
    """Share of the high entropy in the mixture that the entropy ratio divides by; the ratio is at most 1/gamma."""
    entropy_quantile: float = Field(0.75, gt=0.5, le=1)
    """The high entropy of a trajectory is this quantile over its steps, the low one that of 1 minus this."""
    kl: Literal["flow", "posterior"] = "flow"
    """Divergence term: of the law of trajectories from the target's, by score function; or, literally, of the policy
    from the posterior over intentions, which makes the policy more certain."""
    kl_weight: float | None = Field(None, ge=0)
    """Weight of the divergence less the log entropy ratio; null: 0.01 for sgfn_kl, otherwise 0."""
    exploration_weight: float | None = Field(None, ge=0)
    """Weight of the term that raises entropies of peaked policies; null: 0.001 for sgfn_kl, otherwise 0."""
    max_importance_weight: float = Field(2.0, ge=1)
    """Divergence term: limit of the weights that make trajectories of older policies count as on-policy."""
    lookahead_weight: float = Field(0.0, ge=0)
    """Weight of the cross-entropy of the next tokens, predicted ahead."""
    lookahead_steps: int = Field(3, ge=1, le=64)
    """Tokens predicted ahead."""
    ppo_clip: float = Field(0.2, gt=0, lt=1)
    """ppo: limit of the change of an action's probability that is rewarded."""
    ppo_entropy_weight: float = Field(0.01, ge=0)
    """ppo: weight of the policy's entropy [nats], in units of the reward."""

    @model_validator(mode="after")
    def _consistent(self) -> "ObjectiveConfig":
        if self.dynamics == "none" and self.name.startswith("sgfn"):
            raise ValueError(
                f"dynamics: none contradicts name: {self.name}; allowed with tb, subtb, gfn_db, soft_q, ppo"
            )
        if self.weight("kl_weight") > 0 and self.kl == "posterior":
            if not self.uses_dynamics:
                raise ValueError("kl: posterior needs an objective with dynamics: a posterior over intentions")
            if self.backward == "learned":
                raise ValueError("kl: posterior goes with backward: posterior; a learned P_B excludes actions")
        return self

    def weight(self, name: Literal["kl_weight", "exploration_weight"]) -> float:
        """A term's weight, or what it is where none is given."""
        given = getattr(self, name)
        return given if given is not None else DEFAULT_WEIGHTS[name] * (self.name == "sgfn_kl")

    @property
    def uses_dynamics(self) -> bool:
        """Whether a dynamics model is trained."""
        return self.dynamics == "learned" and self.name not in ("gfn_db", "soft_q", "ppo")

    @property
    def uses_backward_head(self) -> bool:
        """Whether the policy network needs a head for P_B."""
        return self.uses_dynamics and self.name != "sgfn_marginal" and self.backward == "learned"

    @property
    def log_z_step_size(self) -> float | None:
        """Step size of log Z as a parameter of its own, or None if it is an output of the network."""
        return 0.05 if self.log_z_learning_rate is None and self.name == "tb" else self.log_z_learning_rate

    @property
    def policy_heads(self) -> PolicyHeads:
        """What the policy network needs besides logits and flows."""
        return PolicyHeads(
            backward_head=self.uses_backward_head,
            lookahead_steps=self.lookahead_steps if self.lookahead_weight > 0 else 0,
            own_log_z=self.log_z_step_size is not None,
            values=self.name == "ppo",
        )
