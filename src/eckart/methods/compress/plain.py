"""What methods share that write an ordinary smaller model: its plan, and its layers as codes if the recipe has them.

Codes are a second step: the smaller model is written as it would be, and its layers are rounded one block after the
other, each under the moments of what it reads there. The result is then no ordinary model any more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from eckart.budget import BYTES
from eckart.files.folder import check_finite, open_model
from eckart.files.writing import Partial
from eckart.fit import coded_blank
from eckart.hosts import Blockwise, anatomy, is_conv1d
from eckart.maps import Dense
from eckart.methods.compress.allocate import Allocation
from eckart.methods.compress.check import Expected
from eckart.methods.compress.collect import collect
from eckart.methods.compress.fitting import by_rows, coded_name
from eckart.methods.compress.job import Job, statistics_store
from eckart.methods.compress.layers import HEAD, Known, Layer, layer_candidates, layers_of
from eckart.methods.compress.outcome import LayerPlan, Measured, Plan, Spent
from eckart.methods.compress.sweep import Sweep
from eckart.progress import Progress
from eckart.stats import Store

# What holds the smaller model before its layers become codes.
SMALL = "small"


@dataclass(frozen=True, slots=True)
class Stored:
    """How the parameters of a smaller model are stored.

    Attributes:
        job: the job.
        layers: those whose weights become codes, by name; none without codes.
    """

    job: Job
    layers: dict[str, Layer]

    @staticmethod
    def of(job: Job, *, untied: bool = False) -> "Stored":
        """Return what a job stores.

        Args:
            job: the job.
            untied: whether a tied head gets a matrix of its own.
        """
        if job.recipe.coding is None:
            return Stored(job, {})
        found = {layer.name: layer for layer in layers_of(job)}
        head, embedding = job.parts.head, found.get(job.parts.embedding or "")
        if untied and head is not None and embedding is not None:
            found[head] = replace(embedding, name=head, kind=HEAD)
        return Stored(job, found)

    def structure(self, name: str, structure: str) -> str:
        """Return what a plan calls a parameter: with its codes, if it is the weight of a layer that has them."""
        coding, owner = self.job.recipe.coding, name.removesuffix(".weight")
        return structure if coding is None or owner not in self.layers else coded_name(structure, coding)

    def nbytes(self, name: str, shape: Sequence[int], source: str | None = None) -> int:
        """Return the bytes of a parameter.

        Args:
            name: its name.
            shape: its shape in the smaller model.
            source: the original's parameter that it is made of, if that is another.
        """
        dtype, (owner, _, part) = self.job.model.stored_dtype(source or name), name.rpartition(".")
        layer, coding = self.layers.get(owner), self.job.recipe.coding
        if layer is None or coding is None:
            return math.prod(shape) * dtype.itemsize
        if part != "weight":  # the bias of a compressed layer is stored as its weight was
            return math.prod(shape) * self.job.weight_dtype(owner).itemsize
        m, n = reversed(shape) if is_conv1d(self.job.model.model.get_submodule(owner)) else shape
        blank = Dense(torch.empty((m, n), device="meta"))
        return coded_blank(blank, coding, dtype, table=by_rows(self.job, layer)).nbytes


def plain_plan(job: Job, rows: Sequence[LayerPlan]) -> Plan:
    """Return the plan of a smaller model, given a row for every parameter of the original."""
    limit, bytes_only = job.request.limit, job.request.limit.measure == BYTES
    nbytes = sum(row.nbytes for row in rows)
    return Plan(
        job.request.method,
        None if bytes_only else limit.amount,
        job.model.numel,
        sum(row.numbers for row in rows),
        job.model.nbytes,
        nbytes,
        "not predicted",
        tuple(rows),
        Spent(str(limit), BYTES.unit, job.model.nbytes, nbytes) if bytes_only else None,
    )


def coded_model(job: Job, folder: Path, partial: Partial, progress: Progress) -> tuple[Job, Measured, Expected]:
    """Round the layers of a smaller model to codes, continuing what an earlier run has left.

    Args:
        job: the job of the original.
        folder: the smaller model.
        partial: where finished blocks are written.
        progress: told of the stages "forward" and "compress".

    Returns:
        The job of the smaller model, its loss before and after, and what its codes answer to a few held-out samples.
    """
    model, recipe = open_model(folder), replace(job.recipe, sliced=False, removal=None, uses_inputs=True)
    parts = anatomy(model.model)
    runner = Blockwise(model.model, parts, model.load, job.runner.device)
    model_hash = check_finite(model, progress)
    small = replace(job, recipe=recipe, model=model, parts=parts, runner=runner, model_hash=model_hash)
    store, layers = statistics_store(small, partial.folder), layers_of(small)
    collect(small, store, Store(partial.folder / "boundaries"), progress)
    table = [layer_candidates(small, layer, None) for layer in layers]
    dense = Allocation({layer.name: layer.dense for layer in table}, table, 0)
    measured, expected = Sweep(small, Known(small, store), layers, dense, partial, progress).run()
    if measured is None:
        raise AssertionError("methods that write smaller models need a text")
    return small, measured, expected
