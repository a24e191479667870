"""Layers that share a factor: who is in a group, what a group may become, and its fit.

A group is one unit of the budget: the stack of its members' weights, whose right factor is stored once. It is fitted
from the original model's statistics when the pass reaches its first block; the fits of all members are written beside
the finished blocks then, so that later blocks find theirs, also after the run was stopped. The first member owns the
shared tensor.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from eckart.atomic import write_tensors
from eckart.budget import BYTES, Candidates, Option, candidates
from eckart.budget.candidates import Sized
from eckart.errors import EckartError
from eckart.files.sharing import borrowed
from eckart.files.writing import LayerRecord
from eckart.fit import Fit, Metric, coded_blank, coded_shared, error_of, metric, regress
from eckart.fit.clustering import cluster
from eckart.fit.shared import fit_shared, split_rows
from eckart.hosts import host, map_of
from eckart.linalg import psd_roots, sketch
from eckart.maps import FAMILIES, LowRank, Product, from_spec, storage
from eckart.methods.compress.costs import example, stored
from eckart.methods.compress.job import Job
from eckart.methods.compress.layers import LINEAR, Known, Layer, predicted, weights, with_dense_bytes
from eckart.stats import inputs_of

# What hosts call the right factor of the maps whose rows can be split; its tensors begin with that.
SHARED_PART = {LowRank: "down.", Product: "1."}


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share the right factor of their maps.

    Attributes:
        members: at least two, in the model's order; the first owns what is shared.
    """

    members: tuple[Layer, ...]

    @property
    def name(self) -> str:
        """The owner's name."""
        return self.members[0].name

    @property
    def rows(self) -> list[int]:
        """Output sizes of the members."""
        return [layer.shape[0] for layer in self.members]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the stacked weights."""
        return sum(self.rows), self.members[0].shape[1]


@dataclass(frozen=True, slots=True)
class SharedPlan:
    """What a group becomes.

    Attributes:
        group: the group.
        option: structure and size of the stack.
    """

    group: Group
    option: Option


def groups_of(job: Job, layers: Sequence[Layer], known: Known, share: float) -> list[Group]:
    """Return the groups that the recipe forms; layers in none of them are fitted alone.

    Args:
        job: the job.
        layers: its layers.
        known: their statistics.
        share: the share of their dense numbers that the budget leaves all layers, which decides ranks in clusters.
    """
    sharing = job.recipe.sharing
    if sharing is None:
        return []
    alike: dict[tuple[str, tuple[int, int], torch.dtype], list[Layer]] = {}
    for layer in _sharers(job, layers, known):
        projection = layer.name.removeprefix(f"{job.parts.blocks[layer.block]}.")
        alike.setdefault((projection, layer.shape, job.weight_dtype(layer.name)), []).append(layer)
    found: list[list[Layer]] = []
    for several in alike.values():
        size = sharing.size
        found += _clusters(job, several, known, share) if size is None else _adjacent(several, size)
    return [Group(tuple(members)) for members in found if len(members) > 1]


def _sharers(job: Job, layers: Sequence[Layer], known: Known) -> list[Layer]:
    """Return the linear layers that the texts reached and that may share."""
    out = []
    for index in range(len(job.parts.blocks)):
        inside = [layer for layer in layers if layer.kind == LINEAR and layer.block == index]
        moments = inputs_of(known.store, index)
        users = [id(one) for one in moments.values()]  # layers with one input share one object
        for layer in inside:
            if layer.name not in moments:
                continue
            alone = users.count(id(moments[layer.name])) == 1
            # the first layer of a block reads the residual stream, normalized
            writes = alone and layer.shape[0] == inside[0].shape[1] and layer is not inside[0]
            if not writes or (job.recipe.sharing and job.recipe.sharing.writers):
                out.append(layer)
    return out


def _adjacent(layers: Sequence[Layer], size: int) -> list[list[Layer]]:
    """Return runs of up to `size` layers of consecutive blocks."""
    out: list[list[Layer]] = []
    for layer in layers:
        if out and len(out[-1]) < size and out[-1][-1].block + 1 == layer.block:
            out[-1].append(layer)
        else:
            out.append([layer])
    return out


def _clusters(job: Job, layers: list[Layer], known: Known, share: float) -> list[list[Layer]]:
    """Return layers of one shape grouped by the error of truncating them together, whitened by their mean moment."""
    sharing, (m, n) = job.recipe.sharing, layers[0].shape
    if sharing is None or sharing.algorithm is None:
        raise AssertionError("clusters are made where a recipe asks for them")
    lowrank = storage("lowrank")

    def rank_of(rows: int) -> int:
        return lowrank.largest_rank((rows, n), share * rows * n)

    root = psd_roots(_summed([_metric(known, layer, weight) for layer, weight in weights(job, layers)]))[0]
    most = min(rank_of(m * len(layers)), n)
    sketches = []
    for _, weight in weights(job, layers):
        whitened = weight.double() @ root if root.ndim == 2 else weight.double() * root
        length = float(whitened.norm())
        sketches.append(sketch(whitened / length if length > 0 else whitened, most))
    found = cluster(sketches, [m] * len(layers), rank_of, threshold=sharing.threshold, algorithm=sharing.algorithm)
    return [[layers[i] for i in members] for members in found]


def group_candidates(job: Job, known: Known, group: Group, *, errors: bool) -> Candidates:
    """Return what the stack of a group may become, its predicted loss that of all members.

    Args:
        job: the job.
        known: its statistics.
        group: the group.
        errors: whether losses are needed; without, they are all zero and nothing is decomposed.
    """
    kept = _stored(job)
    losses: Tensor | list[float] = [0.0] * (kept.largest(group.shape) + 1)
    if errors:
        stack, together = _stack(job, known, group)
        losses = len(group.members) * predicted(known, regress(stack, together))
    found = candidates(
        group.name,
        group.shape,
        losses,
        kept,
        itemsize=job.weight_dtype(group.name).itemsize,
        bias=sum(layer.bias for layer in group.members),
        round_to=job.recipe.round_to,
    )
    return with_dense_bytes(job, group.members, found)


def with_code_bytes(job: Job, group: Group, found: Candidates) -> Candidates:
    """Return the candidates of a group with the bytes they take as codes, if numbers become such and bytes count."""
    if job.recipe.coding is None or job.request.limit.measure != BYTES:
        return found
    layers, options = {layer.name: layer for layer in group.members}, []
    for option in found.options:
        members = member_plans(job, group, option)
        nbytes = sum(stored(job, layers[name], own).nbytes for name, (own, _) in members.items())
        options.append(replace(option, nbytes=nbytes))
    return replace(found, options=tuple(options))


def _stored(job: Job) -> Sized:
    """Return the structure that groups take: the recipe's family, or low rank; pivots cannot be shared."""
    return job.recipe.families[0] if job.recipe.families else storage("lowrank")


