"""The paper's observations: the measurements, by hand where that can be done, and the figures."""

from __future__ import annotations

import pytest
import torch
from helpers import config, full_prefill_kv, make_llama, make_mistral, make_prompt, store_of_true_kv

import hfblend
from hfblend.lab import insights
from hfblend.support.registry import model_of

pytestmark = pytest.mark.usefixtures("remembered_proofs")

PROMPT = make_prompt()


# --- deviation of KV --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_llama, make_mistral])
def test_true_kv_moved_back_deviates_nowhere(make):
    model = make()
    found = insights.deviation_by_layer(model, PROMPT, store=store_of_true_kv(model, PROMPT), config=config())
    assert found.value.shape == found.key.shape == (4, 64 + 9)  # the prefix too was moved away
    assert found.value.max() < 1e-8
    assert found.key.max() < 1e-6


def test_the_deviation_is_that_of_isolated_chunk_kv():
    """A chunk's values, prefilled alone after the prefix, against full prefill's rows."""
    model = make_llama()
    found = insights.deviation_by_layer(model, PROMPT, config=config())
    full, (start, stop) = full_prefill_kv(model, PROMPT.input_ids), PROMPT.chunk_spans[1]
    alone = hfblend.prefill_chunk(model, PROMPT.chunk_ids[1], PROMPT.prefix_ids)
    rows = (found.token_idx >= start) & (found.token_idx < stop)
    for layer in range(4):
        by_hand = (full[layer][1][:, :, start:stop] - alone.layer(layer)[1]).square().sum((0, 1, 3))
        torch.testing.assert_close(found.value[layer, rows], by_hand, rtol=1e-3, atol=1e-9)
    assert found.value[0].max() < 1e-9 < 1e-3 < found.value[1:].max()
    assert found.key[0].max() < 1e-6  # realigned: at layer 0 a key depends on the token and its position alone
    assert found.token_idx.tolist() == [i for span in PROMPT.chunk_spans[1:] for i in range(*span)]  # one is exact


def test_a_prompt_in_which_nothing_moved_is_refused():
    prompt = make_prompt((20,), separator=())
    with pytest.raises(ValueError, match="reused from elsewhere"):
        insights.deviation_by_layer(make_llama(), prompt, config=config())


def test_a_prompt_that_ends_in_a_chunk_counts_all_tokens_but_the_last():
    prompt = make_prompt((20, 12), suffix=0, separator=())
    found = insights.deviation_by_layer(make_llama(), prompt, config=config())
    assert found.token_idx.tolist() == list(range(27, 38))
    assert found.value.shape == (4, 11)
    assert insights.attention_deviation(make_llama(), prompt, (0.0,), config=config()).shape == (1, 4)


