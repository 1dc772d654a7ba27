"""An exception at any line of a blend leaves a model that answers as before at the next call, and no lock taken.

KeyboardInterrupt and MemoryError may come between any two steps of Python. They are raised here from a trace function:
as a line of hfblend begins, as a call returns, or between two bytecodes of a line.
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import random
import signal
import sys
import threading
import time

import pytest
import torch
from helpers import config, entry, generate, largest_difference, make_llama, make_prompt

import hfblend
from hfblend.generate.learn import Traffic
from hfblend.kv.streams import on_stream, switch_back
from hfblend.locks import Condition, ForwardLock, Mutex, Running
from hfblend.store import DiskStore, MemoryStore, TieredStore
from hfblend.store.index import Hashed
from hfblend.support.registry import model_of

# Python reports an exception that comes as a generator is dropped, and goes on.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

PROMPT = make_prompt()
HOME = hfblend.__path__[0]
STOCK = config(enabled=False)
SAMPLES = {"line": 13, "opcode": 8}  # of each case
BY_OPCODE = ("kv_deviation",)  # also in the middle of a line; the others are thorough
ANSWER_S = 20  # in which another thread has to answer; it needs milliseconds


# Of Python 3.12 on; a trace function is told there of the bytecodes of some calls only.
MONITORING = getattr(sys, "monitoring", None)
TOOL = 4


class Interrupter:
    """Counts events in hfblend's frames of this thread, and raises at one of them.

    Args:
        kind: `"line"` (and the return from a call) or `"opcode"`.
        error: what to raise.
        at: number of the event; `None` only notes where each one is.
    """

    def __init__(self, kind, error=KeyboardInterrupt, at=None):
        self.kind, self.error, self.at = kind, error, at
        self.monitors = MONITORING is not None and kind == "opcode"
        self.thread, self.events = threading.get_ident(), []

    def __enter__(self):
        if self.monitors:
            instruction = MONITORING.events.INSTRUCTION
            MONITORING.use_tool_id(TOOL, "interrupter")
            MONITORING.register_callback(TOOL, instruction, self._reached)
            MONITORING.set_events(TOOL, instruction)
        else:
            sys.settrace(self._called)
        return self

    def __exit__(self, *_):
        if not self.monitors:
            sys.settrace(None)
        elif MONITORING.get_tool(TOOL) is not None:
            MONITORING.set_events(TOOL, 0)
            MONITORING.free_tool_id(TOOL)

    def _reached(self, code, offset):
        if not code.co_filename.startswith(HOME):
            return MONITORING.DISABLE
        if threading.get_ident() == self.thread:
            self._count(sys._getframe(1), "opcode")
        return None

    def _called(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(HOME):
            return None
        if self.kind == "opcode":
            frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self._stepped

    def _stepped(self, frame, event, arg):
        if event == self.kind or (event == "return" and self.kind == "line"):
            self._count(frame, event)
        return self._stepped

    def _count(self, frame, event):
        self.events.append((frame.f_code.co_filename, frame.f_lineno, event))
        if len(self.events) - 1 == self.at:
            self.__exit__()
            raise self.error


# --- what is interrupted ----------------------------------------------------------------------------------------------


def tokens(model, prompt=PROMPT, **kwargs):
    return model.generate(**prompt.inputs(), max_new_tokens=2, do_sample=False, **kwargs)[0, len(prompt) :].tolist()


class Case:
    """A patched model, and a call that is interrupted.

    Args:
        settings: of the config.
        rope: of the model.
        call: (model, blender) -> anything; default, `generate`.
        cold: whether the store forgets a chunk before every call.
        compiled: whether the model has what `model.compile()` leaves.
    """

    def __init__(self, call=None, cold=False, rope="default", compiled=False, trace="summary", **settings):
        self.model = make_llama(rope, layers=3)
        if compiled:  # as `model.compile()` leaves it
            self.model._compiled_call_impl = functools.partial(type(self.model)._call_impl, self.model)
        self.stock = tokens_and_logits(self.model)
        self.before = state_of(self.model)
        self.blender = hfblend.patch(self.model, config(0.3, **settings), trace=trace)
        self._call, self._cold = call or (lambda model, blender: tokens(model)), cold
        tokens(self.model)
        self.patched = state_of(self.model)
        self.right, self.right_stock = tokens(self.model), tokens(self.model, blend_config=STOCK)
        for _ in range(2):
            self.run()

    def run(self):
        if self._cold:
            with self.blender.store._lock:
                self.blender.store._entries.popitem(last=False)
        return self._call(self.model, self.blender)

    def events(self, kind):
        if self._cold:
            tokens(self.model)
        with Interrupter(kind) as seen:
            self.run()
        return seen.events

    def interrupt(self, kind, error, at):
        """Whether the exception came out; work at the end of a call may keep it to itself."""
        if self._cold:
            tokens(self.model)
        try:
            with Interrupter(kind, error, at):
                self.run()
        except error:
            return True
        return False

    def require_as_before(self):
        """The next calls, of this thread and of another, answer right; then nothing is left."""
        assert in_another_thread(tokens, self.model) == self.right
        assert tokens(self.model, blend_config=STOCK) == self.right_stock
        assert tokens(self.model) == self.right
        assert self.blender.trace.blended
        assert state_of(self.model) == self.patched
        assert torch.is_grad_enabled()

    def remove(self):
        self.blender.remove()
        assert state_of(self.model) == self.before
        stock = tokens_and_logits(self.model)
        assert all(torch.equal(a, b) for a, b in zip(stock, self.stock))


def in_another_thread(work, *args):
    """What it returns there; it may not wait for ever."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work(*args)), daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    assert not thread.is_alive(), "another thread waits for ever"
    return found[0]