def _metric(known: Known, layer: Layer, weight: Tensor) -> Metric:
    found = known.metric(layer, weight)
    if found is None:
        raise EckartError(f"the calibration texts never reach {layer.name}, so it cannot be fitted")
    return found


def _parts(job: Job, known: Known, group: Group) -> tuple[list[Tensor], list[Metric]]:
    several = [(weight, _metric(known, layer, weight)) for layer, weight in weights(job, list(group.members))]
    return [weight for weight, _ in several], [one for _, one in several]


def _stack(job: Job, known: Known, group: Group) -> tuple[Tensor, Metric]:
    """Return the stacked weights and the metric of their summed input moments."""
    parts, metrics = _parts(job, known, group)
    return torch.cat(parts), metric(_summed(metrics))


def _summed(metrics: Sequence[Metric]) -> Tensor:
    """Return the sum of the input moments of metrics that all have one."""
    moments = [one.inputs for one in metrics if one.inputs is not None]
    return sum(moments[1:], moments[0])


def member_plans(job: Job, group: Group, option: Option) -> dict[str, tuple[Option, Candidates]]:
    """Return every member's part of an option, what is shared counted with the owner, and the member left dense."""
    out, kept, itemsize = {}, _stored(job), job.weight_dtype(group.name).itemsize
    for i, layer in enumerate(group.members):
        (m, n), rank = layer.shape, option.rank
        alone = candidates(layer.name, layer.shape, [0.0], kept, itemsize=itemsize, bias=layer.bias)
        alone = with_dense_bytes(job, [layer], alone)
        if option.structure != kept.name:
            out[layer.name] = replace(alone.dense, loss=option.loss / len(group.members)), alone
            continue
        numbers = kept.numbers((m, n), rank) - (kept.numbers((0, n), rank) if i else 0) + layer.bias
        nbytes = numbers * itemsize + kept.index_bytes((m, n), rank)
        if job.recipe.coding is not None:
            nbytes = _code_bytes(job, layer, kept.name, rank, owns=i == 0)
        loss = option.loss / len(group.members)
        out[layer.name] = Option(f"shared {kept.name}", rank, numbers, nbytes, loss), alone
    return out


def _code_bytes(job: Job, layer: Layer, structure: str, rank: int, *, owns: bool) -> int:
    """Return the bytes of a member's part of a group as codes, with what is shared if it owns that."""
    if job.recipe.coding is None:
        raise AssertionError("only codes are counted like this")
    dtype = job.weight_dtype(layer.name)
    whole = coded_blank(example(job, layer, structure, rank, torch.device("meta")), job.recipe.coding, dtype)
    if not isinstance(whole, Product):
        raise AssertionError("what is shared is the right factor of a product")
    return sum(factor.nbytes for factor in whole.maps[: 2 if owns else 1]) + layer.bias * dtype.itemsize


