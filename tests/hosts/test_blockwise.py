"""Running block by block gives what the whole model gives, for every kind of block."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn

from eckart.errors import EckartError
from eckart.hosts import Blockwise, anatomy, blockwise, release


def streamed(model: nn.Module) -> Blockwise:
    """The model as a skeleton without weights, which are loaded from the model itself."""
    with init_empty_weights(include_buffers=False):
        skeleton = type(model)(model.config)
    skeleton.tie_weights()

    def load(module: nn.Module, name: str) -> None:
        for key, parameter in model.get_submodule(name)._parameters.items():
            module._parameters[key] = None if parameter is None else nn.Parameter(parameter.detach().clone(), False)

    return Blockwise(skeleton, anatomy(skeleton), load, torch.device("cpu"))


def resident_numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.device.type != "meta")


def forward(runner: Blockwise, ids: torch.Tensor) -> torch.Tensor:
    with runner.resident_ends(head=False, embedding=True):
        hidden, calls = runner.enter(ids)
    for name, call in zip(runner.parts.blocks, calls, strict=True):
        with runner.resident(name) as block:
            hidden = runner.run(block, hidden, call)
    with runner.resident_ends(head=True, embedding=False):
        return runner.leave(hidden).logits


@torch.no_grad()
def test_streamed_is_whole(model):
    ids = torch.randint(2, 60, (2, 9))
    runner = streamed(model)
    expected = model(ids).logits
    torch.testing.assert_close(forward(runner, ids), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(forward(runner, ids[:1, :4]), model(ids[:1, :4]).logits, atol=1e-6, rtol=0)
    assert resident_numbers(runner.model) == 0


@torch.no_grad()
def test_one_block_at_a_time(model):
    runner = streamed(model)
    blocks = [model.get_submodule(name) for name in runner.parts.blocks]
    for name, block in zip(runner.parts.blocks, blocks, strict=True):
        with runner.resident(name) as resident:
            assert resident_numbers(runner.model) == sum(p.numel() for p in block.parameters())
            for (key, mine), theirs in zip(resident.named_parameters(), block.parameters(), strict=True):
                assert torch.equal(mine, theirs), key
    assert resident_numbers(runner.model) == 0


@torch.no_grad()
def test_blocks_are_put_back_after_an_error(model):
    runner = streamed(model)
    before = [runner.model.get_submodule(name) for name in runner.parts.blocks]
    with pytest.raises(IndexError), runner.resident_ends(head=False, embedding=True):
        runner.enter(torch.full((1, 3), 999))
    assert [runner.model.get_submodule(name) for name in runner.parts.blocks] == before
    assert resident_numbers(runner.model) == 0


@torch.no_grad()
def test_another_embedding(model):
    ids = torch.randint(2, 60, (1, 5))
    runner = streamed(model)
    other = copy.deepcopy(model.get_input_embeddings())
    other.weight.copy_(torch.randn_like(other.weight))
    with runner.resident_ends(head=False, embedding=True):
        hidden, _ = runner.enter(ids)
        if runner.parts.embedding is None:  # Gemma's scales its rows, so it is not a plain table
            with pytest.raises(EckartError, match="no token embedding"):
                runner.enter(ids, other)
            return
        changed, _ = runner.enter(ids, other)
        again, _ = runner.enter(ids)
    assert not torch.allclose(hidden, changed)
    assert torch.equal(hidden, again)


@torch.no_grad()
def test_a_model_that_leaves_a_block_out_is_refused(tiny):
    runner = streamed(tiny("llama"))
    runner.model.model.layers.append(runner.model.model.layers[0])
    runner.parts = anatomy(runner.model)
    with pytest.raises(EckartError, match="ran 3 of its 4 blocks"), runner.resident_ends(head=False, embedding=True):
        runner.enter(torch.zeros(1, 3, dtype=torch.int64))


@torch.no_grad()
def test_the_block_output_stand_in_is_a_tensor_and_its_own_first_item():
    x = torch.randn(3, 4, 5)
    out = x.as_subclass(blockwise._Output)
    assert out[0].shape == x.shape
    assert torch.equal(out[1], x[1])
    assert torch.equal(out[:, 0], x[:, 0])
    assert type(out + 1) is torch.Tensor


def test_release_keeps_children():
    outer = nn.Sequential(nn.Linear(3, 3))
    outer.register_parameter("own", nn.Parameter(torch.ones(2)))
    release(outer)
    assert outer.own.device.type == "meta"
    assert outer[0].weight.device.type == "cpu"


FRAGMENTED = """
import torch
from eckart.hosts.memory import return_memory

def resident():
    line = next(line for line in open("/proc/self/smaps_rollup") if line.startswith("Rss:"))
    return int(line.split()[1]) / 1e3

start = resident()
held = [(torch.ones(500_000), torch.ones(10_000)) for _ in range(100)]  # 2 MB, and what may lie between two of them
held = [small for _, small in held]
freed = resident()
return_memory()
print(freed - start, resident() - start, len(held))
"""


def test_memory_is_returned():
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("reads the size of the process from /proc")
    # In a process of its own, whose C library takes every block from the heap and returns nothing unasked: otherwise
    # it depends on where the import left gaps whether the small blocks keep the large ones from being returned at once.
    unasked = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
    command = [sys.executable, "-c", FRAGMENTED]
    done = subprocess.run(command, env=os.environ | unasked, capture_output=True, text=True, check=True)
    freed, returned, _ = map(float, done.stdout.split())
    if freed < 150:
        pytest.skip("this C library returns freed memory by itself")
    assert returned < 30


OF_A_LARGE_PARENT = """
import subprocess, sys
held = b"x" * 1_500_000_000
code = "from eckart.hosts.memory import peak_memory; print(peak_memory())"
print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
"""


def test_the_peak_is_this_process_s_own():
    """`getrusage` begins with what the parent held, which a notebook or a benchmark may have filled."""
    done = subprocess.run([sys.executable, "-c", OF_A_LARGE_PARENT], capture_output=True, text=True, check=True)
    assert 50e6 < float(done.stdout) < 1.4e9
