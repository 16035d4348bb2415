"""Scheme and Rule: legal values, fitting to a weight, and what a rule matches."""

import pytest

import gptq_fx
from gptq_fx import ConfigError, Rule, Scheme
from gptq_fx.scheme import KINDS


@pytest.mark.parametrize("bits", [5, 0, -4, 16, True, 4.0, "4", None])
def test_bits_that_are_not_legal(bits):
    with pytest.raises(ConfigError, match=rf"bits={bits!r}\. Legal: 2, 3, 4, 8"):
        Scheme(bits=bits)


@pytest.mark.parametrize("size", [0, -2, 12, 4, 64.0, "64", True, None])
def test_group_sizes_that_are_not_legal(size):
    with pytest.raises(ConfigError, match=rf"group_size={size!r}\. Legal: -1, or a positive multiple of 8"):
        Scheme(group_size=size)


@pytest.mark.parametrize("field", ["sym", "desc_act"])
@pytest.mark.parametrize("value", [1, "yes", None])
def test_flags_that_are_not_legal(field, value):
    with pytest.raises(ConfigError, match=rf"{field}={value!r}\. Legal: True, False"):
        Scheme(**{field: value})


@pytest.mark.parametrize("size", [-1, 8, 40, 1024])
def test_group_sizes_that_are_legal(size):
    assert Scheme(group_size=size).group_size == size


@pytest.mark.parametrize(
    ("asked", "in_features", "fitted"),
    [
        (128, 256, 128),
        (128, 192, 64),
        (128, 96, 32),
        (128, 72, -1),
        (256, 384, 128),
        (64, 96, 32),
        (32, 48, -1),
        (48, 64, 32),
        (48, 96, 48),
        (-1, 77, -1),
        (8, 128, 8),
        (24, 128, -1),
        (1024, 128, 128),
    ],
)
def test_fitted_takes_the_largest_group_that_divides_and_is_not_above_the_request(asked, in_features, fitted):
    scheme, reason = Scheme(3, asked, sym=False, desc_act=True).fitted(in_features)
    assert scheme == Scheme(3, fitted, sym=False, desc_act=True)
    if fitted == asked:
        assert reason == ""
    else:
        assert reason == f"group_size {fitted} in place of {asked}, which does not divide {in_features}"


def test_str_says_all():
    assert str(Scheme()) == "W4A16 g128 sym"
    assert str(Scheme(3, -1, sym=False, desc_act=True)) == "W3A16 channel asym desc_act"


def test_presets_are_public():
    assert [str(scheme) for scheme in (gptq_fx.W4A16, gptq_fx.W8A16)] == ["W4A16 g128 sym", "W8A16 g128 sym"]


def test_a_scheme_is_a_value():
    assert {Scheme(): 1}[Scheme(4, 128, True, False)] == 1
    with pytest.raises(AttributeError):
        Scheme().bits = 8


@pytest.mark.parametrize("pattern", ["(", "[a", "*", None, 3])
def test_a_malformed_pattern_is_named(pattern):
    with pytest.raises(ConfigError) as error:
        Rule(pattern)
    assert str(error.value).startswith(f"rule pattern {pattern!r} is no regular expression: ")


def test_an_unknown_kind_names_the_legal_ones_and_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown rule kind 'expert'\. Did you mean 'experts'\?") as error:
        Rule(kind="expert")
    assert all(kind in str(error.value) for kind in KINDS)


def test_a_scheme_must_be_a_scheme():
    with pytest.raises(ConfigError, match=r"rule scheme 4\. Legal: a gptq_fx.Scheme, or None"):
        Rule(scheme=4)


def test_patterns_are_anchored_at_the_start_only():
    rule = Rule(r"model\.layers")
    assert rule.matches("model.layers.0.up", "linear")
    assert not rule.matches("vision.model.layers.0.up", "linear")


def test_an_empty_pattern_matches_every_path_of_its_kind():
    rule = Rule(kind="experts")
    assert rule.matches("layers.0.mlp.experts", "experts")
    assert not rule.matches("layers.0.mlp.up", "linear")


@pytest.mark.parametrize(("name", "kind"), [("lm_head", "lm_head"), ("layers.0.mlp.gate", "router")])
def test_lm_head_and_router_are_reached_by_name_or_kind_only(name, kind):
    assert not Rule("").matches(name, kind)
    assert not Rule(".*").matches(name, kind)
    assert Rule("", kind=kind).matches(name, kind)
    assert Rule(rf".*{name.rpartition('.')[2]}$").matches(name, kind)
    assert Rule(".*", scheme=None).matches(name, kind)  # what leaves dense may reach them


def test_str_of_a_rule():
    assert str(Rule("up", "linear")) == "'up' (linear) -> W4A16 g128 sym"
    assert str(Rule("up", scheme=None)) == "'up' -> leave dense"
