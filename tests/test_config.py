"""GPTQConfig: the ecosystem's names become one ordered list of rules."""

import json

import pytest

import gptq_fx
from gptq_fx import ConfigError, GPTQConfig, Rule, Scheme


def scheme_of(config, name, kind="linear"):
    rule = config.rule_for(name, kind)
    return rule.scheme if rule else None


def test_the_defaults_are_the_ecosystems():
    config = GPTQConfig()
    assert (config.bits, config.group_size, config.sym, config.desc_act) == (4, 128, True, False)
    assert (config.damp_percent, config.mse, config.act_group_aware) == (0.05, 0.0, True)
    assert config.to_dict() == {}


def test_without_rules_linears_and_experts_get_the_default_scheme():
    config = GPTQConfig(bits=3, group_size=64, sym=False, desc_act=True)
    for kind in ("linear", "grouped_linear", "experts"):
        assert scheme_of(config, "a.b", kind) == Scheme(3, 64, sym=False, desc_act=True)
    assert scheme_of(config, "gate", "router") is None
    assert scheme_of(config, "lm_head", "lm_head") is None
    assert config.rule_for("wte", "embedding") is None


@pytest.mark.parametrize("prefix", ["+:", ""])
def test_dynamic_overrides(prefix):
    config = GPTQConfig(group_size=64, dynamic={prefix + r".*\.up$": {"bits": 8, "sym": False}})
    assert scheme_of(config, "layers.0.up") == Scheme(8, 64, sym=False)
    assert scheme_of(config, "layers.0.upper") == Scheme(4, 64)


def test_dynamic_minus_skips():
    config = GPTQConfig(dynamic={r"-:.*down": {}})
    assert config.rule_for("layers.0.down", "linear").scheme is None
    assert scheme_of(config, "layers.0.up") == Scheme()


def test_dynamic_is_anchored_at_the_start_only():
    config = GPTQConfig(dynamic={r"-:layers\.1": {}})
    assert scheme_of(config, "layers.1.up") is None
    assert scheme_of(config, "layers.10.up") is None
    assert scheme_of(config, "model.layers.1.up") == Scheme()


def test_the_first_match_of_dynamic_wins():
    both = {r"-:.*\.0\.": {}, r".*up": {"bits": 8}}
    assert scheme_of(GPTQConfig(dynamic=both), "layers.0.up") is None
    swapped = dict(reversed(both.items()))
    assert scheme_of(GPTQConfig(dynamic=swapped), "layers.0.up") == Scheme(8)


def test_dynamic_comes_before_rules_and_rules_before_the_defaults():
    rules = [Rule(".*up", None, Scheme(2)), Rule("", "linear", Scheme(3))]
    config = GPTQConfig(dynamic={r"a\.": {"bits": 8}}, rules=rules)
    assert scheme_of(config, "a.up") == Scheme(8)
    assert scheme_of(config, "b.up") == Scheme(2)
    assert scheme_of(config, "b.down") == Scheme(3)
    assert scheme_of(config, "b.experts", "experts") == Scheme(4)
    assert config.user_rules == (Rule(r"a\.", None, Scheme(8)), *rules)


def test_rules_take_presets_and_kinds():
    config = GPTQConfig(rules=[Rule(kind="experts", scheme=gptq_fx.W8A16), Rule(kind="linear", scheme=None)])
    assert scheme_of(config, "x", "experts") == gptq_fx.W8A16
    assert scheme_of(config, "x", "linear") is None


@pytest.mark.parametrize(("name", "kind"), [("lm_head", "lm_head"), ("layers.0.mlp.gate", "router")])
def test_lm_head_and_router_are_reached_by_name_or_kind_only(name, kind):
    assert scheme_of(GPTQConfig(dynamic={".*": {"bits": 8}}), name, kind) is None
    leaf = name.rpartition(".")[2]
    assert scheme_of(GPTQConfig(dynamic={f".*{leaf}": {"bits": 8}}), name, kind) == Scheme(8)
    assert scheme_of(GPTQConfig(rules=[Rule(kind=kind, scheme=gptq_fx.W8A16)]), name, kind) == gptq_fx.W8A16


