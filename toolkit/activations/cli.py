"""``toolkit plugins`` and ``toolkit layers``."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from toolkit.cli import Parser
from toolkit.errors import UserError, closest


def main_plugins(argv: list[str]) -> int:
    """``toolkit plugins list``: every plugin, where it comes from, what it provides, and its state."""
    from toolkit.console import console, print_rows

    parser = Parser(
        "toolkit plugins",
        description="Plugins provide activations, measures, dataset layouts, face detectors, engines and commands.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="what is installed, where it comes from, what it provides, and its state")
    parser.parse_args(argv)

    from toolkit.activations.registry import registry
    from toolkit.metrics import all_measures
    from toolkit.plugins import plugins

    loaded = plugins()
    found = registry()
    all_measures()
    for hook in ("toolkit_dataset_layouts", "toolkit_face_detectors", "toolkit_engines", "toolkit_commands"):
        loaded.mapping(hook)
    rows = []
    for info in loaded.infos.values():
        provides = "; ".join(f"{hook.removeprefix('toolkit_')}: {', '.join(names)}" for hook, names in info.provides.items())
        rows.append((info.name, f"{info.distribution} {info.version}", info.state, provides or "-", info.location or "-"))
    print_rows("plugins", ("name", "distribution", "state", "provides", "loaded from"), rows)
    for info in loaded.infos.values():
        if info.reason:
            console.print(f"{info.name} is {info.state}: {info.reason}", markup=False)
    declarations = []
    for provider, names in found.providers.items():
        for name, activation in names.items():
            if name != activation.name:
                continue
            parameters = ", ".join(
                f"{k}={p.default:g}" if isinstance(p.default, float) else f"{k}={p.default}" for k, p in activation.parameters.items()
            )
            also = ", ".join(activation.aliases)
            declarations.append((f"{provider}/{name}" + (f" (also {also})" if also else ""), parameters or "-", activation.reference))
    print_rows("activations", ("activation", "parameters", "reference"), declarations)
    console.print("In a config: name, name(key=value, learn=key, per_channel=true) or provider/name(...).")
    return 0


def main_layers(argv: list[str]) -> int:
    """``toolkit layers CONFIG``: the sites of a network and the activation at each."""
    parser = Parser(
        "toolkit layers",
        description="The sites of a network: their names (for patterns in rules), the activation at each, its provider and parameters, "
        "the shape of its input, and what it is fused with.",
    )
    parser.add_argument("config", help="a config of `toolkit gan fit` or `toolkit detector fit`, or the name of a timm backbone")
    parser.add_argument("--image-size", type=int, default=224, help="of a timm backbone given by name (default %(default)s)")
    args = parser.parse_args(argv)
    networks = _from_config(Path(args.config)) if Path(args.config).is_file() else _from_timm(args.config, args.image_size)

    from toolkit.activations.assign import find_sites
    from toolkit.console import print_rows

    for title, (network, example) in networks.items():
        traced = find_sites(network, example)
        rows = [
            (
                s.name,
                s.activation,
                s.provider,
                s.parameters or "-",
                "x".join(map(str, s.shape[1:])) if s.shape else "not reached",
                s.fused,
            )
            for s in traced.sites.values()
        ]
        print_rows(title, ("site", "activation", "provider", "parameters", "input", "fused with"), rows)
        for line in unreachable(traced.functional):
            print(line)
        shared = [s.name for s in traced.sites.values() if s.calls > 1]
        if shared:
            print(f"used more than once in a forward pass: {', '.join(shared)}")
    return 0


def unreachable(functional: dict[str, int]) -> list[str]:
    """One line for every nonlinearity that a network calls as a function, with the places that call it."""
    places: dict[str, list[str]] = {}
    for key in functional:
        where, _, function = key.rpartition(": ")
        places.setdefault(function, []).append(where)
    return [
        f"no rule can reach {function}: the model calls it as a function, in {', '.join(where[:3])}"
        + (f" and {len(where) - 3} more" if len(where) > 3 else "")
        for function, where in places.items()
    ]


def _from_config(path: Path) -> dict[str, tuple[Any, Any]]:
    import torch
    import yaml

    from toolkit.detector.module import Detector
    from toolkit.gan.module import GAN

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from error
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict):
        raise UserError(f"{path} has no section model; is it a config of `toolkit gan fit` or `toolkit detector fit`?")
    kind: type[GAN] | type[Detector] = Detector if "backbone" in model or "front_end" in model else GAN
    known = set(inspect.signature(kind).parameters)
    if unknown := [key for key in model if key not in known]:
        raise UserError(f"{path}: model has the unknown key {unknown[0]!r}.{closest(str(unknown[0]), known)}")
    if kind is GAN:
        gan = GAN(**model)
        return {n: (network, network.example()) for n, network in (("generator", gan.generator), ("discriminator", gan.discriminator))}
    detector = Detector(**{"classes": ["real", "fake"], **model})
    size = detector.options.image_size
    network = detector.net
    width = network.head["fc"].in_features
    tables = {"head": (torch.nn.Sequential(_named(network.head)), torch.zeros(2, int(width)))}  # type: ignore[arg-type]
    if not isinstance(network.backbone, torch.nn.Identity):
        tables = {"backbone": (network.backbone, torch.zeros(2, 3, size, size)), **tables}  # type: ignore[dict-item]
    return tables


def _named(modules: Any) -> Any:
    from collections import OrderedDict

    return OrderedDict(modules.items())


def _from_timm(name: str, size: int) -> dict[str, tuple[Any, Any]]:
    import timm
    import torch

    from toolkit.detector.networks import make_backbone

    if not timm.is_model(name):
        raise UserError(f"{name} is neither a config file nor a timm backbone.{closest(name, timm.list_models())}")
    backbone, _ = make_backbone(name, size, "model")
    return {name: (backbone, torch.zeros(2, 3, size, size))}
