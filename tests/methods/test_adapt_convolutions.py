"""Adapters on convolutions: every method, every geometry, and a real network moved to other images."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import eckart
from eckart.errors import EckartError
from eckart.hosts import AdaptedHost, map_of
from eckart.hosts.convolution import convolved, patches
from eckart.maps import Dense, Kronecker, LinearMap, LowRank, Product, Scaled, Sum, Tucker, sparse, tucker_numbers
from eckart.optim import clipped_gradients

SHARED = Path(os.environ.get("ECKART_SHARED", "/work/shared"))
SETTINGS = {
    "oft": {"block": 8}, "svfit": {"rank": 5}, "soka": {"rank": 2}, "sara": {"threshold": 1e-2},
    "lift": {"rank": 4, "budget": 4}, "s2ft": {"channels": 4}, "flylora": {"rank": 8, "kept": 4}, "ia3": {},
}  # fmt: skip
# Methods that start from inputs or gradients of linear layers, and the one that needs a transformer.
REFUSED = {"corda", "eva", "lora-sb", "sparselora"}
METHODS = [method for method in eckart.ADAPTERS if method not in REFUSED]
MOVES = {"lora-xs": 1e-3, "snella": 1e-1}
IMAGES = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(3))
GEOMETRIES = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"padding": "same", "dilation": 2},
    "uneven": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "bias": False},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflected": {"padding": 2, "padding_mode": "reflect", "stride": 2},
}


class Net(nn.Module):
    """Two convolutions and a linear head."""

    def __init__(self, **geometry: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(16, 24, **({"kernel_size": 3} | geometry))
        self.second = nn.Conv2d(24, 16, 2)
        self.head = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).mean((2, 3)))


def adapted(method: str, net: nn.Module | None = None, **options: Any) -> nn.Module:
    settings = SETTINGS.get(method, {"rank": 4})
    return eckart.adapt(net or Net(stride=2, padding=1), method, **settings, **options).eval()


def disturb(net: nn.Module, name: str = "default") -> None:
    """Move an adapter away from its start."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in eckart.adapters(net).layers.values():
            for parameter in layer.adapter(name).trained():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def outputs(net: nn.Module, images: Tensor = IMAGES) -> Tensor:
    return net(images)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_at_the_base_learns_merges_and_leaves_no_trace(method: str):
    net = Net(stride=2, padding=1)
    before, state = outputs(net), copy.deepcopy(net.state_dict())
    adapted(method, net)
    handle = eckart.adapters(net)
    assert set(handle.layers) == {"first", "second"}
    assert (outputs(net) - before).abs().max() < MOVES.get(method, 1e-5)
    optimizer = torch.optim.AdamW(handle.parameter_groups(1e-2, weight_decay=0.0))
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(net(IMAGES), torch.arange(4))
        (loss + handle.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    disturb(net)
    moved = outputs(net)
    assert (moved - before).abs().max() > 1e-3
    if method != "flylora":
        assert max(handle.merge().values()) < 1e-4
        assert all(type(layer._merged[0]) is nn.Conv2d for layer in handle.layers.values())
        torch.testing.assert_close(outputs(net), moved, atol=1e-3, rtol=1e-4)
        handle.unmerge()
    assert torch.equal(outputs(net), moved)
    with handle.off():
        assert torch.equal(outputs(net), before)
    handle.remove()
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("method", ["lora", "flora", "dora", "soka", "oft"])
def test_every_geometry_is_computed_merged_and_folded(method: str, geometry: str):
    net = adapted(method, Net(**GEOMETRIES[geometry]), targets=["first"])
    disturb(net)
    layer = eckart.adapters(net).layers["first"]
    moved, seen = outputs(net), layer(IMAGES)
    whole = layer.held_map().dense().view_as(layer.base.weight)
    torch.testing.assert_close(seen, layer.base._conv_forward(IMAGES, whole, layer.base.bias), atol=1e-4, rtol=1e-4)
    folded = eckart.adapters(net).fold()
    assert type(folded.first) is nn.Conv2d
    assert folded.first.extra_repr() == Net(**GEOMETRIES[geometry]).first.extra_repr()
    torch.testing.assert_close(outputs(folded), moved, atol=1e-4, rtol=1e-4)


def test_trained_numbers_are_the_paper_s():
    net = eckart.adapt(Net(), "flora", rank=3)
    lora = eckart.adapt(Net(), "lora", rank=3)
    for name, (m, c, k) in {"first": (24, 16, 3), "second": (16, 24, 2)}.items():
        r = min(3, k)
        assert trained(net, name) == 3 * 3 * r * r + 3 * (m + c) + 2 * r * k
        assert trained(lora, name) == 3 * (m + c * k * k)


def trained(net: nn.Module, name: str) -> int:
    return sum(p.numel() for p in eckart.adapters(net).layers[name].adapter("default").trained())


def test_flora_is_the_product_of_its_core_and_its_factors():
    net = eckart.adapt(Net(), "flora", rank=3, scale=0.5)
    disturb(net)
    layer = eckart.adapters(net).layers["first"]
    core, (up,), (down, high, wide) = map_of(layer.adapter("default").chain()[0].delta).parts()
    added = 0.5 * torch.einsum("pqrs,mp,cq,hr,ws->mchw", core, up, down, high, wide)
    torch.testing.assert_close(layer.held_map().dense().view_as(added) - layer.base.weight, added, atol=1e-5, rtol=1e-4)


def test_lora_of_full_rank_can_be_any_kernel():
    net = eckart.adapt(Net(), "lora", rank=24, alpha=24, targets=["first"])
    layer, wanted = eckart.adapters(net).layers["first"], torch.randn(24, 16, 3, 3)
    delta = layer.adapter("default").chain()[0].delta
    with torch.no_grad():
        delta.up.weight.copy_(torch.eye(24))
        delta.down.weight.copy_((wanted - layer.base.weight).flatten(1))
    torch.testing.assert_close(layer(IMAGES), F.conv2d(IMAGES, wanted, layer.base.bias), atol=1e-4, rtol=1e-4)


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def added_maps(channels: int, kernel: tuple[int, ...]) -> list[LinearMap]:
    """Maps from patches to 6 outputs, of the structures that run as convolutions and of one that does not."""
    n, sizes = channels * int(np.prod(kernel)), (6, channels, *kernel)
    ranks = (2, 3, *[2] * len(kernel))
    tucker = Tucker(torch.randn(tucker_numbers(sizes, ranks)), (6,), sizes[1:], ranks)
    low_rank = LowRank(torch.randn(6, 2), torch.randn(2, n))
    return [
        tucker,
        low_rank,
        Dense(torch.randn(6, n)),
        Kronecker(torch.randn(2, 3, channels), torch.randn(2, 2, n // channels)),
        Kronecker(torch.randn(1, 3, channels // 2), torch.randn(1, 2, 2 * n // channels)),
        Product((Dense(torch.randn(6, 4)), Dense(torch.randn(4, n)))),
        Sum((tucker, Scaled(low_rank, 0.5))),
        sparse(torch.randn(6, n) * (torch.rand(6, n) < 0.3)),
    ]


@pytest.mark.parametrize("axes", CONVOLUTIONS)
@pytest.mark.parametrize("batched", [True, False])
def test_maps_of_patches_are_convolved(axes: int, batched: bool):
    torch.manual_seed(0)
    conv = CONVOLUTIONS[axes](4, 6, 3, stride=2, padding=1)
    x = torch.randn(4, *[7] * axes)
    x = x.expand(2, *x.shape) if batched else x
    seen = patches(x, conv)
    wanted = conv(x).movedim(-1 - axes, -1)
    torch.testing.assert_close(seen @ conv.weight.flatten(1).mT + conv.bias, wanted, atol=1e-4, rtol=1e-4)
    for map_ in added_maps(4, conv.kernel_size):
        wanted = (seen @ map_.dense().mT).movedim(-1, -1 - axes)
        torch.testing.assert_close(convolved(map_, x, conv), wanted, atol=1e-3, rtol=1e-4)


def test_low_rank_and_tucker_changes_never_write_patches_out():
    for method in ("lora", "flora", "pissa"):
        net = adapted(method, Net())
        largest = 0

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                nonlocal largest
                out = func(*args, **(kwargs or {}))
                largest = max(largest, out.numel() if isinstance(out, Tensor) else 0)
                return out

        with Watch():
            eckart.adapters(net).layers["first"](IMAGES)
        assert largest <= 4 * 24 * 8 * 8


@pytest.mark.parametrize("axes", CONVOLUTIONS)
def test_convolutions_of_one_and_three_axes_are_adapted(axes: int):
    torch.manual_seed(0)
    net, x = nn.Sequential(CONVOLUTIONS[axes](12, 16, 3)), torch.randn(2, 12, *[5] * axes)
    before = net(x)
    for method in ("lora", "flora", "dora"):
        eckart.adapt(net, method, name=method, rank=2)
        torch.testing.assert_close(net(x), before, atol=1e-5, rtol=1e-5)
        disturb(net, method)
        moved = net(x)
        assert (moved - before).abs().max() > 1e-3
        eckart.adapters(net).merge()
        torch.testing.assert_close(net(x), moved, atol=1e-4, rtol=1e-4)
        eckart.adapters(net).unmerge()


@pytest.mark.parametrize("method", ["lora", "dora", "flora"])
def test_every_image_gets_the_adapter_it_asks_for(method: str):
    net = adapted(method)
    adapted("lora", net, name="other", seed=5)
    disturb(net)
    disturb(net, "other")
    handle, alone = eckart.adapters(net), {}
    for name in ("default", "other"):
        handle.use(name)
        alone[name] = outputs(net)
    handle.use()
    wanted = torch.stack([alone["other"][0], outputs(net)[1], alone["default"][2], alone["default"][3]])
    with handle.requests(["other", None, "default", "default"]):
        torch.testing.assert_close(outputs(net), wanted, atol=1e-5, rtol=1e-5)


def test_weights_interpolate_between_base_and_adapted():
    for method in ("lora", "dora", "flora"):
        net = adapted(method)
        disturb(net)
        layer = eckart.adapters(net).layers["first"]
        whole, base = layer(IMAGES), layer.base(IMAGES)
        eckart.adapters(net).use(default=0.25)
        torch.testing.assert_close(layer(IMAGES), base + 0.25 * (whole - base), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "pissa", "flora", "soka", "miss"])
def test_saved_and_loaded_it_computes_the_same_bits(method: str, tmp_path: Path):
    net = adapted(method)
    disturb(net)
    eckart.adapters(net).save(tmp_path / "adapter")
    loaded = eckart.load_adapter(Net(stride=2, padding=1), tmp_path / "adapter").eval()
    assert torch.equal(outputs(loaded), outputs(net))
    assert eckart.adapters(loaded).count() == eckart.adapters(net).count()
    with pytest.raises(EckartError, match="first is a convolution, which is not written in PEFT's format"):
        eckart.adapters(net).save(tmp_path / "peft", format="peft")


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: Net(groups=2), {"targets": ["first"]}, "first convolves in several groups"),
        (Net, {"method": "corda", "data": [IMAGES]}, "first is a convolution, whose inputs"),
        (Net, {"method": "lora-sb", "data": [IMAGES]}, "first is a convolution, whose inputs"),
        (Net, {"method": "lora", "rank": 99}, "rank 99 is more than first"),
        (Net, {"method": "sparselora"}, "Net is no model of transformers"),
        (Net, {"targets": ["third"]}, "targets name 'third'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make: Callable[[], nn.Module], options: dict[str, Any], words: str):
    net = make()
    with pytest.raises(EckartError, match=words):
        eckart.adapt(net, **options)
    assert not any(isinstance(module, AdaptedHost) for module in net.modules())


def test_without_targets_convolutions_in_groups_are_left_out():
    net = eckart.adapt(nn.Sequential(Net(groups=2), nn.Conv1d(12, 16, 3)), "lora", rank=2)
    assert set(eckart.adapters(net).layers) == {"0.second", "1"}


class Block(nn.Module):
    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs)
        self.conv2, self.bn2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False), nn.BatchNorm2d(outs)
        self.pad = (outs - ins) // 2 if stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        skip = x if self.pad is None else F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return (y + skip).relu()


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*[Block(ins if k == 0 else outs, outs, stride if k == 0 else 1) for k in range(3)])
            for ins, outs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.linear(x.mean((2, 3)))


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    path = SHARED / "models" / "cifar10-resnet20" / "model.safetensors"
    if not path.is_file():
        pytest.skip("the shared models are not here")
    net = ResNet20()
    net.load_state_dict(load_file(path), strict=False)
    return net.eval()


def upside_down(part: str, count: int) -> tuple[Tensor, Tensor]:
    """Real images turned by half, normalized, with their labels."""
    path = SHARED / "data" / "cifar10" / "lossless.npz"
    if not path.is_file():
        pytest.skip("the shared data are not here")
    held = np.load(path)
    images = torch.from_numpy(held[f"x_{part}"][:count]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return ((images - mean) / std).flip(2), torch.from_numpy(held[f"y_{part}"][:count]).long()


@pytest.mark.parametrize(("method", "rank", "rate"), [("flora", 8, 1e-2), ("lora", 4, 3e-3)])
def test_a_network_of_cifar_10_learns_images_upside_down(resnet: nn.Module, method: str, rank: int, rate: float):
    net = copy.deepcopy(resnet)
    (images, labels), (other, truth) = upside_down("train", 600), upside_down("test", 242)
    eckart.adapt(net, method, rank=rank)
    handle = eckart.adapters(net)
    assert len(handle.layers) == 19
    assert torch.equal(outputs(net, other), outputs(resnet, other))
    before = accuracy(net, other, truth)
    optimizer = torch.optim.AdamW(handle.parameter_groups(rate, weight_decay=0.0))
    for step in range(40):  # in evaluation mode: the statistics of the norms are the base's
        at = torch.arange(step * 50, step * 50 + 50) % 600
        F.cross_entropy(net(images[at]), labels[at]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert accuracy(net, other, truth) > before + 0.05
    moved = outputs(net, other)
    assert max(handle.merge().values()) < 1e-5
    torch.testing.assert_close(outputs(net, other), moved, atol=1e-2, rtol=1e-3)
    handle.unmerge()
    assert torch.equal(outputs(net, other), moved)
    handle.remove()
    assert torch.equal(outputs(net, other), outputs(resnet, other))


def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((outputs(net, images).argmax(1) == labels).float().mean())


def test_merged_and_folded_under_data_convolutions_hold_all_of_the_change():
    net = adapted("lora", targets=["first", "head"])
    disturb(net)
    moved, handle = outputs(net), eckart.adapters(net)
    lost = handle.merge(data=[{"x": IMAGES}])
    assert lost.keys() == {"first", "head"}
    assert max(lost.values()) < 1e-5
    handle.unmerge()
    torch.testing.assert_close(outputs(handle.fold(data=[{"x": IMAGES}])), moved, atol=1e-5, rtol=1e-5)


def test_statistics_of_convolutions_are_refused():
    with pytest.raises(EckartError, match="first is a convolution, whose inputs and gradients are not gathered"):
        eckart.start_statistics(Net(), [{"x": IMAGES}])


def test_a_later_task_leaves_an_earlier_one_alone_to_the_bit():
    net = adapted("incremental", name="one")
    disturb(net, "one")
    before = outputs(net)
    adapted("incremental", net, name="two", after="one")
    disturb(net, "two")
    eckart.adapters(net).use("one")
    assert torch.equal(outputs(net), before)


@pytest.mark.parametrize("method", ["lora", "fedsvd"])
def test_gradients_by_image_are_those_of_the_images_one_by_one(method: str):
    net, labels, clip = adapted(method, targets=["first", "second"]), torch.arange(4), 0.5
    disturb(net)
    trained = [p for p in net.parameters() if p.requires_grad]
    expected = [torch.zeros_like(p) for p in trained]
    for i in range(4):
        own = torch.autograd.grad(F.cross_entropy(net(IMAGES[i : i + 1]), labels[i : i + 1]), trained)
        norm = sum(g.square().sum() for g in own).sqrt()
        expected = [e + g * min(1.0, clip / float(norm)) for e, g in zip(expected, own, strict=True)]
    sums, _ = clipped_gradients(net, lambda: F.cross_entropy(net(IMAGES), labels, reduction="none"), clip)
    for parameter, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(sums[parameter], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("steps", [6, 900])
@pytest.mark.parametrize("method", ["switchlora", "lift", "sara"])
def test_what_moves_between_steps_saves_loads_and_moves_on(method: str, steps: int, tmp_path: Path):
    """More steps than a low-rank change of the switched terms could hold make it dense."""
    settings = {"switchlora": {"interval": 10.0, "wait": 1}, "lift": {"refresh": 2}}
    net = eckart.adapt(
        Net(stride=2, padding=1), method, **{**SETTINGS.get(method, {"rank": 4}), **settings.get(method, {})}
    )

    def train(net: nn.Module) -> None:
        handle = eckart.adapters(net)
        optimizer = torch.optim.AdamW(handle.parameter_groups(1e-2))
        handle.follow(optimizer, steps)
        assert set(handle.moving()) <= dict(net.named_parameters()).keys()
        for _ in range(4):
            F.cross_entropy(net(IMAGES), torch.arange(4)).backward()
            optimizer.step()
            optimizer.zero_grad()

    train(net)
    eckart.adapters(net).save(tmp_path / "adapter")
    loaded = eckart.load_adapter(Net(stride=2, padding=1), tmp_path / "adapter")
    assert torch.equal(outputs(loaded), outputs(net))
    train(loaded)
    moved = outputs(loaded)
    eckart.adapters(loaded).save(tmp_path / "later")
    assert torch.equal(outputs(eckart.load_adapter(Net(stride=2, padding=1), tmp_path / "later")), moved)


@pytest.mark.parametrize("method", ["lora", "dora", "flora", "soka", "hira"])
def test_half_precision_and_autocast_train(method: str):
    labels = torch.arange(4)
    net = adapted(method, Net(stride=2, padding=1).bfloat16())
    F.cross_entropy(net(IMAGES.bfloat16()).float(), labels).backward()
    other = adapted(method)
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(other(IMAGES), labels).backward()
    for one in (net, other):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in one.parameters() if p.requires_grad)