def test_lm_head_true_gives_it_the_default_scheme():
    config = GPTQConfig(bits=8, lm_head=True)
    assert scheme_of(config, "lm_head", "lm_head") == Scheme(8)
    assert scheme_of(config, "gate", "router") is None


def test_by_path_tells_whether_a_path_decides():
    assert not GPTQConfig(bits=8, lm_head=True).by_path
    assert not GPTQConfig(rules=[Rule(kind="experts", scheme=None)]).by_path
    assert GPTQConfig(rules=[Rule("up")]).by_path
    assert GPTQConfig(dynamic={"-:up": {}}).by_path


def test_to_dict_is_the_difference_to_the_defaults_as_plain_data():
    dynamic = {"-:up": {}, "down": {"bits": 8}}
    config = GPTQConfig(bits=3, dynamic=dynamic, rules=[Rule("a", "linear", Scheme(2, -1))])
    plain = config.to_dict()
    assert plain == {
        "bits": 3,
        "dynamic": dynamic,
        "rules": [
            {
                "pattern": "a",
                "kind": "linear",
                "scheme": {"bits": 2, "group_size": -1, "sym": True, "desc_act": False},
            }
        ],
    }
    assert json.loads(json.dumps(plain)) == plain


@pytest.mark.parametrize(
    ("given", "found", "legal"),
    [
        ({"bits": 5}, "bits=5", "2, 3, 4, 8"),
        ({"group_size": 0}, "group_size=0", "-1, or a positive multiple of 8"),
        ({"group_size": -2}, "group_size=-2", "-1, or a positive multiple of 8"),
        ({"group_size": 12}, "group_size=12", "-1, or a positive multiple of 8"),
        ({"sym": "yes"}, "sym='yes'", "True, False"),
        ({"desc_act": 1}, "desc_act=1", "True, False"),
        ({"act_group_aware": None}, "act_group_aware=None", "True, False"),
        ({"static_groups": 0}, "static_groups=0", "True, False"),
        ({"lm_head": "tied"}, "lm_head='tied'", "True, False"),
        ({"sequential": 2}, "sequential=2", "True, False"),
        ({"damp_percent": 0}, "damp_percent=0", "between 0 and 1"),
        ({"damp_percent": 1.5}, "damp_percent=1.5", "between 0 and 1"),
        ({"damp_percent": "0.1"}, "damp_percent='0.1'", "between 0 and 1"),
        ({"mse": -1}, "mse=-1", "0 (off) or a positive exponent"),
        ({"mse": None}, "mse=None", "0 (off) or a positive exponent"),
        ({"dynamic": [".*up"]}, "dynamic=['.*up']", "a dict of regex -> overrides, or None"),
        ({"dynamic": {"up": 8}}, "dynamic['up']=8", "a dict of overrides"),
        ({"dynamic": {"up": {"bits": 5}}}, "bits=5", "2, 3, 4, 8"),
        ({"dynamic": {"up": {"group_size": 12}}}, "group_size=12", "-1, or a positive multiple of 8"),
        ({"dynamic": {"+:(up": {}}}, "'(up'", "regular expression"),
        ({"dynamic": {"-:(up": {}}}, "'(up'", "regular expression"),
        ({"rules": ["up"]}, "rules holds 'up'", "gptq_fx.Rule"),
        ({"rules": Rule("up")}, "Rule(pattern='up'", "gptq_fx.Rule"),
    ],
    ids=str,
)
def test_a_bad_value_is_named_with_what_is_legal(given, found, legal):
    with pytest.raises(ConfigError) as error:
        GPTQConfig(**given)
    assert found in str(error.value)
    assert legal in str(error.value)


def test_an_unknown_override_names_its_key_the_legal_ones_and_the_nearest():
    with pytest.raises(ConfigError) as error:
        GPTQConfig(dynamic={"+:up": {"groupsize": 64}})
    message = str(error.value)
    assert "dynamic['+:up']" in message
    assert "'groupsize'. Did you mean 'group_size'?" in message
    assert "Legal: bits, desc_act, group_size, sym" in message
