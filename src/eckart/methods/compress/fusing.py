"""Grafting a removed block's weights onto the blocks around it, by training these towards what all of them gave."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from eckart.hosts import Blockwise, Call, linear_layers
from eckart.methods.compress.removal import Removal
from eckart.methods.compress.updates import BiasGraft, Graft, changed, fold
from eckart.methods.training import Course, Step, train
from eckart.progress import Progress
from eckart.stats import Stream


def group_around(kept: Sequence[int], removed: int, size: int) -> list[int]:
    """Return the blocks trained with one: `size` adjacent ones with it in the middle, or as near as the ends allow."""
    size = min(size, len(kept))
    start = min(max(kept.index(removed) - size // 2, 0), len(kept) - size)
    return list(kept[start : start + size])


def graft(
    runner: Blockwise,
    group: Mapping[int, nn.Module],
    removed: int,
    inputs: Stream,
    removal: Removal,
    *,
    state: Path,
    seed: int,
    progress: Progress,
) -> None:
    """Change the blocks of a group in place so that they give without the removed block what they gave with it.

    Args:
        runner: the model.
        group: adjacent blocks by index, float32, the removed one among them.
        removed: its index.
        inputs: the calibration samples at the first block of the group.
        removal: how they are trained.
        state: file of the run's state.
        seed: seed of order and draws.
        progress: told of the stage "fuse".

    Raises:
        EckartError: if the loss diverges; the last good state is kept.
    """
    targets = [_run(runner, group, x, call) for x, call in zip(inputs.hidden, inputs.calls, strict=True)]
    staying = {index: block for index, block in group.items() if index != removed}
    generator = torch.Generator().manual_seed(seed)
    for block in staying.values():
        _prepare(block, group[removed], removal.rank, generator)

    def loss(step: Step) -> tuple[Tensor, Tensor]:
        i = int(step.samples[0])
        moved = _run(runner, staying, inputs.hidden[i], inputs.calls[i]) - targets[i]
        far = moved.square().sum() / targets[i].square().sum()
        return far, far

    train(
        nn.ModuleList(staying.values()),
        torch.arange(len(targets)),
        Course(removal.epochs * len(targets), removal.rate, 1, final=0.0, warm_up=0.0),
        loss,
        state=state,
        seed=seed,
        stage="fuse",
        share=lambda name: 1.0 if "coefficients" in name else removal.base_rate / removal.rate,
        progress=progress,
    )
    fold(staying.values())


def _run(runner: Blockwise, blocks: Mapping[int, nn.Module], hidden: Tensor, calls: Sequence[Call]) -> Tensor:
    for index, block in blocks.items():
        hidden = runner.run(block, hidden, calls[index])
    return hidden


def _prepare(block: nn.Module, removed: nn.Module, rank: int, generator: torch.Generator) -> None:
    """Make everything that fusion trains in a block trainable: vectors as they are, matrices by updates."""
    for parameter in block.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    for name, layer in linear_layers(block).items():
        other = removed.get_submodule(name)
        weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
        changed(layer, "weight", Graft(weight.detach(), other.get_parameter("weight"), rank, generator))
        if bias is not None:
            changed(layer, "bias", BiasGraft(other.get_parameter("bias")))
