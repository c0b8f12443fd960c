"""``toolkit plugins new``: the skeleton of a plugin that declares an activation."""

from __future__ import annotations

import keyword
from pathlib import Path

from toolkit.errors import UserError
from toolkit.files import write_text

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
version = "0.1.0"
description = "The activation {name} for deepfake-toolkit"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["deepfake-toolkit"]

[project.optional-dependencies]
test = ["pytest"]

# The group is what the toolkit looks for; the name on the left is the plugin's, as in {name}/{name}.
[project.entry-points.toolkit]
{name} = "{module}"

[tool.hatch.build.targets.wheel]
only-include = ["{module}.py"]
"""

MODULE = '''\
"""The activation {name}."""

import torch
from toolkit import Activation, Parameter, hookimpl


def formula(x: torch.Tensor, a: torch.Tensor | float) -> torch.Tensor:
    """x * tanh(a * softplus(x)): write yours here, in element-wise PyTorch. Its derivatives and kernels follow from it."""
    return x * torch.tanh(a * torch.nn.functional.softplus(x))


@hookimpl
def toolkit_activations() -> list[Activation]:
    return [
        Activation(
            "{name}",
            formula,
            parameters={{"a": Parameter(1.0, above=0.0)}},  # any number of them, or none; each can be learned from YAML
            reference="where the formula comes from: paper and equation",
            # Its Triton version follows from the formula: `toolkit plugins show {name} --triton`. Where one of its functions
            # is better written by hand, give it here, as plain source of x and the parameters (tl is Triton's language):
            # triton="def dx(x, a):\\n    return ...",
        )
    ]
'''

TEST = """\
from toolkit.testing import check_activation


def test_{name}_is_what_it_says() -> None:
    check_activation("{name}")
"""

README = """\
# {name}

An activation for deepfake-toolkit, declared in `{module}.py`.

```
pip install -e ".[test]"
toolkit plugins show {name}       # formula, parameters, properties
toolkit plugins check {name}      # is it what it says
pytest
```

In a config:

```yaml
activations:
  generator:
    "*": {name}(a=1.5, learn=a)
    output: tanh
```
"""


def make_plugin(name: str, folder: Path) -> list[Path]:
    """Write a small distribution with one activation called ``name``.

    Args:
        name: of the plugin and its activation, an identifier in lower case.
        folder: where it is written; it must not exist, or be empty.

    Returns:
        The files written.

    Raises:
        UserError: the name is no identifier, or is taken, or the folder holds something.
    """
    from toolkit.activations.registry import registry

    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise UserError(f"{name!r} cannot be a plugin's name: it has to be an identifier in lower case, such as my_act")
    if name in registry().names() or name in registry().providers:
        raise UserError(f"there is an activation or a plugin {name!r} already; choose another name")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already, and nothing in it is overwritten; choose another folder with --out")
    words = {"name": name, "module": f"toolkit_{name}", "distribution": f"deepfake-toolkit-{name.strip('_').replace('_', '-')}"}
    files = {
        "pyproject.toml": PYPROJECT,
        f"{words['module']}.py": MODULE,
        f"tests/test_{name}.py": TEST,
        "README.md": README,
    }
    written = []
    for file, text in files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text.format(**words))
        written.append(path)
    return written
