"""Sampling per request in the engine: the maths of the sampler, and equal tokens whichever requests run together."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers import config, make_llama, make_prompt

import hfblend
from hfblend.store import MemoryStore

pytest.importorskip("hfblend.serving", reason="serving needs Transformers 5.23 or later", exc_type=ImportError)

from transformers import GenerationConfig, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.continuous_batching import input_outputs, model_runner, requests
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

from hfblend.serving import sampling as module
from hfblend.serving.engine import Engine
from hfblend.serving.sampling import Sampler, Sampling, Step, _Graphs, as_rows, gumbel, hashed, noise, perturbed

PAGE = 16
ROOMY = {"page_size": PAGE, "num_blocks": 128, "max_batch_tokens": 256}
PROMPT = make_prompt()
PROMPTS = [make_prompt(seed=seed) for seed in range(3)]

pytestmark = pytest.mark.usefixtures("remembered_proofs")


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, r"temperature must be a number from 0 \(greedy\) to 1000, got -0\.1"),
        ({"temperature": math.nan}, "temperature must be .*, got nan"),
        ({"temperature": math.inf}, "temperature must be .*, got inf"),
        ({"temperature": "hot"}, "temperature must be .*, got 'hot'"),
        ({"temperature": True}, "temperature must be .*, got True"),
        ({"top_p": 1.01}, r"top_p must be a number from 0 to 1 \(all tokens\), got 1\.01"),
        ({"top_p": -1}, "top_p must be .*, got -1"),
        ({"top_k": -1}, r"top_k must be an integer from 0 \(all tokens\) up, got -1"),
        ({"top_k": 2.5}, r"top_k must be .*, got 2\.5"),
        ({"top_k": 2**31}, "top_k must be .*, got 2147483648"),
        ({"seed": 2**64}, "seed must be an integer of 64 bits, got 18446744073709551616"),
        ({"seed": 0.5}, r"seed must be .*, got 0\.5"),
    ],
)
def test_settings_out_of_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_settings_are_those_of_the_generation_config():
    sampled = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, top_k=20)
    read = Sampling.of(sampled)
    assert (read.temperature, read.top_p, read.top_k) == (0.6, 0.9, 20)
    greedy = Sampling.of(GenerationConfig(do_sample=False, top_k=20))
    assert (greedy.temperature, greedy.top_p, greedy.top_k) == (0.0, 1.0, 20)
    plain = Sampling.of(GenerationConfig(do_sample=True))
    assert (plain.temperature, plain.top_p, plain.top_k) == (1.0, 1.0, 0)
    assert Sampling.of(GenerationConfig()).temperature == 0


def test_a_request_changes_what_it_names_and_has_a_new_seed():
    default = Sampling(0.6, 0.9, 20)
    changed = default.but(temperature=1.0, top_p=None, top_k=0, seed=None)
    assert (changed.temperature, changed.top_p, changed.top_k) == (1.0, 0.9, 0)
    assert len({default.seed, changed.seed, default.but().seed}) == 3
    assert default.but(seed=-5).seed == -5


def test_settings_that_are_not_applied_are_named(caplog):
    Sampling.of(GenerationConfig(do_sample=True, min_p=0.1, typical_p=0.9))
    assert "min_p, typical_p are not applied" in caplog.text
    caplog.clear()
    Sampling.of(GenerationConfig(do_sample=True, typical_p=1.0, epsilon_cutoff=0.0))
    assert not caplog.text


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ({}, Step.GREEDY),
        ({"temperature": 0.5, "top_k": 1}, Step.GREEDY),
        ({"temperature": 0.5}, Step.DRAW),
        ({"temperature": 0.5, "top_k": 50, "top_p": 0.5}, Step.TOP),
        ({"temperature": 0.5, "top_k": 2000}, Step.SORT),
        ({"temperature": 0.5, "top_p": 0.5}, Step.SORT),
    ],
)
def test_a_step_does_what_its_settings_ask_for(settings, step):
    assert Sampling(**settings).step is step


# --- noise ------------------------------------------------------------------------------------------------------------


def rows_of(*drawn):
    return as_rows([sampling.packed(position) for sampling, position in drawn])


def noise_of(*keys, count):
    """Noise (R, V) of pairs of seed and position."""
    rows = rows_of(*((Sampling(1.0, seed=seed), position) for seed, position in keys))
    return noise(rows[3].unsqueeze(-1), rows[4].unsqueeze(-1), count)


def uniform_of(*keys, count):
    return (-(-noise_of(*keys, count=count).double()).exp()).exp()


def deviations(observed, expected):
    """How many standard deviations a chi-square statistic is from its mean, by Wilson and Hilferty."""
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    freedom = observed.numel() - 1
    return ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


def counts_of(uniform, bins):
    return torch.histc(uniform.flatten(), bins, 0, 1)


def test_the_largest_and_the_smallest_noise_are_finite():
    bits = torch.tensor([0, 1, 2**31 - 1, 2**31 - 64, -1, -(2**31)], dtype=torch.int32)
    drawn = gumbel(bits)
    assert drawn.isfinite().all()
    assert (drawn.min(), drawn.max()) == (pytest.approx(-2.812, abs=1e-3), pytest.approx(22.18, abs=1e-2))


def test_noise_is_uniform_before_it_is_gumbel():
    keys = [(seed, position) for seed in range(20) for position in range(20)]
    uniform = uniform_of(*keys, count=5000)
    observed = counts_of(uniform, 1000)
    assert abs(deviations(observed, torch.full_like(observed, uniform.numel() / 1000))) < 4


@pytest.mark.parametrize("neighbour", ["seed", "position", "id"])
def test_noise_of_neighbours_is_independent(neighbour):
    """Pairs fill a square of 32 × 32 fields evenly."""
    keys = [(seed, position) for seed in range(0, 40, 2) for position in range(0, 20, 2)]
    first = uniform_of(*keys, count=5001)
    step = {"seed": (1, 0), "position": (0, 1), "id": (0, 0)}[neighbour]
    second = uniform_of(*((seed + step[0], position + step[1]) for seed, position in keys), count=5001)
    if neighbour == "id":
        first, second = first[:, :-1], second[:, 1:]
    fields = (first * 32).floor() * 32 + (second * 32).floor()
    observed = fields.long().flatten().bincount(minlength=1024).double()
    assert abs(deviations(observed, torch.full_like(observed, first.numel() / 1024))) < 4


def test_rows_share_no_noise_at_whatever_distance_of_ids():
    """The 31 bits that count, of 400 rows: as few are equal as by chance."""
    rows = rows_of(*((Sampling(1.0, seed=seed), position) for seed in range(20) for position in range(20)))
    bits = hashed(rows[3].unsqueeze(-1), rows[4].unsqueeze(-1), 2500) & 0x7FFFFFFF
    equal = bits.numel() - bits.unique().numel()
    expected = bits.numel() ** 2 / 2**32
    assert abs(equal - expected) < 4 * expected**0.5


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6}, {"top_k": 30}, {"top_p": 0.8}], ids=str)
def test_tokens_are_drawn_from_the_softmax(settings):
    """50,000 draws: of 500 seeds at 100 positions each."""
    scores = 2 * torch.randn(60, generator=torch.Generator().manual_seed(0))
    settings = {"temperature": 1.0, **settings}
    drawn = Counter[int]()
    for seed in range(500):
        rows = rows_of(*((Sampling(**settings, seed=seed), position) for position in range(100)))
        step = Sampling(**settings).step
        drawn.update(perturbed(scores.expand(100, -1), rows, step).argmax(-1).tolist())
    probabilities = warped(scores[None], **settings).softmax(-1)[0].double()
    assert set(drawn) <= set(probabilities.nonzero().flatten().tolist())
    frequent = probabilities * 50000 > 5
    observed = torch.tensor([drawn[token] for token in range(60)], dtype=torch.float64)
    expected = torch.cat([probabilities[frequent], probabilities[~frequent].sum(0, keepdim=True)]) * 50000
    observed = torch.cat([observed[frequent], observed[~frequent].sum(0, keepdim=True)])
    assert abs(deviations(observed[expected > 0], expected[expected > 0])) < 4


@pytest.mark.thorough
def test_improbable_tokens_of_a_large_vocabulary_are_drawn_as_often_as_they_should():
    """The 151,935 others have 1 % together, each one less than a float can be short of 1."""
    scores = torch.zeros(1, 151936)
    scores[0, 7] = math.log(99 * 151935)
    drawn = []
    for start in range(0, 1000, 10):
        rows = rows_of(*((Sampling(1.0, seed=3), position) for position in range(start, start + 10)))
        drawn += perturbed(scores.expand(10, -1), rows, Step.DRAW).argmax(-1).tolist()
    others = [token for token in drawn if token != 7]
    assert 1 < len(others) < 25  # 10 expected
    assert len(set(others)) == len(others)


# --- top-k and top-p --------------------------------------------------------------------------------------------------


def warped(scores, temperature, top_k=0, top_p=1.0):
    """The logits as `model.generate` has them."""
    scores = scores / temperature
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    return TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores


@pytest.mark.parametrize("vocabulary", [97, 3000, 40000])
@pytest.mark.parametrize("in_order", [False, True], ids=["narrow", "sorted"])
def test_top_k_and_top_p_keep_what_transformers_keeps(vocabulary, in_order, monkeypatch):
    if in_order:
        monkeypatch.setattr(module, "_NARROW", vocabulary)
    draw = torch.Generator().manual_seed(vocabulary)
    for top_k, top_p in itertools.product([0, 2, 50, 1024, 1500, 10**6], [0.0, 0.1, 0.8, 0.999, 1.0]):
        temperature = float(torch.rand(1, generator=draw) * 2 + 0.05)
        sampling = Sampling(temperature, top_p, top_k, seed=1)
        scores = torch.randn(4, vocabulary, generator=draw) * 6 * torch.rand(4, 1, generator=draw)
        kept = perturbed(scores, rows_of(*((sampling, i) for i in range(4))), sampling.step) > -torch.inf
        expected = warped(scores, temperature, min(top_k, vocabulary), top_p) > -torch.inf
        assert ((kept != expected).sum(-1) <= (top_p == 0.999)).all(), (temperature, top_k, top_p)  # sums are rounded


def test_each_row_keeps_and_draws_its_own():
    """Rows of all kinds draw the same together as each one alone."""
    scores = 3 * torch.randn(6, 5000, generator=torch.Generator().manual_seed(0))
    kinds = [{}, {"top_k": 20}, {"top_p": 0.7}, {"top_k": 3000}, {"top_k": 40, "top_p": 0.9}]
    settings = [Sampling(1.2, seed=i, **kind) for i, kind in enumerate(kinds)] + [Sampling()]
    together = perturbed(scores, rows_of(*((one, 7) for one in settings)), Step.SORT)
    for row, one in enumerate(settings):
        alone = perturbed(scores[row : row + 1], rows_of((one, 7)), one.step)
        assert together[row].argmax() == alone[0].argmax()
        assert torch.equal(together[row] == -torch.inf, alone[0] == -torch.inf)


def test_a_cpu_sorts_no_vocabulary_whose_first_logits_suffice(monkeypatch):
    scores = torch.zeros(3, 20000)
    scores[:, 5] = 20.0  # of nearly all probability
    rows = rows_of(*((sampling, 0) for sampling in (Sampling(), Sampling(1.0), Sampling(1.0, top_p=0.9))))
    widths, stock = [], module._lowest_of
    monkeypatch.setattr(module, "_lowest_of", lambda *args: (widths.append(args[-1]), stock(*args))[1])
    perturbed(scores, rows, Step.SORT)
    assert widths == [1024]
    perturbed(0.01 * scores, rows, Step.SORT)
    assert widths[1:] == [1024, 16384, 262144]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_k": 1}], ids=str)
@pytest.mark.parametrize("step", list(Step))
def test_greedy_rows_take_the_first_of_equal_maxima(settings, step):
    scores = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)).round()
    scores[2] = -torch.inf
    drawn = perturbed(scores, rows_of(*((Sampling(**settings), i) for i in range(3))), step)
    assert torch.equal(drawn.argmax(-1), scores.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-3])
@pytest.mark.parametrize("kind", [{}, {"top_k": 50}, {"top_p": 0.9}], ids=str)
def test_temperatures_near_0_take_the_most_probable_token(temperature, kind):
    scores = 1e4 * torch.randn(2, 151936, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature, seed=0, **kind)
    drawn = perturbed(scores, rows_of((sampling, 0), (sampling, 1)), sampling.step)
    assert not drawn.isnan().any()
    assert torch.equal(drawn.argmax(-1), scores.argmax(-1))


@pytest.mark.parametrize("kind", [{}, {"top_k": 50}, {"top_p": 0.9}], ids=str)
def test_tokens_that_a_processor_forbids_are_never_drawn(kind):
    scores = torch.full((1, 300), -torch.inf)
    scores[0, [5, 9]] = torch.tensor([1.0, 1.5])
    for position in range(200):
        sampling = Sampling(1000.0, seed=0, **kind)
        assert int(perturbed(scores, rows_of((sampling, position)), sampling.step).argmax()) in (5, 9)


# --- in the engine ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(model=None, store=None, **options):
    with Engine(model or make_llama(), store, config(0.2), **{**ROOMY, **options}) as engine:
        yield engine
        assert not engine.requests


def results_of(engine, ids, seconds=60):
    """The tokens of requests, in the order of their ids."""
    tokens, deadline = {}, time.monotonic() + seconds
    while len(tokens) < len(ids):
        assert time.monotonic() < deadline, f"Only {len(tokens)} of {len(ids)} requests have ended."
        output = engine.get_result(timeout=0.1)
        if output is not None and output.is_finished():
            assert output.error is None
            tokens[output.request_id] = output.generated_tokens
    return [tokens[request_id] for request_id in ids]


def answers(engine, *jobs, count=12):
    """The tokens of (prompt, settings), which run together."""
    with engine.pause():
        ids = [engine.add_request(prompt, max_new_tokens=count, **settings) for prompt, settings in jobs]
    return results_of(engine, ids)


def plain_answer(model, prompt, count=12, **options):
    output = model.generate(prompt.input_ids, max_new_tokens=count, do_sample=False, **options)
    return output[0, len(prompt) :].tolist()


SEEDED = [
    {"temperature": 0.8, "seed": 1},
    {"temperature": 0.8, "seed": 2},
    {"temperature": 1.5, "top_k": 10, "seed": 3},
    {"temperature": 1.0, "top_p": 0.8, "seed": 4},
    {"temperature": 1.0, "top_k": 30, "top_p": 0.9, "seed": -5},
]


@pytest.mark.parametrize("form", ["plain", "blended"])
def test_a_batch_mixes_greedy_sampled_and_seeded_requests(form):
    """Greedy ones answer as `model.generate`; seeded ones as when they run alone."""
    model = make_llama()
    prompt, store = (PROMPT.ids if form == "plain" else PROMPT), MemoryStore()
    greedy = plain_answer(model, PROMPT)
    if form == "blended":
        with hfblend.patch(model, config(0.2), store=store):
            output = model.generate(**PROMPT.inputs(), max_new_tokens=12, do_sample=False)
        assert greedy != (greedy := output[0, len(PROMPT) :].tolist())
    with running(model, store) as engine:
        alone = [answers(engine, (prompt, settings))[0] for settings in SEEDED]
        assert len({tuple(tokens) for tokens in [*alone, greedy]}) == len(SEEDED) + 1
        others = [(PROMPTS[i % 3], {"temperature": 1.0}) for i in range(5)]
        jobs = [(prompt, settings) for settings in [*SEEDED, {}, {"temperature": 0}]]
        together = answers(engine, *[job for pair in itertools.zip_longest(others, jobs) for job in pair if job])
        named = together[1:10:2] + together[10:]
        assert named == [*alone, greedy, greedy]
        assert engine.counts["failed"] == 0
        assert (engine.counts["blended"] > 0) == (engine.counts["matched"] > 0)


@pytest.mark.thorough
@pytest.mark.parametrize("form", ["plain", "blended"])
def test_a_seeded_request_goes_on_with_the_same_tokens_after_it_lost_its_blocks(form):
    prompts = [prompt.ids if form == "plain" else prompt for prompt in PROMPTS]
    settings = [{"temperature": 0.9, "seed": 10 + i} for i in range(3)]
    jobs = list(zip(prompts, settings))
    model, store = make_llama(), MemoryStore()
    with running(model, store) as engine:
        alone = [answers(engine, job, count=40)[0] for job in jobs]
    starts = []
    with running(model, store, num_blocks=20, safety_margin=0.0) as engine:
        waiting = engine.batch_processor.scheduler.add_waiting_request
        engine.batch_processor.scheduler.add_waiting_request = lambda state: (
            starts.append(len(state.initial_tokens)),
            waiting(state),
        )
        assert answers(engine, *jobs, count=40) == alone
    assert len(starts) > 3
    assert max(starts) > len(PROMPT)  # one that begins again brings its tokens


def test_a_request_without_a_seed_draws_other_tokens_each_time():
    with running() as engine:
        state = torch.get_rng_state()
        first, second = answers(engine, (PROMPT.ids, {"temperature": 1.0}), (PROMPT.ids, {"temperature": 1.0}))
        assert first != second
        assert torch.equal(torch.get_rng_state(), state)


def test_settings_that_leave_one_token_are_greedy():
    model = make_llama()
    expected = plain_answer(model, PROMPT)
    kinds = [{"top_k": 1}, {"top_p": 1e-4}, {"top_p": 0}, {"top_k": 50, "top_p": 1e-4}, {"temperature": 1e-5}]
    with running(model) as engine:
        jobs = [(PROMPT.ids, {"temperature": 5.0, "seed": 1, **kind}) for kind in kinds]
        assert answers(engine, *jobs) == [expected] * len(kinds)


def test_sampled_tokens_have_their_frequencies():
    """The first token of 1,000 requests."""
    model, count = make_llama(), 1000
    with torch.no_grad():
        probabilities = (model(PROMPT.input_ids).logits[0, -1] / 3).softmax(-1).double()
    with running(model, max_requests_per_batch=64) as engine:
        answer = answers(engine, *[(PROMPT.ids, {"temperature": 3.0, "seed": i}) for i in range(count)], count=1)
    frequent = probabilities.topk(20).indices
    drawn = torch.tensor([tokens[0] for tokens in answer]).bincount(minlength=97).double()
    observed = torch.cat([drawn[frequent], count - drawn[frequent].sum(0, keepdim=True)])
    expected = torch.cat([probabilities[frequent], 1 - probabilities[frequent].sum(0, keepdim=True)]) * count
    assert abs(deviations(observed, expected)) < 4


def test_requests_are_sampled_as_the_generation_config_says():
    model = make_llama()
    settings = GenerationConfig(do_sample=True, temperature=0.8, top_k=10)
    with running(model, generation_config=settings) as engine:
        explicit = {"temperature": 0.8, "top_k": 10, "seed": 1}
        named, default = answers(engine, (PROMPT.ids, explicit), (PROMPT.ids, {"seed": 1}))
        greedy, wide = answers(engine, (PROMPT.ids, {"temperature": 0}), (PROMPT.ids, {"seed": 1, "top_k": 0}))
        assert default == named != greedy == plain_answer(model, PROMPT)
        assert wide != named
    assert settings.do_sample
    assert model.generation_config.do_sample in (None, False)


def test_other_processors_of_the_generation_config_come_first():
    model = make_llama()
    unwanted = set(plain_answer(model, PROMPT))
    settings = GenerationConfig(do_sample=False, suppress_tokens=sorted(unwanted), sequence_bias={(50,): 3.0})
    expected = plain_answer(model, PROMPT, suppress_tokens=sorted(unwanted), sequence_bias={(50,): 3.0})
    forced = GenerationConfig(do_sample=False, sequence_bias={(50,): 1e4})
    sampled = (PROMPT.ids, {"temperature": 2.0, "seed": 1})
    with running(model, generation_config=settings) as engine:
        greedy, drawn = answers(engine, (PROMPT.ids, {}), sampled)
        assert greedy == expected
        assert not unwanted & set(drawn)
    with running(model, generation_config=forced) as engine:
        assert answers(engine, sampled) == [[50] * 12]


def test_errors_come_from_add_request():
    with running() as engine:
        with pytest.raises(ValueError, match="temperature must be"):
            engine.add_request(PROMPT, temperature=-1)
        with pytest.raises(ValueError, match="top_k must be"):
            engine.add_request(PROMPT, temperature=1.0, top_k=-1)
        assert answers(engine, (PROMPT.ids, {})) == [plain_answer(engine.model, PROMPT)]
    with running(return_logprobs=True) as engine:
        with pytest.raises(ValueError, match="log-probabilities of greedy requests only"):
            engine.add_request(PROMPT, temperature=1.0)
        assert len(answers(engine, (PROMPT.ids, {}))[0]) == 12


def test_a_request_with_an_unknown_setting_fails_alone():
    with running() as engine:
        engine.add_request(PROMPT.ids, "other", max_new_tokens=3, min_p=0.5)
        output = engine.get_result(timeout=10)
        assert (output.request_id, output.status) == ("other", requests.RequestStatus.FAILED)
        assert "min_p" in output.error
        assert len(answers(engine, (PROMPT.ids, {}))[0]) == 12


# --- what is relied on in Transformers --------------------------------------------------------------------------------


def test_the_sampler_has_what_is_called_of_the_stock_processors():
    public = {name for name in vars(ContinuousBatchingLogitsProcessorList) if not name.startswith("_")}
    assert vars(input_outputs.CudaGraphBuffer).keys() - {"__init__", "__del__"} >= {"get_graph", "set_graph"}
    assert public == {"check_kwargs", "clear", "fill_defaults", "prepare_tensor_args"}
    stock = ContinuousBatchingLogitsProcessorList([])
    assert set(vars(stock)) == {
        "logits_processor",
        "tensors_required",
        "supported_keys",
        "ignored_keys",
        "do_processing",
    }
    sampler = Sampler(stock, Sampling())
    assert sampler.do_processing
    assert sampler.tensors_required == 5


@pytest.fixture
def positions(monkeypatch):
    """Of each seed, the positions that tokens were drawn at."""
    seen, stock = {}, Sampling.packed
    monkeypatch.setattr(
        Sampling,
        "packed",
        lambda self, position: (seen.setdefault(self.seed, []).append(position), stock(self, position))[1],
    )
    return seen


def test_each_token_is_drawn_at_its_position(positions):
    prompts = [prompt.ids for prompt in PROMPTS]
    jobs = [(prompt, {"temperature": 0.9, "seed": i}) for i, prompt in enumerate(prompts)]
    with running(num_blocks=20, safety_margin=0.0) as engine:
        answers(engine, *jobs, count=40)
    for i, prompt in enumerate(prompts):
        assert positions[i] == list(range(len(prompt), len(prompt) + 40))


class _NoStream:
    """A stream of a CPU, on which all is done when it is asked for."""

    def record_event(self, event):
        pass

    wait_event = record_event

    def synchronize(self):
        pass


@pytest.fixture
def async_batches_on_a_cpu(monkeypatch):
    """Stock prepares a step before it knows the tokens of the one in flight, without streams here."""
    monkeypatch.setattr(input_outputs.ContinuousBatchingAsyncIOs, "_supported_device_types", ("cpu",))
    monkeypatch.setattr(input_outputs, "create_device_stream", lambda device: _NoStream())
    for stock in (input_outputs, model_runner):
        monkeypatch.setattr(stock, "stream_context", lambda stream: contextlib.nullcontext())


@pytest.mark.parametrize("num_blocks", [128, 20], ids=["roomy", "tight"])
def test_asynchronous_batches_draw_the_same_tokens(num_blocks, async_batches_on_a_cpu, positions):
    jobs = [(prompt.ids, {**settings, "seed": i}) for i, (prompt, settings) in enumerate(zip(PROMPTS, SEEDED))]
    model = make_llama()
    with running(model) as engine:
        expected = answers(engine, *jobs, count=40)
    positions.clear()
    with running(model, use_async_batching=True, num_blocks=num_blocks, safety_margin=0.0) as engine:
        ios = engine.batch_processor.inputs_and_outputs
        assert isinstance(ios, input_outputs.ContinuousBatchingAsyncIOs)
        assert all(isinstance(pair.device_io.graphs, _Graphs) for pair in ios.io_pairs)
        assert answers(engine, *jobs, count=40) == expected
    for i, (ids, _) in enumerate(jobs):  # a step too many is in flight at the end
        assert set(positions[i]) == set(range(len(ids), len(ids) + 41))
    repeated = sum(len(places) - len(set(places)) for i, places in positions.items() if i in range(3))
    assert (repeated > 0) == (num_blocks == 20)  # the token in flight when a request loses its blocks


def test_each_kind_of_step_has_its_own_graphs():
    """A graph that was captured without sampled requests would draw nothing for them."""
    with running() as engine, engine.pause():
        ios, sampler = engine.batch_processor.inputs_and_outputs, engine.logit_processor
        for step in Step:
            sampler.step = step
            assert ios.get_graph() is None
            ios.set_graph(graph := SimpleNamespace(reset=lambda: None, step=step))
            assert ios.get_graph() is graph
        sampler.step = Step.GREEDY
        assert ios.get_graph().step is Step.GREEDY
        assert isinstance(ios.graphs, _Graphs)
        assert not isinstance(ios.graphs.graphs, _Graphs)  # made at the warm-up, and kept at the start


def test_a_warm_up_takes_the_steps_of_the_default_settings():
    """So that a GPU has recorded their graphs before the first request."""
    made_up = requests.RequestState("made up", [0])
    batch, storage = [requests.FutureRequestState(made_up, True, {}, 1)], torch.zeros(5, 1, dtype=torch.int32)
    for default, step in ((Sampling(), Step.GREEDY), (Sampling(0.6, 0.9, 20), Step.TOP)):
        sampler = Sampler(ContinuousBatchingLogitsProcessorList([]), default)
        sampler.prepare_tensor_args(requests_in_batch=batch, arg_storage=storage)
        assert sampler.step is step


@pytest.mark.gpu
@pytest.mark.parametrize("step", list(Step)[1:])
def test_a_cuda_graph_draws_what_a_cpu_draws(step):
    """The graph is captured with greedy rows, and replayed with others."""
    settings = {Step.DRAW: {}, Step.TOP: {"top_k": 50, "top_p": 0.9}, Step.SORT: {"top_p": 0.9}}[step]
    scores = 3 * torch.randn(8, 151936, generator=torch.Generator().manual_seed(0))
    rows = rows_of(*((Sampling(0.8, seed=i, **settings), 50 + i) for i in range(8)))
    static_scores, static_rows = scores.cuda(), rows_of(*[(Sampling(), 0)] * 8).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(perturbed(static_scores, static_rows, step).argmax(-1).cpu(), scores.argmax(-1))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = perturbed(static_scores, static_rows, step).argmax(-1)
    for shift in range(10):
        static_scores.copy_(scores.roll(shift, 0))
        static_rows.copy_(rows.roll(shift, 1))
        graph.replay()
        expected = perturbed(scores, rows, step).argmax(-1).roll(shift, 0)
        assert torch.equal(drawn.cpu(), expected)


@pytest.mark.gpu
def test_an_engine_on_a_gpu_draws_in_graphs():
    options = {"page_size": 64, "num_blocks": 256, "max_batch_tokens": 512, "max_requests_per_batch": 4}
    with running(make_llama(dtype=torch.bfloat16).to("cuda"), **options) as engine:
        greedy = answers(engine, (PROMPT.ids, {}))[0]  # from here on all find the same blocks, and round alike
        drawn = [answers(engine, (PROMPT.ids, settings))[0] for settings in SEEDED]
        assert [answers(engine, (PROMPT.ids, settings))[0] for settings in SEEDED] == drawn
        assert len({tuple(tokens) for tokens in [greedy, *drawn]}) == len(SEEDED) + 1
        pairs = engine.batch_processor.inputs_and_outputs.io_pairs
        assert {key[-1] for pair in pairs for key in pair.device_io.graphs.graphs._storage} == set(Step)
