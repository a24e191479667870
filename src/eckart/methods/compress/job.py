"""A compression run, prepared: the request checked, the model opened, the calibration samples cut."""

import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from eckart.budget import BYTES
from eckart.errors import EckartError
from eckart.files.folder import OpenModel, check_finite, check_model_folder, open_model
from eckart.files.text import LENGTH, WINDOWS, Samples, load_tokenizer, read_documents, sentences, windows
from eckart.fit.families import Family
from eckart.hosts import Anatomy, Blockwise, anatomy
from eckart.methods.compress.limits import Limit, limit_of
from eckart.methods.compress.recipe import Recipe
from eckart.methods.compress.table import recipe_of
from eckart.progress import Progress
from eckart.stats import Objective, Store, content_key, objective

# Tokens run at once. Four times as many run no faster on CPU, and their activations inside a wide block are the largest
# thing in memory (1.31 against 1.03 GB for svd-llm on two blocks of 1,024 and 2,816 channels).
TOKENS_PER_BATCH = 1024
# Statistics of earlier runs are deleted, oldest first, beyond this many bytes.
CACHE_LIMIT = 20 << 30


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for, as given.

    Attributes:
        model: folder of the model.
        method: name of a method.
        keep: share of the whole model's parameters that may remain, in (0, 1]; None if another budget is given.
        calibration: text file, or None.
        samples: number of calibration samples; None for the default, or as many as the text has.
        length: tokens per sample; None for the default.
        seed: seed of everything random.
        settings: typed settings of the method.
        bytes: bytes of parameters that may remain, or text with a unit.
        flops: share of the operations, as in "0.6x".
        latency: share of the time, as in "0.7x".
        sizes: for an elastic folder, the shares that its components are fitted at, ascending; the last is `keep`.
    """

    model: Path
    method: str
    keep: float | None
    calibration: Path | None
    samples: int | None
    length: int | None
    seed: int
    settings: Mapping[str, Any]
    bytes: int | str | None = None
    flops: str | None = None
    latency: str | None = None
    sizes: tuple[float, ...] = ()

    @property
    def limit(self) -> Limit:
        """The one budget that is given.

        Raises:
            EckartError: if there are several, or it cannot be read.
        """
        return limit_of(keep=self.keep, bytes=self.bytes, flops=self.flops, latency=self.latency)


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request and what it needs to run.

    Attributes:
        request: the request.
        recipe: the method with its settings.
        model: the opened model.
        parts: its anatomy.
        runner: runs it block by block.
        samples: calibration samples; None without a text.
        objective: what the loss is.
        causal: whether the model predicts the next token.
        model_hash: hash of config and weights.
    """

    request: Request
    recipe: Recipe
    model: OpenModel
    parts: Anatomy
    runner: Blockwise
    samples: Samples | None
    objective: Objective
    causal: bool
    model_hash: str

    @property
    def families(self) -> tuple[Family, ...]:
        """What layers may become beside low-rank maps: codes of several widths where bytes are counted and the recipe
        has them. At equal bytes these leave nothing to whole numbers, and factors of codes win below two bits only.
        """
        codes = self.recipe.codes if self.request.limit.measure == BYTES else None
        return self.recipe.families if codes is None else (codes,)

    @property
    def stores_codes(self) -> bool:
        """Whether numbers may be stored as codes."""
        return self.recipe.coding is not None or any(family.code_bytes for family in self.families)

    @property
    def measure(self) -> str:
        """What a model is measured by before and after: a decoder by its loss, everything else by how far its answers
        move: "distance" of sentence embeddings, "divergence" of predicted tokens.
        """
        return "loss" if self.causal else "distance" if self.parts.head is None else "divergence"

    @property
    def key(self) -> str:
        """A name for everything that decides the result."""
        r = self.request
        text = () if self.samples is None else (*self.samples.batches, *self.samples.held_out)
        version = importlib.metadata.version("eckart")
        settings = sorted((name, repr(value)) for name, value in r.settings.items())
        return content_key(
            (version, self.model_hash, r.method, str(r.limit), repr(r.sizes), str(r.seed), repr(settings)), text
        )

    @property
    def statistics_key(self) -> str:
        """A name for the statistics, which methods share."""
        batches = () if self.samples is None else self.samples.batches
        return content_key((self.model_hash, str(self.request.seed)), batches)

    @property
    def calibration(self) -> list[Tensor]:
        """The calibration batches.

        Raises:
            EckartError: if there is no text.
        """
        if self.samples is None:
            raise EckartError(f"{self.request.method} needs a calibration text; give one with --calibration FILE")
        return self.samples.batches

    def weight_dtype(self, layer: str) -> torch.dtype:
        """Return the dtype a layer's weight is stored in."""
        return self.model.stored_dtype(f"{layer}.weight")


