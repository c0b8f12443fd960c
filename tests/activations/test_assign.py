"""Rules and sites, on our networks and on timm's."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from toolkit import Activation, Registry, UserError, apply_rules, find_sites, registry
from toolkit.activations.module import ActivationModule
from toolkit.gan.networks import Discriminator, Generator

BACKBONES = {
    "resnet18": ("layer1.0.act1", 17),
    "efficientnet_b0": ("blocks.0.0.se.gate", 65),
    "test_convnext": ("stages.0.blocks.0.mlp.act", 9),
    "test_vit": ("blocks.0.mlp.act", 6),
}


def test_last_matching_rule_wins_and_nothing_is_shared() -> None:
    generator = Generator(64)
    chosen = apply_rules(
        generator,
        {"*": "relu", "up[34].*": "swish(beta=1.5, learn=beta)", "output": "tanh"},
        example=generator.example(),
    )
    assert chosen == {
        "up1.act": "toolkit_builtin/relu",
        "up2.act": "toolkit_builtin/relu",
        "up3.act": "toolkit_builtin/swish(beta=1.5, learn=beta)",
        "up4.act": "toolkit_builtin/swish(beta=1.5, learn=beta)",
        "output": "toolkit_builtin/tanh",
    }
    modules = [m for m in generator.modules() if isinstance(m, ActivationModule)]
    assert len({id(m) for m in modules}) == 5
    assert [k for k in generator.state_dict() if k.endswith("beta")] == ["up3.act.beta", "up4.act.beta"]
    with torch.no_grad():
        assert generator(torch.randn(3, 100)).shape == (3, 3, 64, 64)


def test_defaults_apply_without_rules() -> None:
    discriminator = Discriminator(32)
    chosen = apply_rules(discriminator, {})
    assert chosen["down1.act"] == "toolkit_builtin/leaky_relu(negative_slope=0.2)"
    assert chosen["output"] == "toolkit_builtin/identity"


def test_unmatched_pattern_lists_sites_and_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'up9.act' matches no site; the sites are: up1.act.*Did you mean"):
        apply_rules(Generator(32), {"up9.act": "relu"})


def test_unknown_activation_lists_the_known_and_broken_plugins() -> None:
    known = Registry(
        {"toolkit_builtin": registry().providers["toolkit_builtin"]}, {"triton": "plugin triton is broken: ImportError: no triton"}
    )
    with pytest.raises(UserError, match=r"unknown activation 'rlu'; known: .*Did you mean 'relu'.*plugin triton is broken"):
        known.find("rlu")
    with pytest.raises(UserError, match=r"no plugin 'triton' provides activations"):
        known.find("triton/swish")


def test_preferred_provider_is_taken_where_it_has_the_name() -> None:
    mine = Activation("swish", lambda x, beta: x * torch.sigmoid(beta * x), parameters=registry().find("swish")[1].parameters)
    both = Registry({"toolkit_builtin": registry().providers["toolkit_builtin"], "mine": {"swish": mine}})
    assert both.find("swish")[0] == "toolkit_builtin"
    assert both.find("swish", ["mine"])[0] == "mine"
    assert both.find("relu", ["mine"])[0] == "toolkit_builtin"
    assert both.find("toolkit_builtin/swish", ["mine"])[0] == "toolkit_builtin"


def test_checkpoint_moves_between_providers() -> None:
    mine = Activation("swish", lambda x, beta: x * torch.sigmoid(beta * x), parameters=registry().find("swish")[1].parameters)
    both = Registry({"toolkit_builtin": registry().providers["toolkit_builtin"], "mine": {"swish": mine}})
    networks = []
    for prefer in ([], ["mine"]):
        torch.manual_seed(0)
        network = Generator(16)
        apply_rules(
            network,
            {"up*": "swish(learn=beta, per_channel=true)"},
            example=network.example(),
            prefer=prefer,
            activations=both,
        )
        networks.append(network)
    networks[1].load_state_dict(networks[0].state_dict())
    z = torch.randn(2, 100)
    torch.testing.assert_close(networks[0](z), networks[1](z))


@pytest.mark.parametrize("name", BACKBONES)
def test_timm_backbones_have_all_their_sites(name: str) -> None:
    site, count = BACKBONES[name]
    backbone = timm.create_model(name, num_classes=0)
    example = torch.randn(1, 3, 224 if "test" not in name else 160, 224 if "test" not in name else 160)
    traced = find_sites(backbone, example)
    assert site in traced.sites
    assert len(traced.sites) == count
    assert all(info.calls == 1 for info in traced.sites.values())
    before = [k for k in backbone.state_dict() if "act" not in k]
    chosen = apply_rules(backbone, {"*": "elu(learn=alpha, per_channel=true)"}, example=example)
    assert len(chosen) == count
    assert [k for k in backbone.state_dict() if not k.endswith("alpha")] == before
    backbone(example).sum().backward()
    alphas = [p for n, p in backbone.named_parameters() if n.endswith("alpha")]
    assert len(alphas) == count
    assert all(p.grad is not None for p in alphas)


def test_replaced_activation_is_the_same_function() -> None:
    torch.manual_seed(0)
    backbone = timm.create_model("resnet18", num_classes=0).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = backbone(x)
        apply_rules(backbone, {"*": "relu"})
        torch.testing.assert_close(backbone(x), before)


class CallsFunctions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(self.act(self.inner(x))).tanh()


def test_functional_nonlinearities_are_reported() -> None:
    traced = find_sites(CallsFunctions(), torch.randn(2, 4))
    assert list(traced.sites) == ["act"]
    assert set(traced.functional) == {"(network): gelu", "(network): tanh"}
    attention = find_sites(timm.create_model("test_vit", num_classes=0), torch.randn(1, 3, 160, 160)).functional
    assert any("scaled_dot_product_attention" in key or "softmax" in key for key in attention)


def test_a_module_in_two_places_becomes_two() -> None:
    shared = nn.ReLU()
    network = nn.Sequential(nn.Linear(3, 3), shared, nn.Linear(3, 3), shared)
    apply_rules(network, {"*": "prelu"})
    assert network[1] is not network[3]
    assert len([n for n, _ in network.named_parameters() if "negative_slope" in n]) == 2


@pytest.mark.parametrize("upsampling", ["transposed", "nearest", "bilinear", "zero"])
@pytest.mark.parametrize("size", [32, 128])
def test_generator_sites_do_not_hide_functions(size: int, upsampling: str) -> None:
    generator = Generator(size, width=4, upsampling=upsampling)
    apply_rules(generator, {"*": "snake", "output": "sigmoid"})
    traced = find_sites(generator, generator.example())
    assert traced.functional == {}
    assert list(traced.sites) == [*(f"up{i}.act" for i in range(1, size.bit_length() - 2)), "output"]
    with torch.no_grad():
        image = generator(torch.randn(2, 100))
    assert image.shape == (2, 3, size, size)
    assert image.min() < 0  # sigmoid's (0, 1) is mapped to (-1, 1)
