"""Deepfake toolkit: GAN training and deepfake detection with pluggable activations, chosen per layer.

The public API is what this module exports; names are imported on first use, so ``import toolkit`` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.activations.assign import apply_rules, find_sites
    from toolkit.activations.declare import Activation, Parameter
    from toolkit.activations.registry import Registry, registry
    from toolkit.activations.spec import ActivationSpec
    from toolkit.data.faces import Face
    from toolkit.data.layouts import Listing, VideoItem
    from toolkit.data.manifest import Manifest
    from toolkit.errors import UserError
    from toolkit.hookspecs import hookimpl
    from toolkit.metrics.measure import ClipSet, Measure
    from toolkit.study.table import results_table

_EXPORTS = {
    "Activation": "toolkit.activations.declare",
    "ActivationSpec": "toolkit.activations.spec",
    "ClipSet": "toolkit.metrics.measure",
    "Face": "toolkit.data.faces",
    "Listing": "toolkit.data.layouts",
    "Manifest": "toolkit.data.manifest",
    "Measure": "toolkit.metrics.measure",
    "Parameter": "toolkit.activations.declare",
    "Registry": "toolkit.activations.registry",
    "UserError": "toolkit.errors",
    "VideoItem": "toolkit.data.layouts",
    "apply_rules": "toolkit.activations.assign",
    "find_sites": "toolkit.activations.assign",
    "hookimpl": "toolkit.hookspecs",
    "registry": "toolkit.activations.registry",
    "results_table": "toolkit.study.table",
}

__all__ = [
    "Activation",
    "ActivationSpec",
    "ClipSet",
    "Face",
    "Listing",
    "Manifest",
    "Measure",
    "Parameter",
    "Registry",
    "UserError",
    "VideoItem",
    "apply_rules",
    "find_sites",
    "hookimpl",
    "registry",
    "results_table",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
