"""Adapters in files: eckart's own folder keeps every bit, PEFT's is read and written as PEFT does it itself."""

import json
import re
import warnings
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import eckart
from eckart.errors import EckartError
from eckart.files.peft import lokr_factor, write_peft
from eckart.hosts import AdaptedHost, Adapter, host, replace
from eckart.hosts.adapter import Left, Plus, Rescaled, Times
from eckart.maps import Dense, Diagonal, Householder, Kronecker, LowRank, sparse
from eckart.methods.adapt.adapters import ATTRIBUTE
from eckart.methods.adapt.saving import in_peft_terms

peft = pytest.importorskip("peft")

LLAMA = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.randint(0, 61, (3, 8), generator=torch.Generator().manual_seed(1))
SETTINGS = {
    "oft": {"block": 16}, "svfit": {"rank": 8}, "soka": {"rank": 2}, "miss": {"rank": 10},
    "sara": {"threshold": 5e-3}, "lift": {"rank": 4, "budget": 4}, "s2ft": {"channels": 4},
    "flylora": {"rank": 8, "kept": 4}, "ia3": {}, "vera": {"rank": 8},
}  # fmt: skip
MERGING = [method for method in eckart.ADAPTERS if method != "flylora"]
# On GPT-2, whose layers are stored transposed, PEFT's LoRA alone is written; it has no sum of Kronecker products.
BEYOND = {"soka", "sara", "s2ft", "spp", "lors", "sqft", "snella", "flylora", "spectralft", "mps", "tlora"}
BEYOND_PEFT = {"llama": BEYOND, "gpt2": {*BEYOND, "miss", "hra", "oft", "lift", "loha", "lokr", "hira", "ia3"}}


def llama(seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes})).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64, n_layer=1, n_head=4, vocab_size=61, n_positions=32, bos_token_id=0, eos_token_id=0,
        loss_type="ForCausalLM",
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=3)).eval()


MAKE = {"llama": llama, "gpt2": gpt2}


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trained(model: nn.Module, method: str, steps: int = 2, name: str = "default", **settings) -> nn.Module:
    """A model with an adapter that has left its start."""
    settings = settings or SETTINGS.get(method, {"rank": 4})
    eckart.adapt(model, method, name=name, data=[IDS], **settings)
    return train(model, steps)


def train(model: nn.Module, steps: int = 1) -> nn.Module:
    adapters = eckart.adapters(model)
    optimizer = torch.optim.AdamW(adapters.parameter_groups(rate=1e-2, weight_decay=0.0))
    labels = IDS if model(input_ids=IDS).logits.ndim == 3 else torch.arange(3)
    torch.manual_seed(0)
    model.train()
    for _ in range(steps):
        (model(input_ids=IDS, labels=labels).loss + adapters.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def in_peft(base: nn.Module, folder: Path, **options) -> nn.Module:
    """The folder as PEFT itself reads it, any complaint being an error but for one of its own about transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        return peft.PeftModel.from_pretrained(base, folder, **options).eval()


def made_by_peft(base: nn.Module, config, folder: Path) -> tuple[nn.Module, Path]:
    """A model with an adapter of random numbers that PEFT made, and the folder it saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config).eval()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder)
    return model, folder


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    bare = not any(isinstance(module, AdaptedHost) for module in model.modules()) and not hasattr(model, ATTRIBUTE)
    trains = all(parameter.requires_grad for parameter in model.parameters())
    return (
        bare and trains and after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())
    )


