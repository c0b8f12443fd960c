"""``toolkit plugins`` and ``toolkit layers``."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.activations.spec import ActivationSpec
from toolkit.cli import Parser
from toolkit.errors import UserError, closest

if TYPE_CHECKING:
    from toolkit.activations.declare import Activation


def main_plugins(argv: list[str]) -> int:
    """``toolkit plugins list`` and ``toolkit plugins show``."""
    parser = Parser(
        "toolkit plugins",
        description="Plugins provide activations, measures, dataset layouts, face detectors, engines and commands.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="what is installed, where it comes from, what it provides, and its state")
    show = commands.add_parser(
        "show",
        help="one activation: its formula, parameters, properties and providers",
        description="One activation: its formula, parameters, properties and providers; with --triton the Triton functions that "
        "are generated from its formula, as they are compiled.",
    )
    show.add_argument("name", help="as in a config: swish, triton/swish, 'swish(beta=1.5, learn=beta)'")
    show.add_argument("--triton", action="store_true", help="print the generated Triton source instead")
    show.add_argument("--out", type=Path, help="also write the plot as a picture: NAME.png, .svg, .pdf or .html")
    show.add_argument("--range", type=float, nargs=2, default=(-5.0, 5.0), metavar=("FROM", "TO"), help="of the plot (default -5 5)")
    new = commands.add_parser(
        "new",
        help="the skeleton of a plugin with an activation of your own",
        description="Write a small distribution: pyproject.toml with the entry point, a module that declares an activation by its formula, "
        "a test that runs the conformance kit, and a README. Nothing is overwritten.",
    )
    new.add_argument("name", metavar="NAME", help="of the plugin and its activation, such as my_act")
    new.add_argument("--out", type=Path, help="folder to write (default: ./NAME)")
    check = commands.add_parser(
        "check",
        help="the conformance kit: is an activation what its declaration says",
        description="Check activations against their declarations: value and derivatives against float64 and finite differences, declared "
        "properties, copies and pickles, compilers, a fresh process, every backend's version, a few steps of a GAN. One line per check, "
        "a failure with the input that shows it; exit status 1 if there is one. From a plugin's own tests: "
        "`from toolkit.testing import check_activation`.",
    )
    check.add_argument("names", nargs="+", metavar="NAME", help="as in a config, without parameters: swish, my_plugin/my_act")
    args = parser.parse_args(argv)
    if args.command == "show":
        return _show(args.name, args.triton, tuple(args.range), args.out)
    if args.command == "new":
        return _new(args.name, args.out or Path(args.name))
    return _check(args.names) if args.command == "check" else _list()


def _parameters(activation: Activation) -> str:
    return ", ".join(f"{k}={p.default:g}" if isinstance(p.default, float) else f"{k}={p.default}" for k, p in activation.parameters.items())


def _list() -> int:
    """Every plugin, where it comes from, what it provides, and its state; then every activation."""
    from toolkit.activations.registry import registry
    from toolkit.console import console, print_rows
    from toolkit.metrics import all_measures
    from toolkit.plugins import plugins, silently

    with silently():
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
            console.print(info.problem, markup=False)
    for notice in loaded.notices:
        console.print(notice, markup=False)
    declarations = []
    without: dict[str, str] = {}
    for provider, names in found.providers.items():
        for name, activation in names.items():
            if name != activation.name:
                continue
            also = ", ".join(activation.aliases)
            versions = []
            for backend in found.backends:
                version = found.lookup(backend, name)
                if isinstance(version, str):
                    without[f"{backend} has no version of {provider}/{name}"] = version
                else:
                    versions.append(backend)
            title = f"{provider}/{name}" + (f" (also {also})" if also else "")
            declarations.append((title, _parameters(activation) or "-", ", ".join(versions) or "-", activation.reference))
    print_rows("activations", ("activation", "parameters", "also as", "reference"), declarations)
    for what, why in without.items():
        console.print(f"{what}: {why}", markup=False)
    console.print("In a config: name, name(key=value, learn=key, per_channel=true) or provider/name(...).")
    return 0


def _show(text: str, triton: bool, span: tuple[float, float], out: Path | None) -> int:
    from toolkit.activations.registry import registry
    from toolkit.console import console, print_rows

    if not span[0] < span[1]:
        raise UserError(f"--range goes from a smaller number to a larger one, not from {span[0]:g} to {span[1]:g}")

    found = registry()
    spec = ActivationSpec.parse(text)
    if triton:
        spec = replace(spec, provider="triton")
    provider, activation = found.find(spec)
    values, learned = activation.configure(spec)
    if triton:
        assert activation.implementation is not None
        print(activation.implementation.source(activation, spec), end="")
        return 0
    rows = [("name", activation.name), ("provider", provider)]
    versions = {p: found.lookup(p, activation.name) for p in found.providers}
    rows.append(("provided by", ", ".join(p for p, a in versions.items() if a is not None and not isinstance(a, str))))
    rows += [(f"not by {p}", why) for p, why in versions.items() if isinstance(why, str)]
    rows.append(("also called", ", ".join(activation.aliases) or "-"))
    rows.append(("parameters", ", ".join(f"{k}={v}" + (" (learned)" if k in learned else "") for k, v in values.items()) or "-"))
    rows.append(("reference", activation.reference or "-"))
    if activation.formula is not None:
        measured = activation.properties(values)
        low, high = measured.output_range
        rows.append(("output range", f"{low:.4g} to {high:.4g}"))
        rows.append(("gain for initialisation", f"{measured.gain:.4g}"))
        rows.append(("continuous derivatives", {-1: "none, it jumps", 3: "3 or more"}.get(measured.smoothness, str(measured.smoothness))))
        rows.append(("never decreases", "yes" if measured.monotonic else "no"))
        rows.append(("formula", _source(activation.formula)))
    print_rows(str(activation.name), ("what", "value"), rows)
    formula = activation.formula
    if formula is None:
        if out is not None:
            raise UserError(f"{activation.name} is not element-wise: there is no curve to plot")
        return 0
    from toolkit.activations import plot

    arguments = activation.values_in_order(values)
    x, y, slope = plot.curves(lambda x: formula(x, *arguments), span)
    for title, line in (("f(x)", y), ("its derivative", slope)):
        console.print(title, markup=False)
        for row in plot.braille(x, [line]):
            console.print(row, markup=False)
    if out is not None:
        plot.save(out, str(spec), x, y, slope)
        console.print(f"plot: {out}", markup=False)
    return 0


def _new(name: str, folder: Path) -> int:
    from toolkit.activations.new import make_plugin

    for path in make_plugin(name, folder):
        print(f"wrote {path}")
    print(f"next: pip install -e {folder}, edit the formula in {folder}/toolkit_{name}.py, toolkit plugins check {name}")
    return 0


def _check(names: list[str]) -> int:
    from toolkit.console import console
    from toolkit.testing import run_checks, subject

    for name in names:
        subject(name)  # a name that nobody provides is told before the first takes its time
    failed = 0
    for name in names:
        console.print(f"{name}", markup=False, style="bold")
        results = run_checks(name)
        while True:
            with console.status("checking"):
                result = next(results, None)
            if result is None:
                break
            failed += result.state == "failed"
            sign = {"passed": "ok  ", "failed": "FAIL", "not applicable": "-   "}[result.state]
            console.print(f"  {sign} {result.name}" + (f": {result.message}" if result.message else ""), markup=False)
    if failed:
        console.print(f"{failed} check{'s' if failed > 1 else ''} failed", style="bold")
    return 1 if failed else 0


def _source(function: Any) -> str:
    try:
        return inspect.cleandoc(inspect.getsource(function)).rstrip(",")
    except (OSError, TypeError):  # of a function that is not written in Python
        return f"torch.{getattr(function, '__name__', function)}"


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
    from toolkit.plugins import use_files

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from error
    model = config.get("model") if isinstance(config, dict) else None
    if isinstance(config, dict) and config.get("plugins"):
        use_files(config["plugins"] if isinstance(config["plugins"], list) else [str(config["plugins"])], path.parent)
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