def open_job(request: Request, progress: Progress) -> Job:
    """Check a request and prepare its run; nothing is written.

    Raises:
        EckartError: for anything wrong with it, cheapest checks first.
    """
    _check_numbers(request)
    recipe = recipe_of(request.method, request.settings).under(request.limit.option)
    _check_budget(request, recipe)
    check_model_folder(request.model)
    if recipe.needs_text and request.calibration is None:
        raise EckartError(f"{request.method} needs a calibration text; give one with --calibration FILE")
    documents = None if request.calibration is None else read_documents(request.calibration)
    model = open_model(request.model)
    parts = anatomy(model.model)
    causal = type(model.model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    samples = None if documents is None else _samples(request, recipe, model, documents, causal)
    labels = recipe.labels if recipe.uses_gradients or recipe.uses_weight_gradients else "sampled"
    goal = objective(labels, parts.head is not None, causal)
    if recipe.uses_weight_gradients and not causal:
        raise EckartError(
            f"{request.method} needs the loss of predicting the next token; {request.model} is no decoder"
        )
    model_hash = check_finite(model, progress)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runner = Blockwise(model.model, parts, model.load, device)
    return Job(request, recipe, model, parts, runner, samples, goal, causal, model_hash)


def _check_numbers(request: Request) -> None:
    _ = request.limit  # raises
    # a sample of one token has no next token to predict; seeds leave room for one per batch
    for name, least, most in (("samples", 1, None), ("length", 2, None), ("seed", 0, 1 << 32)):
        value = getattr(request, name)
        if value is None and name != "seed":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise EckartError(f"{name} must be a whole number, got {value!r}")
        if value < least or (most is not None and value >= most):
            limit = f"at least {least}" if most is None else f"at least {least} and less than {most}"
            raise EckartError(f"{name} must be {limit}, got {value}")


def _check_budget(request: Request, recipe: Recipe) -> None:
    """Raise an `EckartError` if a method cannot be held to what the budget counts."""
    limit, method = request.limit, request.method
    if not recipe.reduces and request.keep != 1:
        got = f"{request.keep:g}" if request.keep is not None else str(limit)
        raise EckartError(
            f"{method} stores all parameters in fewer bits and removes none, so keep must be 1, got "
            f"{got}; leave keep out, or take a method that removes parameters and give it bits={recipe.bits}"
        )
    if limit.option != "keep" and recipe.allocation == "zero-sum":
        raise EckartError(f"{method} drops singular values by what they count in parameters; give keep, not {limit}")
    if limit.option != "keep" and recipe.learner is not None:
        raise EckartError(f"{method} trains towards a number of parameters; give keep, not {limit}")
    extra = [family.name for family in recipe.families if not family.codable] + ["fewer hidden units"] * recipe.together
    if limit.option == "bytes" and recipe.widths and extra:
        raise EckartError(
            f"under a budget over bytes {method} chooses the bits of every row, not among {', '.join(extra)}; leave "
            "those settings out, or give keep"
        )
    unknown = recipe.bits or recipe.sharing is not None or recipe.plain
    untimed = limit.option == "latency" and recipe.narrows and not recipe.together
    if limit.option in ("flops", "latency") and (unknown or untimed):
        what = "codes, which bits asks for," if recipe.bits else method
        raise EckartError(f"{limit.option} of {what} cannot be told beforehand; give keep or bytes instead")


def _samples(request: Request, recipe: Recipe, model: OpenModel, documents: list[str], causal: bool) -> Samples:
    tokenizer = load_tokenizer(request.model)
    context = int(getattr(model.config, "max_position_embeddings", None) or request.length or 256)
    if request.length is not None and request.length > context:
        raise EckartError(f"length {request.length} exceeds the model's context of {context} tokens; give at most that")
    length = min(request.length or LENGTH, context)
    trained = 0 if recipe.learner is None else recipe.learner.windows
    if causal:
        batch, usual = max(1, TOKENS_PER_BATCH // length), max(WINDOWS, trained)
        return windows(tokenizer, documents, samples=request.samples, length=length, batch=batch, usual=usual)
    return sentences(
        tokenizer,
        documents,
        samples=request.samples,
        length=length,
        tokens_per_batch=TOKENS_PER_BATCH,
        tokens=trained * LENGTH,
        seed=request.seed,
    )


def cache_folder() -> Path:
    """Return where statistics are kept: $ECKART_CACHE, or eckart in the user's cache folder."""
    given = os.environ.get("ECKART_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eckart"


def statistics_store(job: Job, folder: Path | None) -> Store:
    """Return where this job's statistics are kept.

    Args:
        job: the job.
        folder: a folder of the run's own, or None for the shared cache.
    """
    return Store((folder or cache_folder()) / f"statistics-{job.statistics_key}", job.runner.device)


def trim_cache(kept: Store) -> None:
    """Delete the oldest statistics in the shared cache beyond `CACHE_LIMIT`, never those just used."""
    stores = [Store(p) for p in cache_folder().glob("statistics-*") if p.is_dir()]
    stores.sort(key=lambda store: store.folder.stat().st_mtime, reverse=True)
    total = 0
    for store in stores:
        total += store.nbytes
        if total > CACHE_LIMIT and store.folder != kept.folder:
            store.clear()