def refuses(model: nn.Module, folder: Path, message: str) -> None:
    """Loading says this in one sentence, and the model stays as it was."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(EckartError, match=message) as error:
        eckart.load_adapter(model, folder)
    assert unchanged(model, before)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("base", MAKE)
@pytest.mark.parametrize("method", eckart.ADAPTERS)
def test_what_is_loaded_computes_and_trains_as_what_was_saved(method, base, tmp_path):
    model = trained(MAKE[base](), method)
    eckart.adapters(model).save(tmp_path / "a")
    loaded = eckart.load_adapter(MAKE[base](), tmp_path / "a")
    assert torch.equal(outputs(model), outputs(loaded))
    assert not torch.equal(outputs(model), outputs(MAKE[base]()))
    assert eckart.adapters(loaded).state.described == eckart.adapters(model).state.described
    groups = [[(g["lr"], len(g["params"])) for g in eckart.adapters(m).parameter_groups()] for m in (model, loaded)]
    assert groups[0] == groups[1]
    more = [outputs(train(m, steps=3)) for m in (model, loaded)]
    assert torch.equal(*more)  # the rule, the penalty, what is frozen, drawn, or counted
    if method in MERGING:
        eckart.adapters(loaded).merge()
        assert torch.allclose(outputs(loaded), outputs(model), atol=1e-4)


@pytest.mark.parametrize("base", MAKE)
@pytest.mark.parametrize("method", eckart.ADAPTERS)
def test_peft_computes_what_was_saved_for_it(method, base, tmp_path):
    model, folder = trained(MAKE[base](), method), tmp_path / "a"
    if method in BEYOND_PEFT[base]:
        with pytest.raises(EckartError, match=r'PEFT.*; save it with format="eckart"'):
            eckart.adapters(model).save(folder, format="peft")
        assert not folder.exists()
        return
    eckart.adapters(model).save(folder, format="peft")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert torch.allclose(outputs(in_peft(MAKE[base](), folder)), outputs(model), atol=1e-5)
    assert torch.allclose(outputs(eckart.load_adapter(MAKE[base](), folder)), outputs(model), atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "miss", "hra", "oft"])
def test_gradients_are_those_of_peft(method, tmp_path):
    eckart.adapters(trained(llama(), method)).save(tmp_path / "a", format="peft")
    theirs, ours = in_peft(llama(), tmp_path / "a", is_trainable=True), eckart.load_adapter(llama(), tmp_path / "a")
    for model in (theirs, ours):
        model(input_ids=IDS, labels=IDS).loss.backward()
    norms = [
        sorted(float(p.grad.norm()) for p in model.parameters() if p.requires_grad and p.grad is not None)
        for model in (theirs, ours)
    ]
    assert len(norms[0]) > 5
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_ranks_and_scales_of_single_layers_are_kept(tmp_path):
    model = trained(llama(num_hidden_layers=2), "eva", rank=4, rho=2.0)
    eckart.adapters(model).save(tmp_path / "a", format="peft")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert len(set(config["rank_pattern"].values())) > 1
    assert config["rank_pattern"].keys() <= config["alpha_pattern"].keys() | config["rank_pattern"].keys()
    assert torch.allclose(outputs(in_peft(llama(num_hidden_layers=2), tmp_path / "a")), outputs(model), atol=1e-5)


def test_layers_are_named_by_their_ends_only_where_that_means_no_other(tmp_path):
    targets = {"ends": ["q_proj", "down_proj"], "first": r"model\.layers\.0\..*(q|v)_proj"}
    for folder, target in targets.items():
        model = eckart.adapt(llama(num_hidden_layers=2), "lora", targets=target, rank=2)
        eckart.adapters(model).save(tmp_path / folder, format="peft")
    named = {f: json.loads((tmp_path / f / "adapter_config.json").read_text())["target_modules"] for f in targets}
    assert named["ends"] == ["down_proj", "q_proj"]
    assert isinstance(named["first"], str)
    adapted = [n for n, _ in in_peft(llama(num_hidden_layers=2), tmp_path / "first").named_modules() if "lora_A" in n]
    assert {n.split(".lora_A")[0].removeprefix("base_model.model.") for n in adapted} == {
        "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj",
    }  # fmt: skip


def test_heads_that_train_whole_go_along(tmp_path):
    model = trained(classifier(), "lora")
    for form in ("eckart", "peft"):
        eckart.adapters(model).save(tmp_path / form, format=form)
        fresh = classifier()
        with torch.no_grad():
            fresh.score.weight.zero_()  # a head made anew is another one every time
        loaded = eckart.load_adapter(fresh, tmp_path / form)
        assert torch.allclose(outputs(loaded), outputs(model), atol=1e-5)
        assert loaded.score.weight.requires_grad
        assert torch.equal(loaded.score.weight, model.score.weight)
    assert torch.allclose(outputs(in_peft(classifier(), tmp_path / "peft")), outputs(model), atol=1e-5)
    with pytest.raises(EckartError, match=r"score would be overwritten, which the adapter 'default' trains"):
        eckart.load_adapter(model, tmp_path / "eckart", name="second")


def test_whole_modules_that_share_a_tensor(tmp_path):
    model = trained(llama(tie_word_embeddings=True), "lora", rank=2, trained=["lm_head", "embed_tokens"])
    eckart.adapters(model).save(tmp_path / "a")
    loaded = eckart.load_adapter(llama(tie_word_embeddings=True), tmp_path / "a")
    assert torch.equal(outputs(loaded), outputs(model))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_whole_module_around_an_adapted_layer_is_refused(tmp_path):
    model = eckart.adapt(llama(), "lora", targets=["down_proj"], trained=["mlp"])
    with pytest.raises(EckartError, match=r"mlp trains whole and holds the adapted layer model.layers.0.mlp.down_proj"):
        eckart.adapters(model).save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


# Tensors of PEFT's files that do not train.
UNTRAINED = re.compile(r"base_layer|vera_[AB]$|shira_indices$")
CONFIGS = {
    "patterns": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern={"v_proj": 2},
        alpha_pattern={"layers.0.mlp.down_proj": 10},
    ),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=5, use_rslora=True, target_modules="all-linear"),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, lora_dropout=0.1, target_modules=["k_proj", "up_proj"]),
    "dora, rslora": lambda: peft.LoraConfig(r=4, use_dora=True, use_rslora=True, target_modules=["k_proj"]),
    "whole modules": lambda: peft.LoraConfig(r=4, target_modules=["o_proj"], modules_to_save=["lm_head"]),
    "orthogonal": lambda: peft.LoraConfig(r=4, init_lora_weights="orthogonal", target_modules=["o_proj"]),
    "head": lambda: peft.LoraConfig(r=4, target_modules=["lm_head"]),
    "miss": lambda: peft.MissConfig(r=7, target_modules=["q_proj", "down_proj"]),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=["q_proj"]),
    "odd hra": lambda: peft.HRAConfig(r=3, target_modules=["q_proj"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=16, use_cayley_neumann=False, target_modules=["q_proj", "down_proj"]),
    "oft by count": lambda: peft.OFTConfig(
        r=4, oft_block_size=0, use_cayley_neumann=False, target_modules=["q_proj", "down_proj"]
    ),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=["q_proj", "down_proj"]),
    "lokr, whole": lambda: peft.LoKrConfig(r=16, alpha=30, target_modules=["q_proj", "down_proj"]),
    "lokr, both": lambda: peft.LoKrConfig(r=2, decompose_both=True, target_modules=["q_proj", "down_proj"]),
    "lokr, first": lambda: peft.LoKrConfig(
        r=7, decompose_both=True, decompose_factor=32, target_modules=["q_proj", "down_proj"]
    ),
    "lokr, patterns": lambda: peft.LoKrConfig(
        r=2, decompose_factor=4, rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 5}, init_weights="lycoris",
        target_modules=["q_proj", "down_proj"],
    ),
    "loha": lambda: peft.LoHaConfig(
        r=3, alpha=2, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 5}, target_modules=["q_proj", "down_proj"]
    ),
    "hira": lambda: peft.HiraConfig(r=3, rank_pattern={"q_proj": 2}, target_modules=["q_proj", "down_proj"]),
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "shira": lambda: peft.ShiraConfig(r=3, target_modules=["q_proj", "down_proj"]),
    "vera": lambda: peft.VeraConfig(r=7, vera_dropout=0.1, target_modules=["q_proj", "down_proj", "gate_proj"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_peft_made_computes_the_same_here(kind, tmp_path):
    config = CONFIGS[kind]()
    model, folder = made_by_peft(llama(), config, tmp_path / "a")
    loaded = eckart.load_adapter(llama(), folder)
    assert torch.allclose(outputs(loaded), outputs(model), atol=1e-5)
    assert not torch.allclose(outputs(loaded), outputs(llama()), atol=1e-3)
    assert eckart.adapters(loaded).state.described["default"].recipe().between is None  # PEFT's stay where they are
    eckart.adapters(loaded).save(tmp_path / "own")
    before = outputs(loaded)
    assert torch.equal(outputs(eckart.load_adapter(llama(), tmp_path / "own")), before)
    if kind not in ("vera", "odd hra", "oft by count"):  # written as LORA, warned of by PEFT, or of several sizes
        eckart.adapters(loaded).save(tmp_path / "back", format="peft")
        saved = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
        assert saved["peft_type"] == config.peft_type
        assert torch.allclose(outputs(in_peft(llama(), tmp_path / "back")), before, atol=1e-5)
    assert not torch.equal(outputs(train(loaded)), before)
    stored = load_file(folder / "adapter_model.safetensors")
    assert eckart.adapters(loaded).count() == sum(p.numel() for k, p in stored.items() if not UNTRAINED.search(k))


def test_a_head_saved_along_must_be_the_base_s(tmp_path):
    _, folder = made_by_peft(llama(), CONFIGS["head"](), tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.base_layer.weight"] += 1
    save_file(tensors, folder / "adapter_model.safetensors")
    refuses(llama(), folder, "lm_head.base_layer.weight is part of no linear layer's adapter")


def test_peft_on_transposed_layers_and_in_half_precision(tmp_path):
    config = peft.LoraConfig(r=4, use_dora=True, fan_in_fan_out=True, target_modules=["c_attn", "c_fc"])
    model, folder = made_by_peft(gpt2(), config, tmp_path / "a")
    assert torch.allclose(outputs(eckart.load_adapter(gpt2(), folder)), outputs(model), atol=1e-5)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    loaded = eckart.load_adapter(gpt2(), folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.allclose(outputs(loaded), outputs(model), atol=0.05)


REFUSED = {
    "fourierft": (
        lambda: peft.FourierFTConfig(n_frequency=9, target_modules=["q_proj"]),
        "type FOURIERFT; eckart reads LORA, MISS, HRA, OFT, LOKR, LOHA, HIRA, IA3, SHIRA, VERA",
    ),
    "c3a": (lambda: peft.C3AConfig(block_size=16, target_modules=["q_proj"]), "PEFT's type C3A"),
    "boft": (lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]), "PEFT's type BOFT"),
    "road": (lambda: peft.RoadConfig(target_modules=["q_proj"]), "PEFT's type ROAD"),
    "delora": (lambda: peft.DeloraConfig(r=2, target_modules=["q_proj"]), "PEFT's type DELORA"),
    "norms": (lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]), "PEFT's type LN_TUNING"),
    "module dropout": (
        lambda: peft.LoKrConfig(r=2, module_dropout=0.1, target_modules=["q_proj"]), "says module_dropout=0.1"
    ),
    "rank dropout": (
        lambda: peft.LoHaConfig(r=2, rank_dropout=0.1, target_modules=["q_proj"]), "says rank_dropout=0.1"
    ),
    "hira dropout": (lambda: peft.HiraConfig(r=2, hira_dropout=0.1, target_modules=["q_proj"]), "says hira_dropout"),
    "no projection": (
        lambda: peft.VeraConfig(r=2, save_projection=False, target_modules=["q_proj"]), "without its random matrices"
    ),
    "neumann": (lambda: peft.OFTConfig(oft_block_size=16, target_modules=["q_proj"]), "a cut series"),
    "coft": (
        lambda: peft.OFTConfig(oft_block_size=16, use_cayley_neumann=False, coft=True, target_modules=["q_proj"]),
        "says coft=True, which eckart cannot express",
    ),
    "block share": (
        lambda: peft.OFTConfig(
            oft_block_size=16, use_cayley_neumann=False, block_share=True, target_modules=["q_proj"]
        ),
        "says block_share=True",
    ),
    "bat": (lambda: peft.MissConfig(r=8, init_weights="bat", target_modules=["q_proj"]), "init_weights='bat'"),
    "mini": (lambda: peft.MissConfig(r=8, mini_r=8, init_weights="mini", target_modules=["q_proj"]), "='mini'"),
    "gram-schmidt": (lambda: peft.HRAConfig(r=4, apply_GS=True, target_modules=["q_proj"]), "says apply_GS=True"),
    "bias": (lambda: peft.LoraConfig(r=2, bias="all", target_modules=["q_proj"]), "says bias='all'"),
    "lora bias": (lambda: peft.LoraConfig(r=2, lora_bias=True, target_modules=["q_proj"]), "says lora_bias=True"),
    "pissa": (lambda: peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj"]), "changes the base"),
    "embedding": (lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens"]), "adapts no linear layer with LORA"),
    "embedding too": (
        lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
        "embed_tokens.* is part of no linear layer's adapter",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_peft_alone_can_express_is_refused(kind, tmp_path):
    config, message = REFUSED[kind]
    _, folder = made_by_peft(llama(tie_word_embeddings=False), config(), tmp_path / "a")
    refuses(llama(tie_word_embeddings=False), folder, message)


def test_pickles_and_folders_without_an_adapter_are_refused(tmp_path):
    eckart.adapters(trained(llama(), "lora")).save(tmp_path / "a", format="peft")
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    refuses(llama(), tmp_path / "a", "is a pickle")
    refuses(llama(), tmp_path, "holds no adapter: neither eckart_adapter.json nor PEFT's adapter_config.json")
    refuses(llama(), tmp_path / "nowhere", "holds no adapter")


def test_a_damaged_folder_leaves_the_model_alone(tmp_path):
    folder = tmp_path / "a"
    eckart.adapters(trained(classifier(), "lora-xs")).save(folder)
    text, numbers = (folder / "eckart_adapter.json").read_text(), (folder / "adapter.safetensors").read_bytes()
    for old, new, message in (
        ('"lora-xs"', '"lora-xl"', "unknown method 'lora-xl'; did you mean 'lora-xs'"),
        ('"rank"', '"rink"', "has no setting 'rink'"),
        ('"name": "default"', '"name": "a.b"', "no dot"),
        ('"delta.0.weight"', '"delta.9.weight"', "freezes delta.9.weight, which it does not have"),
        ('"score"', '"model.norm"', "holds score.weight, which eckart_adapter.json does not mention"),
    ):
        assert old in text
        (folder / "eckart_adapter.json").write_text(text.replace(old, new))
        refuses(classifier(), folder, message)
    (folder / "eckart_adapter.json").write_text(text)
    (folder / "adapter.safetensors").write_bytes(numbers[:-100])
    refuses(classifier(), folder, "cannot be read")
    (folder / "adapter.safetensors").write_bytes(numbers)
    narrow = classifier()
    narrow.score = nn.Linear(64, 2, bias=False)
    refuses(narrow, folder, r"the adapter has score as .*3, 64.*, this model as .*2, 64")
    refuses(llama(), folder, "the adapter trains score, which this model does not have")


def test_another_base_is_refused_but_not_another_dtype(tmp_path):
    model = trained(llama(), "pissa")
    eckart.adapters(model).save(tmp_path / "a")
    refuses(llama(seed=1), tmp_path / "a", r"made for another base: .* differ by 1[0-9]{2}%")
    refuses(llama(intermediate_size=80), tmp_path / "a", r"gate_proj is \(96, 64\) where the layer, 80 x 64, needs")
    refuses(gpt2(), tmp_path / "a", "no linear layer; load it on its own base")
    half = eckart.load_adapter(llama().bfloat16(), tmp_path / "a")
    assert torch.allclose(outputs(half).float(), outputs(model), atol=0.2)


def test_names_of_adapters(tmp_path):
    model = trained(llama(), "lora", name="first")
    trained(model, "hra", name="second")
    adapters = eckart.adapters(model)
    adapters.use("first", "second")
    with pytest.raises(EckartError, match="which adapter"):
        adapters.save(tmp_path / "a")
    with pytest.raises(EckartError, match="no adapter is called 'frist'; did you mean 'first'"):
        adapters.save(tmp_path / "a", "frist")
    with pytest.raises(EckartError, match='format must be "eckart" or "peft"'):
        adapters.save(tmp_path / "a", "first", format="pickle")
    for name in ("first", "second"):
        adapters.save(tmp_path / name, name)
    with pytest.raises(EckartError, match="already holds something"):
        adapters.save(tmp_path / "first", "first")
    fresh = eckart.load_adapter(eckart.load_adapter(llama(), tmp_path / "first"), tmp_path / "second")
    assert eckart.adapters(fresh).active == {"second": 1.0}
    eckart.adapters(fresh).use("first", "second")
    assert torch.equal(outputs(fresh), outputs(model))
    with pytest.raises(EckartError, match="called 'first' already"):
        eckart.load_adapter(fresh, tmp_path / "first")
    with pytest.raises(EckartError, match="no dot"):
        eckart.load_adapter(fresh, tmp_path / "first", name="a.b")
    eckart.adapters(fresh).merge()
    merged = outputs(fresh)
    with pytest.raises(EckartError, match="merged"):
        eckart.load_adapter(fresh, tmp_path / "first", name="third")
    assert eckart.adapters(fresh).names == ["first", "second"]
    assert torch.equal(outputs(fresh), merged)


def test_each_sequence_of_a_batch_may_ask_for_a_loaded_adapter(tmp_path):
    alone = {}
    for method in ("lora", "oft"):
        model = trained(llama(), method)
        alone[method] = outputs(model)
        eckart.adapters(model).save(tmp_path / method, format="peft")
    model = llama()
    alone[None] = outputs(model)
    for method in ("lora", "oft"):
        eckart.load_adapter(model, tmp_path / method, name=method)
    with eckart.adapters(model).requests(["oft", None, "lora"]):
        together = outputs(model)
    for i, method in enumerate(("oft", None, "lora")):
        assert torch.allclose(together[i], alone[method][i], atol=1e-5)


def test_a_compressed_base_keeps_its_adapter_in_the_own_format_alone(tmp_path):
    def compressed() -> nn.Module:
        model = llama()
        name = "model.layers.0.mlp.up_proj"
        left, right = model.get_submodule(name).weight.detach()[:, :20], torch.eye(64)[:20]
        replace(model, name, host(LowRank(left.clone(), right)))
        return model

    model = trained(compressed(), "dora")
    eckart.adapters(model).save(tmp_path / "a")
    assert torch.equal(outputs(eckart.load_adapter(compressed(), tmp_path / "a")), outputs(model))
    with pytest.raises(EckartError, match=r"PEFT has no LORA for a LowRankHost, which model.layers.0.mlp.up_proj is"):
        eckart.adapters(model).save(tmp_path / "b", format="peft")


@pytest.mark.parametrize("method", ["lors", "sqft"])
def test_a_mask_is_that_of_its_base_or_stored(method, tmp_path):
    """Nothing of the mask is stored while the base has it; another support is refused, a lost one is kept as bits."""

    def pruned(least: float) -> nn.Module:
        model = llama()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "proj" in name:
                    weight[weight.abs() < least] = 0
        return model

    model = trained(pruned(0.01), method)
    eckart.adapters(model).save(tmp_path / "a")
    assert not any("bits" in key for key in load_file(tmp_path / "a" / "adapter.safetensors"))
    assert torch.equal(outputs(eckart.load_adapter(pruned(0.01), tmp_path / "a")), outputs(model))
    half = eckart.load_adapter(pruned(0.01).bfloat16(), tmp_path / "a")
    assert torch.allclose(outputs(half).float(), outputs(model), atol=0.2)
    refuses(pruned(0.011), tmp_path / "a", "was trained where the weights of its base are not 0, and these are 0 else")
    with torch.no_grad():
        for layer in eckart.adapters(model).layers.values():
            layer.base.weight[layer.base.weight.abs() < 0.011] = 0
    eckart.adapters(model).save(tmp_path / "b")
    assert torch.equal(outputs(eckart.load_adapter(pruned(0.011), tmp_path / "b")), outputs(model))
    assert torch.equal(outputs(train(eckart.load_adapter(pruned(0.011), tmp_path / "b"))), outputs(train(model)))


def test_what_a_type_of_peft_leaves_no_room_for_is_refused():
    layer = nn.Linear(12, 8, bias=False)

    def terms(*chains: list, base: nn.Module = layer):
        return in_peft_terms({f"a.{i}": (base, Adapter(chain)) for i, chain in enumerate(chains)}, {})

    kronecker = {sides: Kronecker(torch.ones(1, *sides), torch.ones(1, 8 // sides[0], 12 // sides[1])) for sides in
                 ((2, 3), (4, 2), (4, 4), (1, 3))}  # fmt: skip
    assert lokr_factor(terms([Plus(kronecker[2, 3])])) == -1
    assert lokr_factor(terms([Plus(kronecker[4, 4])])) == 4
    ones = torch.ones(12)
    for chains, message in (
        ([[Plus(kronecker[4, 2])]], "by one rule for all layers"),
        ([[Plus(kronecker[1, 3])], [Plus(kronecker[4, 4])]], "by one rule for all layers"),
        ([[Plus(Kronecker(torch.ones(2, 2, 3), torch.ones(2, 4, 4)))]], "PEFT has no type for Plus of a Kronecker"),
        ([[Plus(kronecker[2, 3], dropout=0.1)]], "PEFT has no type for Plus of a Kronecker"),
        ([[Plus(sparse(torch.eye(8, 12)))]], "has a multiple of 20 entries in a.0, not 8"),
        ([[Plus(LowRank(torch.ones(8, 2), torch.ones(2, 12)))], [Times(Diagonal(ones))]], "the type differs"),
    ):
        with pytest.raises(EckartError, match=message + r'.*; save it with format="eckart"'):
            terms(*chains)
    with pytest.raises(EckartError, match=r"IA3 would scale the bias of a.0 as well"):
        terms([Left(Diagonal(ones[:8]))], base=nn.Linear(12, 8))
    assert terms([Times(Diagonal(ones))], base=nn.Linear(12, 8)).kind == "IA3"


def test_ia3_of_layers_with_a_bias_and_of_both_sides(tmp_path):
    config = peft.IA3Config(target_modules=["q_proj", "o_proj"], feedforward_modules=["o_proj"])
    _, folder = made_by_peft(llama(attention_bias=True), config, tmp_path / "a")
    refuses(llama(attention_bias=True), folder, "IA3 scales the bias of model.layers.0.self_attn.q_proj as well")
    config = peft.IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"])
    theirs, folder = made_by_peft(llama(attention_bias=True), config, tmp_path / "b")
    loaded = eckart.load_adapter(llama(attention_bias=True), folder)
    assert torch.allclose(outputs(loaded), outputs(theirs), atol=1e-5)
    model = eckart.adapt(llama(num_hidden_layers=2), "ia3", targets=r".*0.*(q|down)_proj", side="inputs")
    eckart.adapt(model, "ia3", name="outputs", targets=r".*1.*(q|down)_proj", side="outputs")
    train(model)
    chains = {
        n: (layer.base, layer.adapter(a)) for n, layer in eckart.adapters(model).layers.items() for a in layer.adapters
    }
    adapter = in_peft_terms(chains, {})
    names = [name for name, _ in llama(num_hidden_layers=2).named_modules()]
    write_peft(tmp_path / "both", adapter, names)  # a name such as q_proj means layers of either side
    eckart.adapters(model).use("default", "outputs")
    assert torch.allclose(outputs(in_peft(llama(num_hidden_layers=2), tmp_path / "both")), outputs(model), atol=1e-5)


def test_chains_that_no_method_makes(tmp_path):
    torch.manual_seed(0)
    plus = [Plus(LowRank(torch.randn(8, r), torch.randn(r, 6)), scale) for r, scale in ((2, 0.5), (1, -3.0))]
    made = in_peft_terms({"a": (nn.Linear(6, 8), Adapter([*plus, Rescaled(torch.ones(8))]))}, {})
    product = made.scale("a") * made.layers["a"]["lora_B.weight"] @ made.layers["a"]["lora_A.weight"]
    dense = sum(change.scale * (change.delta.up.weight @ change.delta.down.weight) for change in plus)
    assert torch.allclose(product, dense, atol=1e-5)
    assert made.has_magnitudes
    turn = Times(Householder(torch.randn(2, 6)))
    for chain in ([turn, plus[0]], [plus[0], turn], [Rescaled(torch.ones(8))], [Plus(Dense(torch.randn(8, 6)))]):
        with pytest.raises(EckartError, match=r'PEFT has no type for .*; save it with format="eckart"'):
            in_peft_terms({"a": (nn.Linear(6, 8), Adapter(chain))}, {})
    base = nn.Linear(6, 8)
    with torch.no_grad():
        base.weight[3] = 0
    zero = Adapter([Plus(LowRank(torch.zeros(8, 2), torch.randn(2, 6))), Rescaled(torch.ones(8))])
    with pytest.raises(EckartError, match="1 rows of a are zero, and PEFT divides by their length"):
        in_peft_terms({"a": (base, zero)}, {})
    two = {"a": (nn.Linear(6, 8), Adapter([turn])), "b": (nn.Linear(6, 8), Adapter([plus[0]]))}
    with pytest.raises(EckartError, match="the type differs between a and b"):
        in_peft_terms(two, {})


def test_a_real_model_in_both_formats(tmp_path):
    demo = Path(str(files("eckart"))) / "demo" / "stories260k"
    model = eckart.adapt(AutoModelForCausalLM.from_pretrained(demo).eval(), "pissa", rank=4)
    train(model)
    for form in ("eckart", "peft"):
        eckart.adapters(model).save(tmp_path / form, format=form)
        loaded = eckart.load_adapter(AutoModelForCausalLM.from_pretrained(demo).eval(), tmp_path / form)
        assert torch.allclose(outputs(loaded), outputs(model), atol=1e-4)
    theirs = in_peft(AutoModelForCausalLM.from_pretrained(demo), tmp_path / "peft")
    assert torch.allclose(outputs(theirs), outputs(model), atol=1e-4)
