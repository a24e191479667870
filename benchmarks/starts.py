"""Time of data-driven starts of adapters beside PEFT's in the same run, and how far the started subspaces are apart.

    python benchmarks/starts.py [--hidden 512 1024] [--runs 3] [--rank 16] [--blocks 4]

The Llama of benchmarks/adapters.py, every linear layer of its first blocks adapted; its weights and embeddings have
singular values that fall like i^-1/2, since of random ones the leading subspace is hardly defined. Statistics are of
eight sequences of 512 tokens. Times are processor time of one thread, ours and theirs in turn, medians. Ours all
start from one shared pass, counted apart, as is the pass that a method alone would need; PEFT's times hold the passes
that each of its starts makes for itself. "Together" is the shared pass and all of our starts against the sum of PEFT's.
"Angle" is the largest principal angle between the column spaces of the started factors, in degrees: the median over
layers and the largest; "exact" is the subspace of a full decomposition in float64 of the method's matrix.
PEFT's EVA is given the same batches until it says that it converged, CorDA needs the package attrs.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

import eckart
from adapters import TARGETS, model_of
from eckart.hosts import Adapter, map_of
from eckart.hosts.adapter import Plus
from eckart.linalg import svd_of_product, truncated_svd
from eckart.maps import LowRank
from eckart.methods.adapt.adapt import target_layers
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.table import ADAPTERS
from eckart.stats import Statistics, live_gradients
from harness import load, save

OURS = {"pissa": {}, "corda": {}, "eva": {"rho": 1.0}, "olora": {}, "lora-sb": {}}
# What PEFT has of each, and its faster setting.
THEIRS = {
    "pissa": ("pissa", "pissa_niter_16"), "corda": ("corda",), "eva": ("eva",), "olora": ("olora",),
    "lora-sb": ("lora_ga",),
}  # fmt: skip


def falling(weight: Tensor) -> None:
    """Give a matrix singular values that fall like i^-1/2, its length kept."""
    m, n = weight.shape
    k = min(m, n)
    left, right = torch.linalg.qr(torch.randn(m, k)).Q, torch.linalg.qr(torch.randn(n, k)).Q
    made = (left * torch.arange(1, k + 1).rsqrt()) @ right.mT
    weight.copy_(made * (weight.norm() / made.norm()))


@torch.no_grad()
def made_model(hidden: int, blocks: int) -> nn.Module:
    model = model_of(hidden)
    model.model.layers = model.model.layers[:blocks]
    for layer in [*target_layers(model, TARGETS).values(), model.get_input_embeddings()]:
        falling(layer.weight)
    return model.eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 4096, (1, 512), generator=generator) for _ in range(8)]


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    value = function()
    return time.process_time() - began, value


class Converging:
    """Batches, until it took too long."""

    def __init__(self, longest: float) -> None:
        self.ends = time.process_time() + longest

    def __len__(self) -> int:
        return len(batches())

    def __iter__(self):
        for ids in batches():
            if time.process_time() > self.ends:
                raise TimeoutError
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def theirs(kind: str, rank: int, model: nn.Module, longest: float) -> tuple[float, dict[str, Tensor] | None]:
    """Return PEFT's time and the started second factors (m, r) or, of EVA, first ones (n, r) by layer."""
    model = copy.deepcopy(model)
    settings: dict[str, Any] = {
        "corda": {"corda_config": CordaConfig(corda_method="ipm")},
        "eva": {"eva_config": EvaConfig(rho=1.0)},
        "lora_ga": {"lora_ga_config": LoraGAConfig()},
    }.get(kind, {})
    config = peft.LoraConfig(target_modules=TARGETS, r=rank, lora_alpha=rank, init_lora_weights=kind, **settings)

    def run_model() -> None:
        for ids in batches():
            if kind == "lora_ga":
                model(input_ids=ids, labels=ids).loss.backward()
            else:
                with torch.no_grad():
                    model(input_ids=ids)

    def start() -> nn.Module:
        if kind == "corda":
            preprocess_corda(model, config, run_model)
        if kind == "lora_ga":
            preprocess_loraga(model, config, run_model)
        made = peft.get_peft_model(model, config)
        if kind == "eva":
            peft.initialize_lora_eva_weights(made, Converging(longest), show_progress_bar=False)
        return made

    try:
        seconds, made = timed(start)
    except TimeoutError:
        return float("inf"), None
    found = {}
    for name, module in made.named_modules():
        if hasattr(module, "lora_A"):
            factor = module.lora_A["default"].weight.mT if kind == "eva" else module.lora_B["default"].weight
            found[name.removeprefix("base_model.model.")] = factor.detach()
    return seconds, found


