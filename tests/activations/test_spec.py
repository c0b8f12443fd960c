"""The string form of an activation."""

from __future__ import annotations

import keyword

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit import ActivationSpec, UserError

WORDS = ("learn", "per_channel", "name", "true", "false", "none", "inf", *keyword.kwlist)
NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True).filter(lambda name: name not in WORDS)


@pytest.mark.parametrize(
    "text",
    [
        "relu",
        "leaky_relu(negative_slope=0.2)",
        "triton/swish(beta=1.5, learn=beta)",
        "gelu(approximate=tanh)",
        "prelu(learn=none)",
        "swish(beta=1.5, learn=beta, per_channel=true)",
        "f(a=-1e-05, learn=[a, b])",
        "my-plugin.x/f(a=3)",
    ],
)
def test_parses_and_prints_back_unchanged(text: str) -> None:
    assert str(ActivationSpec.parse(text)) == text


@given(
    name=NAMES,
    provider=st.none() | NAMES,
    values=st.dictionaries(NAMES, st.floats(allow_nan=False, allow_infinity=False) | NAMES, max_size=3),
    learn=st.none() | st.lists(NAMES, max_size=2, unique=True),
    per_channel=st.booleans(),
)
def test_any_spec_round_trips(name: str, provider: str | None, values: dict, learn: list | None, per_channel: bool) -> None:
    spec = ActivationSpec(name, provider, tuple(values.items()), None if learn is None else tuple(learn), per_channel)
    assert ActivationSpec.parse(str(spec)) == spec


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused_with_a_message(text: str) -> None:
    try:
        spec = ActivationSpec.parse(text)
    except UserError:
        return  # any other exception fails the test
    assert ActivationSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    "value",
    [
        "",
        "a b",
        "f(1)",
        "f(a=1",
        "f(a=1, a=2)",
        "f(**x)",
        "f(a=[1])",
        "a/b/c",
        "f(a=__import__('os'))",
        3,
        None,
        {},
        {"beta": 1},
    ],
)
def test_nonsense_is_refused(value: object) -> None:
    with pytest.raises(UserError):
        ActivationSpec.parse(value)


def test_mapping_form_means_the_same() -> None:
    assert ActivationSpec.parse({"name": "swish", "beta": 1.5, "learn": "beta"}) == ActivationSpec.parse("swish(beta=1.5, learn=beta)")
    assert ActivationSpec.parse({"name": "triton/swish", "beta": 1.5}) == ActivationSpec.parse("triton/swish(beta=1.5)")