def test_share_of_deviation_by_hand():
    deviation = torch.tensor([[1.0, 6.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert insights.share_of_deviation(deviation, 0.5).tolist() == pytest.approx([0.8, 0.5])
    assert insights.share_of_deviation(deviation, 1.0).tolist() == [1.0, 1.0]
    assert insights.share_of_deviation(deviation, 0.0).tolist() == [0.0, 0.0]


# --- rank correlation -------------------------------------------------------------------------------------------------


def test_ranks_share_their_mean_where_scores_are_equal():
    assert insights.ranks(torch.tensor([3.0, 1.0, 3.0, 3.0, 0.5])).tolist() == [4, 2, 4, 4, 1]


def test_rank_correlation_by_hand():
    # ranks 1 2 3 4 | 2 1 4 3 : ρ = 1 − 6·Σd²/(n(n²−1)) = 1 − 6·4/60
    deviation = torch.tensor([[0.1, 0.2, 0.3, 9.0], [5.0, 4.0, 7.0, 6.0], [-5.0, -4.0, -7.0, -6.0]])
    assert insights.rank_correlation(deviation).tolist() == pytest.approx([0.6, -1.0])


def test_rank_correlation_with_ties_by_hand():
    # ranks 1.5 1.5 3 | 1 2 3 : covariance 1.5, variances 1.5 and 2
    deviation = torch.tensor([[1.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    assert insights.rank_correlation(deviation).item() == pytest.approx(1.5 / (1.5 * 2) ** 0.5)


def test_the_matrix_is_symmetric_has_ones_and_the_neighbours_beside_them():
    deviation = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).exp()
    matrix = insights.rank_correlation_matrix(deviation)
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(5))
    assert torch.equal(matrix.diagonal(1), insights.rank_correlation(deviation))
    torch.testing.assert_close(insights.rank_correlation_matrix(deviation.log()), matrix)  # ranks alone count


def test_a_layer_of_equal_scores_has_no_correlation():
    assert insights.rank_correlation(torch.tensor([[1.0, 1.0], [1.0, 2.0]])).isnan().all()


# --- deviation of attention -------------------------------------------------------------------------------------------


def eager_suffix_attention(prompt, cache=None):
    """The suffix's attention (L, H, S, T) as stock eager attention of the same weights shows it."""
    model = make_llama()
    model.set_attn_implementation("eager")
    start = prompt.chunk_spans[-1][1]
    if cache is not None:
        cache.crop(start - cache.get_seq_length())
    ids = prompt.input_ids if cache is None else prompt.input_ids[:, start:]
    with torch.no_grad():
        attentions = model(ids, past_key_values=cache, output_attentions=True).attentions
    return torch.stack([layer[0, :, -(len(prompt) - start) :] for layer in attentions])


def test_it_is_what_eager_attention_shows():
    model, store = make_llama(), hfblend.MemoryStore()
    found = insights.attention_deviation(model, PROMPT, (0.0, 0.3), store=store, config=config())
    for row, ratio in zip(found, (0.0, 0.3)):
        result = hfblend.blend(model, PROMPT, store=store, config=config(ratio))
        blended, full = eager_suffix_attention(PROMPT, result.cache), eager_suffix_attention(PROMPT)
        torch.testing.assert_close(row, (blended - full).norm(dim=-1).mean((1, 2)), rtol=1e-3, atol=1e-6)
    assert found[0, 1:].min() > 1e-3


@pytest.mark.parametrize("make", [make_llama, make_mistral])
def test_it_is_nothing_at_ratio_1_and_with_true_kv(make):
    model = make()
    found = insights.attention_deviation(model, PROMPT, (0.1, 1.0), config=config())
    assert found.shape == (2, 4)
    assert found[1].max() < 1e-5 < found[0].max()
    true_kv = store_of_true_kv(model, PROMPT)
    assert insights.attention_deviation(model, PROMPT, (0.1,), store=true_kv, config=config()).max() < 1e-5


def test_nothing_is_left_behind_and_a_patched_model_will_do():
    model = make_llama()
    free = insights.attention_deviation(model, PROMPT, (0.1,), config=config())
    with hfblend.patch(model, config=config()):
        patched = insights.attention_deviation(model, PROMPT, (0.1,), config=config())
        insights.deviation_by_layer(model, PROMPT, config=config())
    torch.testing.assert_close(patched, free)
    assert model.config._attn_implementation == "sdpa"


def test_what_cannot_be_measured_is_refused(monkeypatch):
    model = make_llama()
    with pytest.raises(ValueError, match="chunks"):
        insights.attention_deviation(model, hfblend.Prompt(PROMPT.input_ids, ()), (0.1,))
    monkeypatch.setattr(model_of(model), "attends_by_position", False)
    with pytest.raises(ValueError, match="cannot be recorded"):
        insights.attention_deviation(model, PROMPT, (0.1,), config=config())


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_figure_of_deviation_draws_the_cumulated_share(tmp_path):
    pytest.importorskip("matplotlib")
    deviation = torch.tensor([[1.0, 1.0, 1.0, 1.0], [6.0, 1.0, 2.0, 1.0]])
    figure = insights.figure_of_deviation(deviation, layers=(1,))
    left, right = figure.axes
    assert left.lines[0].get_ydata().tolist() == pytest.approx([2.4, 0.8, 0.4, 0.4])
    assert right.lines[0].get_ydata().tolist() == pytest.approx([60, 80, 90, 100])
    figure.savefig(tmp_path / "deviation.png")
    assert len(insights.figure_of_deviation(torch.rand(12, 9)).axes[0].lines) == 4


def test_figure_of_rank_correlation_shows_the_matrix(tmp_path):
    pytest.importorskip("matplotlib")
    matrix = torch.tensor([[1.0, -0.2], [-0.2, 1.0]])
    figure = insights.figure_of_rank_correlation(matrix)
    image = figure.axes[0].images[0]
    assert torch.equal(torch.tensor(image.get_array().data), matrix)
    assert image.get_clim() == pytest.approx((-0.2, 1.0))
    figure.savefig(tmp_path / "rank.png")


def test_figure_of_attention_deviation_has_a_line_per_setting(tmp_path):
    pytest.importorskip("matplotlib")
    both = {"one": torch.tensor([[2.0, 4.0], [0.0, 1.0]]), "other": torch.tensor([[1.0, 1.0], [0.0, 0.0]])}
    figure = insights.figure_of_attention_deviation((0.0, 1.0), both)
    lines = figure.axes[0].lines
    assert [line.get_label() for line in lines] == ["one", "other"]
    assert lines[0].get_ydata().tolist() == [3.0, 0.5]
    assert lines[0].get_xdata().tolist() == [0.0, 100.0]
    figure.savefig(tmp_path / "attention.png")