def ours(model: nn.Module, rank: int) -> tuple[dict[str, float], dict[str, dict[str, Tensor]]]:
    """Return our times, of the passes and of every start, and the started factors."""
    layers = target_layers(model, TARGETS)
    times: dict[str, float] = {}
    inputs, _ = timed(lambda: eckart.start_statistics(model, batches(), targets=TARGETS, gradients=False))
    gradient, _ = timed(lambda: live_gradients(model, layers, batches()))
    times |= {"pass of corda": inputs, "pass of eva": inputs, "pass of lora-sb": gradient}
    times["pass"], seen_of = timed(lambda: eckart.start_statistics(model, batches(), targets=TARGETS))
    moments, gradients = seen_of.moments, seen_of.gradients
    shared: dict[int, dict[str, Any]] = {}
    seen = {n: Layer(n, m, 0, None, moments[n], gradients[n], shared.setdefault(id(moments[n]), {}))
            for n, m in layers.items()}  # fmt: skip
    factors = {}
    for name, settings in OURS.items():
        recipe = ADAPTERS[name](rank=rank, **settings)

        def build(recipe: Any = recipe) -> dict[str, Adapter]:
            if recipe.ranks is not None:
                for layer, chosen in recipe.ranks(list(seen.values())).items():
                    seen[layer].rank = chosen
            made = {n: recipe.build(layer) for n, layer in seen.items()}
            for layer in seen.values():
                layer.rank = None
            return made

        times[name], built = timed(build)
        factors[name] = {layer: started(name, adapter) for layer, adapter in built.items()}
    return times, factors


def started(name: str, adapter: Adapter) -> Tensor:
    change = adapter.chain()[-1]
    assert isinstance(change, Plus)
    delta = map_of(change.delta)
    if isinstance(delta, LowRank):
        return (delta.down.mT if name == "eva" else delta.up).detach()
    return delta.maps[0].weight.detach()


def exact(name: str, model: nn.Module, seen_of: Statistics, rank: int) -> dict[str, Tensor]:
    """Return the subspaces of full decompositions in float64, from the same statistics."""
    layers = target_layers(model, TARGETS)
    moments, gradients = seen_of.moments, seen_of.gradients
    out = {}
    for layer, module in layers.items():
        w, moment = module.weight.double(), moments[layer].second.double()
        if name == "eva":
            mean = moments[layer].mean.double()
            out[layer] = torch.linalg.eigh(moment - torch.outer(mean, mean))[1][:, -rank:]
            continue
        damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
        matrix = {"pissa": w, "corda": w @ damped, "olora": w, "lora-sb": -gradients[layer].double().sign()}[name]
        out[layer] = matrix[:, :rank] if name == "olora" else truncated_svd(matrix, rank).left
    return out


def angles(one: dict[str, Tensor], other: dict[str, Tensor] | None) -> list[float] | None:
    """Return the largest principal angle of layers in degrees: the median over them, and the largest."""
    if other is None:
        return None
    found = []
    for layer, factor in one.items():
        a, b = (torch.linalg.qr(x.double()).Q for x in (factor, other[layer]))
        sine = float(torch.linalg.matrix_norm(b - a @ (a.mT @ b), 2))
        found.append(float(torch.asin(torch.tensor(min(sine, 1.0))).rad2deg()))
    return [statistics.median(found), max(found)]


