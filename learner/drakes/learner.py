"""The learner of masked diffusion: pretrains a denoiser, then fine-tunes it by reward (DRAKES, arXiv 2410.13643).

Shapes: B batch, L positions, V tokens.
"""

import copy
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from learner.batch import Trajectories
from learner.drakes.config import DrakesConfig
from learner.drakes.constraints import constraint_penalties
from learner.drakes.controllers import AlphaController, make_scheduler
from learner.drakes.denoiser import Denoiser, frozen_copy
from learner.drakes.diffusion import nelbo
from learner.drakes.discriminator import Discriminator
from learner.drakes.fine_tuning import rollout
from learner.drakes.losses import adversarial_loss, diversity_loss
from learner.drakes.pretraining import Pretrainer
from learner.drakes.reward_model import RewardModel, RewardTrainer, frozen
from learner.drakes.sampling import resample
from learner.drakes.trajectories import trajectory_log_probs
from learner.flat import FlatParameters
from learner.gflownet import EvaluationWeights

MAX_RATIO = 2.0
"""Largest importance weight of a sequence drawn by older weights."""
SCORES_REMEMBERED = 1000
"""Latest oracle scores of samples, whose mean the alpha controller may follow."""


class DrakesLearner:
    """One object for both phases; `step` counts the steps of both, the first `num_offline_steps` being pretraining."""

    def __init__(
        self,
        config: DrakesConfig,
        length: int,
        num_tokens: int,
        *,
        data: np.ndarray,
        scores: np.ndarray | None,
        device: torch.device,
        total_steps: int,
        seed: int,
    ):
        """`data` int [n, L]: the offline sequences; `scores` float [n] the oracle's, NaN where unknown, or None."""
        self.config, self.device, self.step = config, device, 0
        self.num_offline_steps = config.pretraining.num_steps
        self._data, self._data_scores = torch.from_numpy(data.astype(np.int64)).to(device), scores
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Denoiser(num_tokens, length, config.denoiser).to(device)
        self.pretrainer = Pretrainer(self.model, config.pretraining, seed=seed)
        self.pretrained = frozen_copy(self.model)
        self._pretrained_weights = FlatParameters(self.pretrained)
        self.model_weights = self.pretrainer.weights
        self.averaged = self.model_weights.vector.detach().clone()
        self.optimiser = torch.optim.Adam(
            [self.model_weights.vector], lr=config.learning_rate, betas=(0.9, 0.99), fused=True
        )
        self.scheduler = make_scheduler(config.scheduler, self.optimiser, max(2, total_steps - self.num_offline_steps))
        self._fine_tuning_steps = max(1, total_steps - self.num_offline_steps)
        self.reward_model = RewardModel(config.reward_model, length, seed=seed + 1).to(device)
        self.reward_trainer = RewardTrainer(self.reward_model, seed=seed + 1)
        self._is_scaled = False
        self.discriminator = Discriminator(config.discriminator, length, seed=seed + 2).to(device)
        self.alpha = self._controller()
        self.generator = torch.Generator(device).manual_seed(seed + 3)
        self._scores: deque[float] = deque(maxlen=SCORES_REMEMBERED)
        self._designs = np.zeros((0, length), np.int16)

    def _controller(self) -> AlphaController:
        known = None if self._data_scores is None else self._data_scores[np.isfinite(self._data_scores)]
        if known is None or not len(known):
            return AlphaController(self.config.alpha)
        return AlphaController(
            self.config.alpha, reward_low=float(known.mean()), reward_high=float(np.quantile(known, 0.99))
        )

    @property
    def is_offline(self) -> bool:
        """Whether the next step is one of pretraining, for which no rollouts are needed."""
        return self.step < self.num_offline_steps

    def offline_update(self, count: int) -> dict[str, float]:
        """Up to `count` steps of pretraining; the means of their metrics."""
        totals: dict[str, float] = {}
        done = 0
        while done < count and self.is_offline:
            for name, value in self.pretrainer.step(self.pretrainer.draw(self._data)).items():
                totals[name] = totals.get(name, 0.0) + value
            self.step += 1
            done += 1
        self.averaged.copy_(self.pretrainer.averaged)
        if not self.is_offline:
            self._begin_fine_tuning()
        return {name: value / max(1, done) for name, value in totals.items()}

    def _begin_fine_tuning(self) -> None:
        """From the averaged weights, which are the fixed reference too: the path KL starts at 0."""
        self.model_weights.load(self.averaged)
        self._pretrained_weights.load(self.averaged)
        if self._data_scores is not None and self.config.rollout.estimator != "reinforce":
            self.reward_trainer.warm_start(self._data.cpu().numpy(), self._data_scores)
            self._is_scaled = True

    def update(self, fresh: Trajectories, bank: Trajectories | None = None) -> dict[str, float]:
        """Steps of fine-tuning, as many as `fresh` has batches; the means of their metrics.

        `fresh`: scored samples of the rollout actors, whose `actions` are the reveal steps; `bank`: members of the memory
        bank.
        """
        self._scores.extend(fresh.scores.tolist())
        reinforce = self.config.rollout.estimator == "reinforce"
        if not reinforce:
            if not self._is_scaled:
                self.reward_model.set_scale(fresh.scores)
                self._is_scaled = True
            self.reward_trainer.add(fresh.tokens, fresh.scores)
        count = max(1, round(len(fresh) / self.config.batch_size))
        totals: dict[str, float] = {}
        for rows in np.array_split(np.arange(len(fresh)), count):
            loss, metrics = self._reinforce(fresh, rows) if reinforce else self._back_propagate(bank)
            metrics |= self._take_step(loss + self._bank_loss(bank, metrics)) | self._adjust_alpha(metrics["path_kl"])
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value
            self.step += 1
        return {name: value / count for name, value in totals.items()}

    def _reinforce(self, fresh: Trajectories, rows: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        """Leave-one-out policy gradient on sequences scored by the oracle; those of older weights count by their ratio."""
        tokens, reveal_steps = (self._on_device(array[rows]) for array in (fresh.tokens, fresh.actions))
        num_steps = self.config.rollout.num_steps
        log_prob = trajectory_log_probs(self.model, tokens, reveal_steps, num_steps).sum(1)
        with torch.no_grad():
            reference = trajectory_log_probs(self.pretrained, tokens, reveal_steps, num_steps).sum(1)
            ratio = log_prob.detach() - reference
            weights = (log_prob.detach() - self._on_device(fresh.log_behaviour[rows]).sum(1)).exp().clamp_max(MAX_RATIO)
            rewards = self._on_device(fresh.scores[rows])
            if self.config.standardise:
                rewards = (rewards - float(np.mean(self._scores))) / max(float(np.std(self._scores)), 1e-6)
            x = functional.one_hot(tokens, self.model.num_tokens).float()
            penalties, terms = constraint_penalties(self.config.constraints, x)
            values = rewards - self.alpha.alpha * ratio - penalties
            count = len(values)
            advantage = (values - values.mean()) * count / max(1, count - 1)
        loss = -(weights * advantage * log_prob).mean()
        metrics = {name: float(value) for name, value in terms.items()}
        return loss, metrics | {"path_kl": float((weights * ratio).mean() / weights.mean())}

    def _back_propagate(self, bank: Trajectories | None) -> tuple[Tensor, dict[str, float]]:
        """The learner's own sequences, judged by the reward model, with gradients through their drawing."""
        config = self.config
        metrics: dict[str, float] = {}
        for _ in range(config.reward_steps):
            metrics |= self.reward_trainer.step()
        drawn = rollout(
            self.model, self.pretrained, config.batch_size, config.rollout, generator=self.generator, device=self.device
        )
        self._offer_designs(drawn.tokens, bank)
        adversarial = config.adversarial_weight > 0
        if adversarial:
            rows = torch.randint(len(self._data), (config.batch_size,), generator=self.generator, device=self.device)
            real = functional.one_hot(self._data[rows], self.model.num_tokens).float()
            metrics |= self.discriminator.step(real, drawn.x0.detach())
        with frozen(self.reward_model, self.discriminator):
            predicted = self.reward_model(drawn.x0)
            rewards = predicted if config.standardise else self.reward_model.in_oracle_units(predicted)
            loss = -rewards.mean() + self.alpha.alpha * drawn.path_kl.mean()
            if config.diversity_weight:
                loss = loss + config.diversity_weight * diversity_loss(drawn.x0, target=config.diversity_target)
            penalties, terms = constraint_penalties(config.constraints, drawn.x0)
            loss = loss + penalties.mean()
            started = self.step - self.num_offline_steps >= config.adversarial_start * self._fine_tuning_steps
            if adversarial and started:
                form = config.adversarial_form
                loss = loss + config.adversarial_weight * adversarial_loss(self.discriminator(drawn.x0), form)
        of_oracle = self.reward_model.in_oracle_units(predicted.detach())
        metrics |= {name: float(value) for name, value in terms.items()}
        return loss, metrics | {
            "path_kl": float(drawn.path_kl.detach().mean()),
            "predicted_score": float(of_oracle.mean()),
        }

    def _bank_loss(self, bank: Trajectories | None, metrics: dict[str, float]) -> Tensor | float:
        """Likelihood of good sequences of the past (NELBO), which keeps modes from being forgotten."""
        if bank is None or not len(bank) or not self.config.bank_weight:
            return 0.0
        loss = nelbo(self.model, self._on_device(bank.tokens).long(), self.generator).mean()
        metrics["bank_nelbo"] = float(loss.detach())
        return self.config.bank_weight * loss

    def _take_step(self, loss: Tensor) -> dict[str, float]:
        self.model_weights.zero_grad()
        loss.backward()
        norm = self.model_weights.clip_gradient(self.config.max_gradient_norm)
        rate = self.optimiser.param_groups[0]["lr"]
        self.optimiser.step()
        self.scheduler.on_step()
        taken = self.step - self.num_offline_steps
        decay = min(self.config.average_decay, taken / (taken + 10))
        self.averaged.lerp_(self.model_weights.vector.detach(), 1 - decay)
        return {"loss": float(loss.detach()), "gradient_norm": float(norm), "learning_rate": rate}

    def _adjust_alpha(self, path_kl: float) -> dict[str, float]:
        used, mean = self.alpha.alpha, float(np.mean(self._scores))
        self.alpha.update(kl=path_kl, mean_reward=mean)
        return {"alpha": used, "batch_score": mean}

    def _offer_designs(self, tokens: Tensor, bank: Trajectories | None) -> None:
        """Keep some of the learner's sequences for the oracle, and neighbours of members of the bank."""
        config = self.config
        num_local = round(config.num_designs * config.local_search_share) if bank is not None and len(bank) else 0
        designs = [tokens[: config.num_designs - num_local]]
        if num_local:
            assert bank is not None
            rows = np.arange(num_local) % len(bank)
            starts, level = self._on_device(bank.tokens[rows]).long(), config.local_search_level
            steps = config.rollout.num_steps
            designs.append(resample(self.model, starts, level, num_steps=steps, generator=self.generator).tokens)
        self._designs = torch.cat(designs).cpu().numpy().astype(np.int16)

    def take_designs(self) -> np.ndarray:
        """int16 [n, L]: sequences of the last call that the oracle shall score; empty if there are none."""
        designs, self._designs = self._designs, self._designs[:0]
        return designs

    def _on_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        return tensor if tensor.is_floating_point() else tensor.long()

    def weights(self) -> np.ndarray:
        """A copy of the generator's parameters, float32 [P], for rollout workers."""
        return self.model_weights.vector.detach().cpu().numpy().copy()

    def evaluation_weights(self) -> EvaluationWeights:
        """Copies of the averaged generator, of the pretrained model (the same while it is pretrained), of the reward model."""
        reference = self.averaged if self.is_offline else self._pretrained_weights.vector.detach()
        reward = self.reward_model.vector() if self._is_scaled else None
        return EvaluationWeights(self.step, self.averaged.cpu().numpy().copy(), reference.cpu().numpy().copy(), reward)

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that training goes on from, the data not included: plain tensors and numbers."""
        weights = self.evaluation_weights()
        return {
            "step": self.step,
            "averaged": self.averaged.clone(),
            "dynamics": torch.from_numpy(weights.dynamics),
            "reward": None if weights.reward is None else torch.from_numpy(weights.reward),
            "pretrainer": self.pretrainer.state_dict(),
            "optimiser": copy.deepcopy(self.optimiser.state_dict()),
            "scheduler": self.scheduler.state_dict(),
            "alpha": self.alpha.state_dict(),
            "reward_trainer": self.reward_trainer.state_dict(),
            "is_scaled": self._is_scaled,
            "discriminator": self.discriminator.training_state(),
            "generator": self.generator.get_state(),
            "scores": list(self._scores),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`; raises ValueError if it belongs to other networks."""
        self.pretrainer.load_state_dict(state["pretrainer"])
        self.averaged.copy_(state["averaged"])
        self._pretrained_weights.load(state["dynamics"])
        self.optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))
        self.scheduler.load_state_dict(state["scheduler"])
        self.alpha.load_state_dict(state["alpha"])
        self.reward_trainer.load_state_dict(state["reward_trainer"])
        self._is_scaled = bool(state["is_scaled"])
        self.discriminator.load_training_state(state["discriminator"])
        self.generator.set_state(state["generator"])
        self._scores = deque(state["scores"], maxlen=SCORES_REMEMBERED)
        self.step = int(state["step"])
