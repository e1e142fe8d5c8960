"""All settings of the generator `drakes`: masked diffusion, pretrained on sequences, fine-tuned by reward (arXiv 2410.13643)."""

from typing import Literal

from pydantic import Field, model_validator

from learner.configs import StrictConfig
from learner.drakes.constraints import ConstraintConfig
from learner.drakes.controllers import AlphaConfig, SchedulerName
from learner.drakes.denoiser import DenoiserConfig
from learner.drakes.discriminator import DiscriminatorConfig
from learner.drakes.fine_tuning import RolloutConfig
from learner.drakes.losses import AdversarialForm
from learner.drakes.metrics import DesignMetricsConfig
from learner.drakes.pretraining import PretrainingConfig
from learner.drakes.reward_model import RewardModelConfig


class GFlowNetConfig(StrictConfig):
    """A (stochastic) GFlowNet, set by the sections network, objective, dynamics and reward."""

    name: Literal["gflownet"] = "gflownet"
    """Kind of generator."""


class DrakesConfig(StrictConfig):
    """Masked diffusion: E[R] - alpha · KL of the paths to the pretrained model, and further terms, is maximised."""

    name: Literal["drakes"]
    """Kind of generator."""
    denoiser: DenoiserConfig = DenoiserConfig()
    """Network."""
    pretraining: PretrainingConfig = PretrainingConfig()
    """The first learner steps: likelihood of the offline sequences (replay.offline_source)."""
    rollout: RolloutConfig = RolloutConfig()
    """How sequences are drawn, and which gradients they carry. reinforce learns from the oracle's scores of the rollout
    actors' sequences, the others from the reward model's of the learner's own."""
    batch_size: int = Field(128, ge=2, le=1_000_000)
    """Sequences in a step of fine-tuning."""
    learning_rate: float = Field(7e-4, gt=0, le=1)
    """Adam step size of fine-tuning."""
    scheduler: SchedulerName = "cosine"
    """Course of the step size over fine-tuning."""
    max_gradient_norm: float = Field(1.0, gt=0)
    """L2 norm to which gradients are clipped."""
    average_decay: float = Field(0.0, ge=0, lt=1)
    """Decay a step of the averaged weights that are evaluated and sampled; 0: no averaging."""
    alpha: AlphaConfig = AlphaConfig()
    """Weight of the path KL."""
    standardise: bool = True
    """Whether rewards are standardised, so that alpha means standard deviations a nat; false: the oracle's units."""
    objective_alpha: float = Field(0.05, gt=0)
    """alpha of the reported objective E[r] - alpha · KL (oracle's units a nat)."""
    reward_model: RewardModelConfig = RewardModelConfig()
    """Ensemble that learns the oracle's rewards while fine-tuning goes on."""
    reward_steps: int = Field(4, ge=0, le=1000)
    """Its training steps for each step of fine-tuning."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    """Adversary that tells designs from offline sequences."""
    adversarial_weight: float = Field(0.0, ge=0)
    """Weight of the adversarial term; 0: no discriminator."""
    adversarial_form: AdversarialForm = "non_saturating"
    """Form of the adversarial term."""
    adversarial_start: float = Field(0.2, ge=0, le=1)
    """Share of fine-tuning after which the adversarial term counts."""
    diversity_weight: float = Field(0.0, ge=0)
    """Weight of the mean distance between designs."""
    diversity_target: float | None = Field(None, ge=0, le=1)
    """Mean distance (share of positions) that is enough; null: the more the better."""
    constraints: list[ConstraintConfig] = Field(default_factory=list)
    """Rules that designs shall keep: gc_content, forbidden_motifs, homopolymers."""
    bank_weight: float = Field(0.0, ge=0)
    """Weight of the likelihood of sequences from the memory bank."""
    bank_batch_size: int = Field(64, ge=1, le=1_000_000)
    """Sequences drawn from the bank a step."""
    num_designs: int = Field(0, ge=0, le=1_000_000)
    """Of its own sequences, those that the learner has scored by the oracle after each call (not for reinforce)."""
    local_search_share: float = Field(0.0, ge=0, le=1)
    """Share of those that are members of the bank, noised and denoised again."""
    local_search_level: float = Field(0.3, gt=0, le=1)
    """Time to which they are noised."""
    metrics: DesignMetricsConfig = DesignMetricsConfig()
    """What designs are judged by."""

    @model_validator(mode="after")
    def _consistent(self) -> "DrakesConfig":
        if self.rollout.estimator == "reinforce":
            set_terms = [name for name in ("adversarial_weight", "diversity_weight") if getattr(self, name)]
            if set_terms:
                raise ValueError(
                    f"{', '.join(set_terms)}: needs gradients of sequences, which rollout.estimator reinforce has not; "
                    "allowed with straight_through and relaxed"
                )
        return self
