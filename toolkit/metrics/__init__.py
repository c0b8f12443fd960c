"""Measures of images, video and detection. What a study reports is the list of :class:`Measure` from the plugins' hooks."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.metrics.features import FeatureSpace, feature_space, random_space
from toolkit.metrics.measure import ClipSet, Measure, estimate, figures

__all__ = ["ClipSet", "FeatureSpace", "Measure", "all_measures", "estimate", "feature_space", "figures"]


def all_measures(spaces: Sequence[FeatureSpace] | None = None) -> list[Measure]:
    """The measures of all plugins, those of features once for each of ``spaces`` (the fixed random one by default).

    The first to claim a name keeps it; another plugin's measure of that name is called ``plugin/name``.
    """
    import dataclasses

    from toolkit.plugins import plugins, wrong_list

    loaded = plugins()
    found: dict[str, Measure] = {}
    owner: dict[str, str] = {}
    for plugin, measures in loaded.results("toolkit_metrics"):
        if wrong := wrong_list("toolkit_metrics", Measure, measures):
            loaded.mark_broken(plugin, wrong)
            continue
        measures = [dataclasses.replace(m, name=loaded.own_name(plugin, m.name, owner)) for m in measures]
        for measure in measures:
            for one in [measure.within(s) for s in spaces or [random_space()]] if measure.in_spaces else [measure]:
                found.setdefault(one.name, one)
        if plugin in loaded.infos:
            loaded.infos[plugin].provides["toolkit_metrics"] = [m.name for m in measures]
    return list(found.values())
