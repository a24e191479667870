"""What a whole model in memory is trained for and measured by: the texts' next tokens, or the original's own answers.

A decoder lowers the loss of predicting each next token. Everything else has no labels in a text, so it is trained
towards the original model: an encoder by the squared distance between its sentence embeddings and the original's, a
model that predicts hidden tokens by the divergence of its predictions from the original's, in nats per token.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eckart.files.text import LENGTH
from eckart.methods.compress.job import Job
from eckart.methods.compress.measure import LOGITS, moved
from eckart.methods.compress.outcome import Measured


class Goal:
    """What training a model lowers.

    Args:
        job: the job.
        original: the original model in memory, copied if it is going to be looked at; None for a decoder that is
            trained for next tokens alone.
        features: whether its hidden states are asked for as well.

    Attributes:
        text: the job's samples.
    """

    def __init__(self, job: Job, original: nn.Module | None, *, features: bool = False) -> None:
        if job.samples is None:
            raise AssertionError("a job that trains has a text")
        self.job, self.text, self.features = job, job.samples, features
        self._teacher = None
        if original is not None and (features or not job.causal):
            self._teacher = copy.deepcopy(original).requires_grad_(False)

    def answers(self, model: nn.Module, ids: Tensor) -> Any:
        """Return a model's output for ids (b, t)."""
        cacheless = {"use_cache": False} if self.job.causal else {}
        return model(input_ids=ids, output_hidden_states=self.features, **cacheless)

    @torch.no_grad()
    def read(self, model: nn.Module) -> None:
        """Run a model over all calibration samples."""
        for ids in self.text.batches:
            self.answers(model, ids.to(self.job.runner.device))

    def losses(self, model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor | float]:
        """Return the loss on ids (b, t), and the mean relative squared distance of the blocks' outputs from the
        original's, 0 if features are not asked for.
        """
        found = self.answers(model, ids)
        with torch.no_grad():
            wanted = None if self._teacher is None else self.answers(self._teacher, ids)
        task = self._each(found, wanted, ids).mean()
        if not self.features or wanted is None:
            return task, 0.0
        pairs = list(zip(found.hidden_states, wanted.hidden_states, strict=True))[1:]
        far = [(got - want).square().sum() / want.square().sum() for got, want in pairs]
        return task, torch.stack(far).mean()

    @torch.no_grad()
    def value(self, model: nn.Module) -> float:
        """Return the loss on the held-out samples."""
        total, count, vocabulary = 0.0, 0, int(getattr(self.job.model.config, "vocab_size", None) or 1)
        teacher = None if self.job.causal else self._teacher
        for batch in self.text.held_out:
            for ids in batch.to(self.job.runner.device).split(max(1, LOGITS // (batch.shape[1] * vocabulary))):
                wanted = None if teacher is None else self.answers(teacher, ids)
                each = self._each(self.answers(model, ids), wanted, ids)
                total, count = total + float(each.sum(dtype=torch.float64)), count + each.numel()
        return total / max(count, 1)

    def measured(self, before: float, after: float) -> Measured:
        """Return the loss before and after compression as part of the outcome."""
        tokens = sum(batch.numel() for batch in self.text.held_out)
        return Measured(self.job.measure, before, after, tokens, self.text.disjoint)

    def samples(self, batch: int) -> Tensor | list[Tensor]:
        """Return what `train` draws from: a decoder's windows (count, t), or the sentences of a step each, (b, t), of
        equal length and together of at most as many tokens as a decoder's step.

        Args:
            batch: windows of a decoder's step.
        """
        batches = [ids.to(self.job.runner.device) for ids in self.text.batches]
        if self.job.causal:
            return torch.cat(batches)
        lengths = dict.fromkeys(ids.shape[1] for ids in batches)
        alike = [torch.cat([ids for ids in batches if ids.shape[1] == length]) for length in lengths]
        return [part for ids in alike for part in ids.split(max(1, batch * LENGTH // ids.shape[1]))]

    def _each(self, found: Any, wanted: Any, ids: Tensor) -> Tensor:
        """Return the loss of every token or sentence."""
        if not self.job.causal:
            return moved(wanted, found)
        logits = found.logits[:, :-1].flatten(0, 1).float()
        return F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
