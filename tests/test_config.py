from __future__ import annotations

import dataclasses
import logging

import pytest

from hfblend import BlendConfig


def test_defaults_are_the_documented_ones():
    config = BlendConfig()
    assert (config.check_layers, config.recompute_ratios, config.separator) == ((1,), (0.15,), " # # ")
    assert (config.deviation, config.min_reused_tokens, config.chunk_prefix) == ("value", 256, "prompt")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.deviation = "key"
    with pytest.raises(TypeError):
        BlendConfig(False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"recompute_ratios": (1.2,)}, r"\[0, 1\]"),
        ({"recompute_ratios": (-0.1,)}, r"\[0, 1\]"),
        ({"recompute_ratios": (float("nan"),)}, r"\[0, 1\]"),
        ({"check_layers": (0,)}, "layer 0"),
        ({"check_layers": (2, 1), "recompute_ratios": (0.2, 0.1)}, "rise"),
        ({"check_layers": (1, 2), "recompute_ratios": (0.1, 0.2)}, "not rise"),
        ({"check_layers": (1, 2)}, "one entry each"),
        ({"deviation": "keys"}, "one of"),
        ({"chunk_prefix": "page"}, "one of"),
        ({"selection": "largest"}, "one of"),
        ({"score_layers": ()}, "one or more"),
        ({"score_layers": (-1,)}, "0 or more"),
        ({"check_layers": (1, 2), "recompute_ratios": (0.2, 0.1)}, 'write selection="kv_deviation"'),
        ({"on_miss": "skip"}, "one of"),
        ({"min_reused_tokens": -1}, "0 or more"),
        ({"separator": "  "}, "visible text"),
        ({"separator": ()}, "token ids"),
        ({"separator": (-1,)}, "separator must be 0 or more"),
    ],
)
def test_values_out_of_bounds_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        BlendConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"recompute_ratios": 0.15}, r"write \(0.15,\)"),
        ({"check_layers": 1}, "tuple"),
        ({"check_layers": (1.0,)}, "check_layers must be a whole number"),
        ({"min_reused_tokens": 1.5}, "whole number"),
        ({"enabled": "yes"}, "True or False"),
        ({"namespace": None}, "text"),
    ],
)
def test_values_of_another_type_are_refused(settings, words):
    with pytest.raises(TypeError, match=words):
        BlendConfig(**settings)


def test_from_env_reads_lmcache_names(caplog):
    environ = {
        "LMCACHE_ENABLE_BLENDING": "False",
        "LMCACHE_BLEND_SPECIAL_STR": " ## ",
        "LMCACHE_USE_LAYERWISE": "true",
        "LMCACHE_BLEND_CHECK_LAYERS": "1,8",
        "LMCACHE_BLEND_RECOMPUTE_RATIOS": "0.3, 0.1",
        "LMCACHE_BLEND_THRESHOLDS": "0.5",
        "LMCACHE_BLEND_MIN_TOKENS": "64",
        "LMCACHE_EXTRA_CONFIG": '{"enable_sparse": true}',
    }
    with caplog.at_level(logging.INFO, "hfblend"):
        config = BlendConfig.from_env(environ)
    assert config == BlendConfig(
        enabled=False,
        separator=" ## ",
        selection="kv_deviation",
        check_layers=(1, 8),
        recompute_ratios=(0.3, 0.1),
        min_reused_tokens=64,
    )
    assert "THRESHOLDS is accepted and not used" in caplog.text
    assert "enable_sparse" in caplog.text


def test_from_env_prefers_our_names_and_fills_in_ratios():
    config = BlendConfig.from_env({"HFBLEND_CHECK_LAYERS": "1, 4", "LMCACHE_BLEND_CHECK_LAYERS": "2"})
    assert (config.check_layers, config.recompute_ratios) == ((1, 4), (0.15, 0.15))
    config = BlendConfig.from_env({"HFBLEND_DEVIATION": "key", "HFBLEND_NAMESPACE": "a", "HFBLEND_LAYERWISE": "0"})
    assert (config.deviation, config.namespace, config.layerwise) == ("key", "a", False)
    assert BlendConfig.from_env({}) == BlendConfig()


@pytest.mark.parametrize(
    "environ",
    [{"LMCACHE_BLEND_MIN_TOKENS": "many"}, {"HFBLEND_ENABLED": "perhaps"}, {"LMCACHE_EXTRA_CONFIG": "{"}],
)
def test_from_env_names_the_variable_that_cannot_be_read(environ):
    with pytest.raises(ValueError, match=next(iter(environ))):
        BlendConfig.from_env(environ)


def test_recomputes_all_only_at_ratio_1_everywhere():
    assert BlendConfig(recompute_ratios=(1.0,)).recomputes_all
    assert not BlendConfig(selection="kv_deviation", check_layers=(1, 2), recompute_ratios=(1.0, 0.5)).recomputes_all
    assert not BlendConfig(check_layers=(), recompute_ratios=()).recomputes_all