def measure(hidden: int, rank: int, runs: int, blocks: int, longest: float) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = made_model(hidden, blocks)
    kinds = [kind for several in THEIRS.values() for kind in several]
    times: dict[str, list[float]] = {}
    for run in range(runs):
        mine, factors = ours(model, rank)
        for name, seconds in mine.items():
            times.setdefault(f"eckart {name}", []).append(seconds)
        for kind in kinds:
            if times.get(kind) == [float("inf")]:  # once is enough
                continue
            seconds, found = theirs(kind, rank, model, longest)
            times.setdefault(kind, []).append(seconds)
            if run == 0:
                factors[f"peft {kind}"] = found
        if run == 0:
            first = factors
    median = {name: statistics.median(values) for name, values in times.items()}
    rows, seen_of = [], eckart.start_statistics(model, batches(), targets=TARGETS)
    for name, several in THEIRS.items():
        wanted = exact(name, model, seen_of, rank)
        row = {
            "hidden": hidden,
            "blocks": blocks,
            "runs": runs,
            "rank": rank,
            "method": name,
            "pass": median["eckart pass"],
            "own": median.get(f"eckart pass of {name}"),
            "longest": longest,
        }
        row |= {"seconds": median[f"eckart {name}"], "exact": angles(first[name], wanted), "peft": []}
        for kind in several:
            factor = first[f"peft {kind}"]
            seconds = None if median[kind] == float("inf") else median[kind]
            row["peft"].append(
                {"kind": kind, "seconds": seconds, "angle": angles(first[name], factor),
                 "exact": None if factor is None else angles(wanted, factor)}
            )  # fmt: skip
        rows.append(row)
    return [*rows, together(rows, list(THEIRS)), together(rows, [name for name in THEIRS if name != "eva"])]


def together(rows: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """Return the row of several methods: their starts of one shared pass, and the sum of PEFT's times."""
    chosen = [row for row in rows if row["method"] in names]
    peft = [row["peft"][0]["seconds"] for row in chosen]
    return {key: rows[0][key] for key in ("hidden", "blocks", "runs", "rank", "longest", "pass")} | {
        "methods": names,
        "seconds": sum(row["seconds"] for row in chosen),
        "peft": sum(seconds or rows[0]["longest"] for seconds in peft),
        "at least": None in peft,
    }


def recombination(size: int, rank: int, runs: int) -> dict[str, Any]:
    """Time the SVD of a product of thin factors against that of its dense matrix."""
    torch.manual_seed(0)
    up, down = torch.randn(size, rank), torch.randn(rank, size)
    times: dict[str, list[float]] = {"factors": [], "dense": []}
    for _ in range(runs):
        seconds, dense = timed(lambda: torch.linalg.svd(up @ down, full_matrices=False))
        times["dense"].append(seconds)
        for _ in range(5):
            seconds, found = timed(lambda: svd_of_product([(up, down)], rank))
            times["factors"].append(seconds)
    error = float((found.values - dense[1][:rank]).abs().max() / dense[1][0])
    exact_product = up.double() @ down.double()
    product = float((found.dense().double() - exact_product).norm() / exact_product.norm())
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return {"size": size, "rank": rank, **seconds, "values error": error, "product error": product}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--longest", type=float, default=40, help="processor seconds that EVA may take to converge")
    parser.add_argument("--only", choices=["starts", "recombination"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    for size in (1024, 2048) if given.only != "starts" else ():
        for rank in (16, 32, 64):
            row = recombination(size, rank, given.runs)
            rows = [r for r in load("starts")["rows"] if (r.get("size"), r["rank"]) != (size, rank)]
            save("starts", [*rows, row])
            print(row, flush=True)
    for hidden in given.hidden if given.only != "recombination" else ():
        found = measure(hidden, given.rank, given.runs, given.blocks, given.longest)
        save("starts", [*(r for r in load("starts")["rows"] if r.get("hidden") != hidden), *found])
        for row in found:
            print(row, flush=True)


if __name__ == "__main__":
    main()