def fit_group(job: Job, known: Known, plan: SharedPlan) -> list[Fit]:
    """Return the fits of a group's members, without biases, float64 or codes; errors are each layer's under its own
    metric.
    """
    group, recipe = plan.group, job.recipe
    family = recipe.family(plan.option.structure)
    parts, metrics = _parts(job, known, group)
    if family is not None:
        stack, together = _stack(job, known, group)
        maps = split_rows(family.fit(stack, together, plan.option.rank), group.rows)
    else:
        rounds = recipe.sharing.rounds if recipe.sharing else 0
        maps = fit_shared(parts, metrics, plan.option.rank, rounds=rounds)
    if recipe.coding is not None:
        maps = coded_shared(maps, parts, metrics, recipe.coding, job.weight_dtype(group.name))
    fits = []
    for map_, weight, own in zip(maps, parts, metrics, strict=True):
        error, zero = (
            error_of(weight, map_.to(torch.float64).dense(), own),
            error_of(weight, torch.zeros_like(weight), own),
        )
        fits.append(Fit(map_, None, error, error / zero if zero > 0 else 0.0))
    return fits


class GroupFits:
    """The fits of shared layers during a pass: made with a group's first layer, read from their file by the others.

    Args:
        job: the job.
        known: its statistics.
        plans: what the groups become.
        folder: where the fits are kept until the run is over.
    """

    def __init__(self, job: Job, known: Known, plans: Sequence[SharedPlan], folder: Path) -> None:
        self.job, self.known = job, known
        self._at = {
            layer.name: (plan, folder / f"group-{number:04d}.safetensors", i)
            for number, plan in enumerate(plans)
            for i, layer in enumerate(plan.group.members)
        }

    def fit(self, layer: Layer, bias: Tensor | None) -> Fit | None:
        """Return the fit of a layer, rounded to the dtype its weight is stored in, with its own bias.

        None for a layer that is in no group.
        """
        if layer.name not in self._at:
            return None
        plan, path, i = self._at[layer.name]
        if not path.is_file():
            self._write(plan, path)
        with safe_open(path, "pt", device=str(self.job.runner.device)) as handle:
            stated = json.loads(handle.metadata()["fits"])[i]
            names = [name for name in handle.keys() if name.startswith(f"{i}|")]  # noqa: SIM118
            tensors = {name.partition("|")[2]: handle.get_tensor(name) for name in names}
        map_ = from_spec(stated["map"], tensors, FAMILIES)
        return Fit(map_, None if bias is None else bias.to(map_.dtype), stated["error"], stated["relative"])

    def _write(self, plan: SharedPlan, path: Path) -> None:
        dtype = self.job.weight_dtype(plan.group.name)
        fits = [replace(fit, map=fit.map.to(dtype)) for fit in fit_group(self.job, self.known, plan)]
        stated = [{"map": fit.map.spec(), "error": fit.error, "relative": fit.relative} for fit in fits]
        tensors = {
            f"{i}|{name}": t.clone(memory_format=torch.contiguous_format)
            for i, fit in enumerate(fits)
            for name, t in fit.map.tensors().items()
        }
        write_tensors(path, tensors, {"format": "pt", "fits": json.dumps(stated)})

    def taken(self, layer: Layer, fit: Fit) -> dict[str, str]:
        """Return the owner by what a layer's host calls the tensor it takes from it; nothing for owners and others."""
        if layer.name not in self._at:
            return {}
        plan, _, i = self._at[layer.name]
        part = SHARED_PART[type(fit.map)]
        return {key: plan.group.name for key in host(fit.map).state_dict() if key.startswith(part)} if i else {}

    def shared_parameters(self, block: nn.Module, index: int) -> list[nn.Parameter]:
        """Return the parameters of a compressed block that are shared, by their owner or a taker."""
        prefix = f"{self.job.parts.blocks[index]}."
        hosts = [block.get_submodule(name.removeprefix(prefix)) for name in self._at if name.startswith(prefix)]
        named = [(SHARED_PART[type(map_of(one))], one.named_parameters()) for one in hosts]
        return [parameter for part, held in named for name, parameter in held if name.startswith(part)]


def without_borrowed(tensors: Mapping[str, Tensor], records: Sequence[LayerRecord]) -> dict[str, Tensor]:
    """Return the tensors of a block without those that earlier blocks own."""
    taken = borrowed({record.name: record.entry for record in records})
    return {name: tensor for name, tensor in tensors.items() if name not in taken}