def tokens_and_logits(model):
    with torch.no_grad():
        return torch.tensor(tokens_of_plain(model)), model(PROMPT.input_ids).logits


def tokens_of_plain(model):
    return model.generate(PROMPT.input_ids, max_new_tokens=3, do_sample=False)[0].tolist()


def state_of(model):
    """What a pass could leave: attributes of every module, hooks, settings, the state of rotary modules."""
    modules = dict(model.named_modules())
    attributes = {name: {k: id(v) for k, v in vars(m).items() if callable(v)} for name, m in modules.items()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()}
    rotary = {name: b.tolist() for name, b in model.named_buffers()}
    grown = getattr(model.model.rotary_emb, "max_seq_len_cached", None)
    return attributes, hooks, rotary, grown, model.config._attn_implementation


def steps(model, blender):
    *_, last = hfblend.steps(model, PROMPT, store=blender.store, config=blender.config, max_new_tokens=2)
    return last


CASES = {
    "suffix_attention": {},
    "kv_deviation": {"selection": "kv_deviation", "check_layers": (1, 2), "recompute_ratios": (0.5, 0.3)},
    "a miss": {"cold": True},
    "a miss, dynamic RoPE": {"cold": True, "rope": "dynamic", "selection": "kv_deviation"},
    "compiled": {"compiled": True, "selection": "kv_deviation"},
    "full trace": {"trace": "full"},
    "steps": {"call": steps, "selection": "kv_deviation"},
    "verify": {"call": lambda model, blender: blender.verify(PROMPT, num_tokens=2)},
    "precompute": {"call": lambda model, blender: blender.precompute([[8, 9, 10]], prefix=[7]), "cold": True},
}


def sampled(events, count):
    """Numbers of events spread over the lines of hfblend: each line once, then every k-th of those."""
    first = {where: number for number, where in reversed(list(enumerate(events)))}
    last = {where: number for number, where in enumerate(events)}
    numbers = sorted({*first.values(), *last.values()})
    return [numbers[int((i + 0.5) * len(numbers) / count)] for i in range(count)]


