"""What clipped, noisy training gives away, against integrals and published figures; gradients by example."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import eckart
from eckart.errors import EckartError
from eckart.optim import clipped_gradients, epsilon, noise_for
from eckart.optim.privacy import ORDERS, renyi_divergence


@settings(max_examples=40, deadline=None)
@given(order=st.integers(2, 12), share=st.floats(0.01, 0.99), noise=st.floats(0.6, 5.0))
def test_the_divergence_of_a_step_is_that_of_its_mixture(order: int, share: float, noise: float):
    def density(x: float) -> float:
        """E over N(0, z^2) of ((1 - q) + q exp((2 x - 1) / (2 z^2)))^a, the integrand."""
        logarithm = math.log((1 - share) + share * math.exp((2 * x - 1) / (2 * noise**2)))
        return math.exp(order * logarithm - x * x / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))

    integral = quad(density, -20 * noise, order + 20 * noise, limit=500, points=[0.0, float(order)])[0]
    assert renyi_divergence(order, share, noise) == pytest.approx(math.log(integral) / (order - 1), rel=1e-6, abs=1e-9)


# TensorFlow Privacy's MNIST tutorial: 60,000 images, batches of 256, delta 1e-5, with the older conversion.
PUBLISHED = [(1.3, 15, 1.19), (1.1, 60, 3.01), (0.7, 45, 7.10)]


@pytest.mark.parametrize(("noise", "epochs", "published"), PUBLISHED)
def test_epsilons_are_the_published_ones_or_tighter(noise: float, epochs: int, published: float):
    share, steps = 256 / 60000, epochs * 60000 // 256
    older = min(steps * renyi_divergence(a, share, noise) + math.log(1e5) / (a - 1) for a in ORDERS)
    assert older == pytest.approx(published, rel=0.02)
    assert 0.7 * published < epsilon(share, noise, steps, 1e-5) < older


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0.001, 1.0), noise=st.floats(0.5, 20.0), steps=st.integers(1, 1000), delta=st.floats(1e-9, 0.1))
def test_privacy_goes_with_noise_steps_share_and_delta(share: float, noise: float, steps: int, delta: float):
    spent = epsilon(share, noise, steps, delta)
    assert 0 <= spent < math.inf
    assert epsilon(share, 1.5 * noise, steps, delta) <= spent
    assert epsilon(share, noise, 2 * steps, delta) >= spent
    assert epsilon(share / 2, noise, steps, delta) <= spent + 1e-12
    assert epsilon(share, noise, steps, delta / 2) >= spent


def test_noise_is_the_least_that_keeps_the_target():
    noise = noise_for(3.0, 0.02, 500, 1e-5)
    assert epsilon(0.02, noise, 500, 1e-5) <= 3.0 < epsilon(0.02, 0.99 * noise, 500, 1e-5)
    assert epsilon(0.5, 0.0, 1, 1e-5) == math.inf
    assert epsilon(0.5, 1.0, 0, 1e-5) == epsilon(0.0, 0.0, 9, 1e-5) == 0.0
    with pytest.raises(EckartError, match="no noise keeps"):
        noise_for(1e-9, 0.5, 10**6, 1e-5)
    with pytest.raises(EckartError, match="must be probabilities"):
        epsilon(1.5, 1.0, 1, 1e-5)


IDS = torch.randint(0, 61, (5, 7), generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 2, 1, 1, 0])


def bert(method: str, **options) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=61, num_labels=3
    )
    model = eckart.adapt(BertForSequenceClassification(config).eval(), method, rank=4, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in eckart.adapters(model).layers.values():
            for parameter in layer.adapter("default").trained():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def losses(model: nn.Module, rows: slice = slice(None)) -> Tensor:
    return F.cross_entropy(model(IDS[rows]).logits, LABELS[rows], reduction="none")


@pytest.mark.parametrize("method", ["fedsvd", "lora", "rslora"])
def test_clipped_gradients_are_those_of_the_examples_one_by_one(method: str):
    model = bert(method, alpha=6.0)  # LoRA trains both factors, and the head trains whole
    trained = [p for p in model.parameters() if p.requires_grad]
    each = [torch.autograd.grad(losses(model, slice(i, i + 1)).sum(), trained) for i in range(len(IDS))]
    norms = torch.stack([torch.cat([g.flatten() for g in one]).norm() for one in each])
    clip = float(norms.median())  # some are clipped, some are not
    sums, found = clipped_gradients(model, lambda: losses(model), clip)
    assert torch.allclose(found.float(), norms, rtol=1e-4)
    assert set(sums) == set(trained)
    for i, parameter in enumerate(trained):
        expected = sum(one[i] * min(1.0, clip / float(norm)) for one, norm in zip(each, norms, strict=True))
        assert torch.allclose(sums[parameter], expected, atol=1e-5 * float(norms.max()))
        assert parameter.grad is None


@pytest.mark.parametrize(
    ("method", "trained", "words"),
    [
        ("dora", None, "more than one plain low-rank change"),
        ("lora", ["word_embeddings"], r"embeddings\S* trains, whose gradient by example is not known"),
    ],
)
def test_what_has_no_gradient_by_example_is_refused(method: str, trained: list[str] | None, words: str):
    model = bert(method, trained=trained)
    with pytest.raises(EckartError, match=words):
        clipped_gradients(model, lambda: losses(model), 1.0)


def test_weights_that_are_used_twice_are_refused():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(EckartError, match="nothing else has the same weights"):
        clipped_gradients(model, lambda: model(IDS % 9).sum((1, 2)), 1.0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner(x)).sum(1)

    twice = Twice()
    with pytest.raises(EckartError, match="runs twice in a pass"):
        clipped_gradients(twice, lambda: twice(torch.ones(3, 6)), 1.0)


def test_a_mean_over_examples_is_refused():
    model = bert("lora")
    with pytest.raises(EckartError, match="one number per example"):
        clipped_gradients(model, lambda: losses(model).mean(), 1.0)


def test_what_lets_examples_see_each_other_is_refused():
    net = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Linear(24, 16))
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    eckart.adapt(net, "lora", rank=2, targets=["0", "2"])
    assert set(clipped_gradients(net.eval(), lambda: net(x).sum(1), 1.0)[0])  # its own statistics let none
    with pytest.raises(EckartError, match=r"1 \(BatchNorm1d\) lets examples of a batch see each other"):
        clipped_gradients(net.train(), lambda: net(x).sum(1), 1.0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=61
    )
    model = eckart.adapt(LlamaForCausalLM(config), "sparselora", rank=2, outputs="sparse", dense=0)
    with pytest.raises(EckartError, match=r"q_proj \(AdaptedHost\) lets examples of a batch see each other"):
        eckart.federate(model, [{"input_ids": IDS, "labels": IDS}], rounds=1, steps=1, noise=1.0)