@pytest.mark.parametrize("samples", [15, pytest.param(60, marks=pytest.mark.slow)])
def test_patch_that_is_interrupted_is_undone(samples):
    """As its last lines run, the user may be left without a handle; `model.generate` then has one."""
    model = make_llama()
    stock, before = tokens_and_logits(model), state_of(model)
    model_of(model)
    with Interrupter("line") as seen:
        hfblend.patch(model, config(0.3))
    model.generate.blender.remove()
    count = len(seen.events)
    for at in sorted({*sampled(seen.events, samples), *range(count - 6, count)}):
        model_of(model)  # the self-test is not part of this
        with contextlib.suppress(KeyboardInterrupt), Interrupter("line", KeyboardInterrupt, at):
            hfblend.patch(model, config(0.3))
        if hasattr(model.generate, "blender"):
            assert len(seen.events) - at < 5
            model.generate.blender.remove()
        assert state_of(model) == before
        assert all(torch.equal(a, b) for a, b in zip(tokens_and_logits(model), stock))
        with hfblend.patch(model, config(0.3)) as blender:
            tokens(model)
            assert blender.trace.blended


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if kind == "line" or name in BY_OPCODE else pytest.mark.thorough)
        for name in CASES
        for kind in SAMPLES
    ],
)
def test_an_exception_anywhere_leaves_a_model_that_answers(name, kind):
    case = Case(**CASES[name])
    numbers, raised = sampled(case.events(kind), SAMPLES[kind]), 0
    for i, number in enumerate(numbers):
        raised += case.interrupt(kind, (KeyboardInterrupt, MemoryError)[i % 2], number)
        case.require_as_before()
    assert raised >= len(numbers) // 2
    case.interrupt(kind, KeyboardInterrupt, numbers[len(numbers) // 2])
    case.remove()


# Where a change is made and undone: the lines that are interrupted in every run.
MODULES = ("locks.py", "layers.py", "switching.py", "compiled.py", "passes.py")


def test_an_exception_where_the_model_is_changed():
    case = Case(selection="kv_deviation", compiled=True)
    events = case.events("line")
    last = {where: number for number, where in enumerate(events) if where[0].endswith(MODULES)}
    for number in list(last.values())[::8]:
        case.interrupt("line", KeyboardInterrupt, number)
        case.require_as_before()
    case.remove()


@pytest.mark.parametrize(
    ("rule", "tests_itself"), [("suffix_attention", False), ("kv_deviation", False), ("kv_deviation", True)]
)
def test_a_model_that_is_not_patched_answers_at_once(rule, tests_itself):
    """Nothing of hfblend is called in between."""
    model, settings, store = make_llama(layers=3), config(0.3, selection=rule), hfblend.MemoryStore()
    stock, before = tokens_of_plain(model), state_of(model)

    def blend():
        if tests_itself:
            hfblend.support.registry.forget(model)
        return hfblend.blend(model, PROMPT, store=store, config=settings).logits

    blend()
    right = blend()
    with Interrupter("line") as seen:
        blend()
    for number in sampled(seen.events, 14):
        with contextlib.suppress(KeyboardInterrupt), Interrupter("line", at=number):
            blend()
        assert tokens_of_plain(model) == stock
        assert torch.equal(blend(), right)
        assert state_of(model) == before


@pytest.fixture
def ctrl_c_interrupts():
    """As from a terminal: a shell starts jobs in the background with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_real_interrupts_at_random_times():
    case, times, raised = Case(selection="kv_deviation"), random.Random(0), 0
    began = time.perf_counter()
    case.run()
    seconds = time.perf_counter() - began
    for _ in range(20):
        timer = threading.Timer(times.uniform(0, seconds), _thread.interrupt_main)
        try:
            timer.start()
            case.run()
            timer.join()
            time.sleep(1)  # it comes now
        except KeyboardInterrupt:
            raised += 1
        timer.join()
        case.require_as_before()
    assert raised >= 10
    case.remove()


class Stream:
    """As a CUDA stream, for a machine that has none."""

    device = torch.device("cuda", 0)

    def wait_stream(self, other):
        pass


def test_the_callers_stream_is_current_again(monkeypatch):
    own, side, far = Stream(), Stream(), Stream()
    current = [own]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))

    def work():
        assert current[0] is far

    with Interrupter("line") as seen:
        on_stream(side, on_stream, far, work)
    for number in range(len(seen.events)):
        with contextlib.suppress(KeyboardInterrupt), Interrupter("line", at=number):
            on_stream(side, on_stream, far, work)
        switch_back()
        assert current[0] is own
        on_stream(side, on_stream, far, work)
        assert current[0] is own


@pytest.mark.gpu
@pytest.mark.parametrize("records", [False, True])
def test_an_exception_anywhere_on_a_gpu(records):
    """Also while a pass is recorded as a CUDA graph."""
    model, own = make_llama(dtype=torch.bfloat16).to("cuda"), torch.cuda.current_stream()
    with hfblend.patch(model, config(0.3, selection="kv_deviation")) as blender:

        def prepare():
            if records:
                blender.hf_model.graphs = None
                generate(model, PROMPT.inputs(), max_new_tokens=2)  # the next call records

        for _ in range(3):
            right = generate(model, PROMPT.inputs(), max_new_tokens=2)
        stock = generate(model, PROMPT.inputs(), max_new_tokens=2, blend_config=STOCK)
        prepare()
        with Interrupter("line") as seen:
            generate(model, PROMPT.inputs(), max_new_tokens=2)
        for number in sampled(seen.events, 120):
            prepare()
            with contextlib.suppress(KeyboardInterrupt), Interrupter("line", at=number):
                generate(model, PROMPT.inputs(), max_new_tokens=2)
            after = generate(model, PROMPT.inputs(), max_new_tokens=2, blend_config=STOCK)
            assert torch.cuda.current_stream() == own
            assert largest_difference(after, stock) == 0
            assert (
                largest_difference(generate(model, PROMPT.inputs(), max_new_tokens=2), right) <= 0.5
            )  # graphs round otherwise
            assert blender.trace.blended


# --- locks ------------------------------------------------------------------------------------------------------------


def use_forward_lock(lock, names):
    def work():
        lock.change(names, "it", "changed")
        lock.exclusive(lock.change, names, "other", "set")
        assert names == {"it": "changed"}

    lock.exclusive(work)
    lock.shared(lock.shared, dict)


def use_mutex(lock, names):
    with lock:
        pass


def use_condition(lock, names):
    with lock:
        lock.wait_for(lambda: True)
        lock.notify_all()


@pytest.mark.parametrize("kind", ["line", "opcode"])
@pytest.mark.parametrize(
    ("make", "use"), [(ForwardLock, use_forward_lock), (Mutex, use_mutex), (Condition, use_condition)]
)
def test_no_step_of_a_lock_leaves_it_taken(make, use, kind, monkeypatch):
    monkeypatch.setattr(hfblend.locks, "_LOOK_S", 0.002)
    with Interrupter(kind) as seen:
        use(make(), {"it": "as before"})
    assert len(seen.events) > 20
    for number in range(0, len(seen.events), 1 if kind == "line" else 3):
        lock, names = make(), {"it": "as before"}
        with contextlib.suppress(KeyboardInterrupt), Interrupter(kind, at=number):  # a generator's end may swallow it
            use(lock, names)
        in_another_thread(use, lock, names)
        assert names == {"it": "as before"}
        use(lock, names)
        assert lock._claims == []


def test_what_runs_is_never_taken_for_dead():
    """A thread is looked at while generators come and go on its stack."""
    running, is_over = Running(), threading.Event()

    def numbers(depth):
        yield from numbers(depth - 1) if depth else range(20)

    def look():
        found = [running.is_alive for _ in range(5000)]
        is_over.set()
        return all(found)

    def work():
        running.thread = threading.get_ident()
        running.do(lambda: [sum(numbers(12)) for _ in iter(is_over.is_set, True)])

    thread = threading.Thread(target=work)
    thread.start()
    while not running.is_alive:
        time.sleep(0.001)
    try:
        assert in_another_thread(look)
    finally:
        is_over.set()
        thread.join()
    assert not running.is_alive


def test_an_exception_in_put_leaves_no_store_that_waits(monkeypatch):
    monkeypatch.setattr(hfblend.locks, "_LOOK_S", 0.002)

    def put_and_flush(store, key):
        store.put(key, entry())
        store.flush()
        return store.stores[1].open(key) is not None and store.open(key) is not None

    def make():
        return TieredStore([hfblend.MemoryStore(), hfblend.MemoryStore()])

    with Interrupter("line") as seen:
        put_and_flush(make(), "a" * 64)
    lines = {where: number for number, where in enumerate(seen.events)}
    for number in lines.values():
        store = make()
        with contextlib.suppress(KeyboardInterrupt), Interrupter("line", at=number):
            put_and_flush(store, "a" * 64)
        assert in_another_thread(put_and_flush, store, "b" * 64)
        assert in_another_thread(put_and_flush, store, "a" * 64)
        store.close()


# --- texts that are found in prompts ----------------------------------------------------------------------------------


def text_of(number):
    return torch.randint(7, 97, (60,), generator=torch.Generator().manual_seed(number)).tolist()


def found_in(index, number):
    found = index.find(Hashed(text_of(number)), lambda numbers, sums: numbers)
    return {match.key for _, matches in found for match in matches if match.stop - match.start == 60}


class Texts:
    """A store whose texts are put, found, removed and put again."""

    scope, numbers = "a" * 64, range(8)

    def __init__(self, kind, path):
        size = entry(60, ids=text_of(0)).held_bytes
        self.store = MemoryStore(max_bytes=6 * size) if kind == "memory" else DiskStore(path)

    def run(self):
        for number in self.numbers[:6]:
            behind = range(1 + number % 2)
            self.store.put(f"{number:064x}", entry(60, ids=text_of(number), scope=self.scope, behind_ids=behind))
            if number % 2:
                self.found()
        for number in self.numbers[:4]:
            if isinstance(self.store, DiskStore):
                self.store.remove(f"{number:064x}")
        self.found()
        for number in self.numbers[6:]:
            self.store.put(f"{number:064x}", entry(60, ids=text_of(number), scope=self.scope))

    def found(self):
        index = self.store.index(self.scope)
        return {key for number in self.numbers for key in found_in(index, number)}


class Prompts:
    """Prompts that are remembered, more than there is room for."""

    def __init__(self, *_):
        self.traffic = Traffic(most=200)

    def run(self):
        for number in range(6):
            prompt = Hashed(text_of(number) + text_of(number + 1))
            self.traffic.repeated(prompt, (), None)
            self.traffic.add(prompt)

    def found(self):
        prompt = Hashed([5, *text_of(5), *text_of(6), 5])
        return {(match.start, match.stop) for match in self.traffic.repeated(prompt, (), 0)[1]}


@pytest.mark.parametrize(("make", "kind"), [(Texts, "memory"), (Texts, "disk"), (Prompts, "prompts")])
def test_an_exception_leaves_an_index_that_finds(make, kind, tmp_path):
    whole = make(kind, tmp_path / "whole")
    with Interrupter("line") as events:
        whole.run()
    expected = whole.found()
    assert expected
    files = ("index.py", "journal.py", "memory.py", "learn.py")
    here = [at for at, (file, *_) in enumerate(events.events) if file.endswith(files)]
    for number, at in enumerate(random.Random(0).sample(here[: len(here) * 9 // 10], 25)):
        case = make(kind, tmp_path / str(number))
        with contextlib.suppress(KeyboardInterrupt), Interrupter("line", at=at) as one:
            case.run()
        assert at < len(one.events)
        case.found()
        case.run()
        assert case.found() == expected


def test_a_thread_that_is_interrupted_while_it_waits_undoes_nothing_of_the_pass_it_waits_for():
    lock, names, is_inside, may_end = ForwardLock(), {}, threading.Event(), threading.Event()
    found = []

    def work():
        lock.change(names, "it", "changed")
        is_inside.set()
        may_end.wait(ANSWER_S)
        found.append(dict(names))

    def interrupted(other):
        raise KeyboardInterrupt

    thread = threading.Thread(target=lock.exclusive, args=(work,))
    thread.start()
    is_inside.wait(ANSWER_S)
    lock._before = interrupted  # as it looks for the claim that it waits for
    try:
        with pytest.raises(KeyboardInterrupt):
            lock.exclusive(dict)
    finally:
        del lock._before
        may_end.set()
        thread.join(ANSWER_S)
    assert found == [{"it": "changed"}]
    assert names == {}
    lock.exclusive(dict)
    assert lock._claims == []
