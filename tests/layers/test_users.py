"""Threads and asyncio tasks that share a model: each has its width, or is refused, and nothing is left behind."""

import asyncio
import contextvars
import copy
import gc
import itertools
import pickle
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from queue import Queue
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import slimmable
from slimmable import at_width, extract, run_widths, set_width, slimify
from slimmable._width import width_of
from slimmable.errors import WidthError
from slimmable.training import batchnorm
from slimmable.view import recompute

WIDTHS = (1.0, 0.5, 0.25)
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )


@cache
def made(universal: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return slimify(network(), WIDTHS, example_inputs=torch.zeros(2, 8), universal=universal).eval()


def converted(universal: bool = False) -> nn.Sequential:
    return copy.deepcopy(made(universal))


@cache
def outputs() -> dict[float, torch.Tensor]:
    return {width: extract(made(False), width)(X) for width in WIDTHS}


@pytest.fixture
def model() -> nn.Sequential:
    return converted()


def ran_at(output: torch.Tensor) -> float:
    """The width at which a forward of `X` has run."""
    found = [width for width, expected in outputs().items() if torch.equal(output, expected)]
    assert len(found) == 1
    return found[0]


def refused_or_width(model: nn.Module) -> float | None:
    """The width at which a forward runs here, None if it is refused; `width_of` says the same."""
    try:
        width = ran_at(model(X))
    except WidthError:
        with pytest.raises(WidthError):
            width_of(model)
        return None
    assert width_of(model) == width
    return width


class Worker:
    """A thread that calls functions, one at a time, when told to; it keeps what it has switched in between."""

    def __init__(self, *context: contextvars.Context) -> None:
        self._calls: Queue[Callable[[], Any] | None] = Queue()
        self._results: Queue[Any] = Queue()
        run = [context.run for context in context] or [lambda function: function()]
        self._thread = threading.Thread(target=run[0], args=(self._work,), daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                self._results.put((call(), None))
            except BaseException as error:
                self._results.put((None, error))
            del call

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        self._calls.put(lambda: function(*args))
        result, error = self._results.get(timeout=60)
        if error is not None:
            raise error
        return result

    def end(self) -> None:
        self._calls.put(None)
        self._thread.join(timeout=60)


@pytest.fixture
def workers():
    made = [Worker() for _ in range(3)]
    yield made
    for worker in made:
        worker.end()


class Blocks:
    """The blocks of one user, opened and closed one by one."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.open = model, []

    def enter(self, width: Any) -> None:
        block = at_width(self.model, width)
        block.__enter__()
        self.open.append(block)

    def leave(self) -> None:
        self.open.pop().__exit__(None, None, None)


# -- threads
@pytest.mark.parametrize("first_out", [0, 1])
def test_overlapping_blocks_of_two_threads_compute_at_their_own_widths(model, workers, first_out):
    blocks = [Blocks(model), Blocks(model)]
    workers[0](blocks[0].enter, 0.5)
    workers[1](blocks[1].enter, 0.25)
    assert [worker(lambda: ran_at(model(X))) for worker in workers[:2]] == [0.5, 0.25]
    workers[first_out](blocks[first_out].leave)
    left = 1 - first_out
    assert workers[left](lambda: ran_at(model(X))) == (0.5, 0.25)[left]
    workers[left](blocks[left].leave)
    assert width_of(model) == 1.0
    assert ran_at(model(X)) == 1.0


def test_racing_threads_that_set_a_width_have_it_each(model, workers):
    for width, worker in zip(WIDTHS, workers, strict=True):
        worker(set_width, model, width)
    assert [worker(lambda: ran_at(model(X))) for worker in workers] == list(WIDTHS)
    assert refused_or_width(model) is None  # this thread has set none, and theirs differ
    set_width(model, 0.5)
    assert ran_at(model(X)) == 0.5
    assert [worker(lambda: ran_at(model(X))) for worker in workers] == list(WIDTHS)


def test_many_threads_at_once(model):
    expected = outputs()
    barrier, wrong = threading.Barrier(6), []

    def work(number: int) -> None:
        barrier.wait()
        for step in range(20):
            width = WIDTHS[(number + step) % 3]
            with at_width(model, width):
                wrong.extend([width] * (not torch.equal(model(X), expected[width])))
                for own, output in run_widths(model, X).items():
                    wrong.extend([own] * (not torch.equal(output, expected[own])))
            set_width(model, width)
            wrong.extend([width] * (not torch.equal(model(X), expected[width])))

    before, threads = sys.getswitchinterval(), [threading.Thread(target=work, args=(n,)) for n in range(6)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert wrong == []


def test_a_thread_without_a_width_follows_the_last_switch(model, workers):
    for width in (0.5, 0.25):
        set_width(model, width)
        assert [worker(lambda: ran_at(model(X))) for worker in workers] == [width] * 3


def test_a_thread_pool_inside_a_block_is_refused_unless_it_gets_the_context(model):
    with ThreadPoolExecutor(2) as pool, at_width(model, 0.5):
        with pytest.raises(WidthError, match="another thread or task has this model at a width"):
            pool.submit(model, X).result()
        context = contextvars.copy_context()
        assert ran_at(pool.submit(context.run, model, X).result()) == 0.5
        assert pool.submit(width_of_block, model, 0.25).result() == 0.25
        assert ran_at(model(X)) == 0.5
    with at_width(model, 1.0), ThreadPoolExecutor(1) as pool:
        assert ran_at(pool.submit(model, X).result()) == 1.0  # where the model is anyway


def width_of_block(model: nn.Module, width: float) -> float:
    with at_width(model, width):
        return ran_at(model(X))


def test_what_other_functions_do_in_a_thread_stays_there(model, workers):
    with at_width(model, 0.5):
        small = workers[0](extract, model, 0.25)
        assert workers[1](lambda: list(run_widths(model, X))) == list(WIDTHS)
        with pytest.raises(WidthError, match="another thread"):
            workers[2](slimmable.calibrate_bn, model, [X], [0.25])
        assert ran_at(model(X)) == 0.5
    assert ran_at(small(X)) == 0.25
    assert width_of(model) == 1.0


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(["enter", "leave", "set", "read"]), st.integers(0, 2)), max_size=14
    )
)
def test_every_order_of_blocks_switches_and_forwards(schedule):
    """Against the rule in words: the innermost block's width, else one's own, else the last one set, else refused."""
    model = converted()
    workers, blocks = [Worker() for _ in range(3)], [Blocks(model) for _ in range(3)]
    open_at: list[list[float]] = [[], [], []]
    own: list[float | None] = [None] * 3
    last_set = 1.0
    for number, action, index in [*schedule, *((number, "read", 0) for number in range(3))]:
        width, worker = WIDTHS[index], workers[number]
        if action == "enter":
            worker(blocks[number].enter, width)
            open_at[number].append(width)
        elif action == "leave" and open_at[number]:
            worker(blocks[number].leave)
            open_at[number].pop()
        elif action == "set":
            worker(set_width, model, width)
            if open_at[number]:
                open_at[number][-1] = width
            else:
                own[number] = last_set = width
        elif action == "read":
            expected: float | None = last_set
            mine = [*filter(None, [own[number]]), *open_at[number]]
            if mine:
                expected = mine[-1]
            elif {*itertools.chain(*open_at), *filter(None, own)} - {last_set}:
                expected = None
            assert worker(refused_or_width, model) == expected
    for number, worker in enumerate(workers):
        while open_at[number]:
            worker(blocks[number].leave)
            open_at[number].pop()
        worker.end()
    gc.collect()
    assert refused_or_width(model) == last_set


def test_blocks_that_overlap_in_one_thread_leave_the_width_from_before(model):
    def generator(width: float):
        with at_width(model, width):
            while True:
                yield ran_at(model(X))

    for first in (0, 1):
        steps = [generator(0.5), generator(0.25)]
        assert [next(each) for each in steps] == [0.5, 0.25]
        steps[first].close()
        assert ran_at(model(X)) == (0.25, 0.5)[first]
        steps[1 - first].close()
        assert ran_at(model(X)) == width_of(model) == 1.0


def test_a_block_that_another_context_ends(model):
    block = at_width(model, 0.5)
    block.__enter__()
    contextvars.copy_context().run(block.__exit__, None, None, None)
    assert ran_at(model(X)) == 1.0
    with at_width(model, 0.25):
        assert ran_at(model(X)) == 0.25
    assert ran_at(model(X)) == 1.0


def test_a_guest_width_has_one_user(workers):
    model = converted(universal=True)
    with at_width(model, 0.4):
        expected = model(X)
        for call in (
            lambda: set_width(model, 0.5),
            lambda: set_width(model, 0.7),
            lambda: at_width(model, 0.6).__enter__(),
        ):
            with pytest.raises(WidthError, match="by one only; keep the width with calibrate_bn, or use a copy"):
                workers[0](call)
        assert torch.equal(model(X), expected)
    workers[0](set_width, model, 0.5)
    for call in (lambda: set_width(model, 0.4), lambda: at_width(model, 0.4).__enter__()):
        with pytest.raises(WidthError, match="by one only"):
            call()
    workers[0].end()
    with at_width(model, 0.4):
        assert torch.equal(model(X), expected)


# -- tasks
def test_tasks_have_the_width_of_their_blocks_at_every_turn(model):
    async def work(width: float, turns: int) -> list[float]:
        found = []
        with at_width(model, width):
            for _ in range(turns):
                found.append(ran_at(model(X)))
                await asyncio.sleep(0)
        return found

    async def main() -> list[list[float]]:
        return await asyncio.gather(work(0.5, 3), work(0.25, 5), work(1.0, 2))

    assert asyncio.run(main()) == [[0.5] * 3, [0.25] * 5, [1.0] * 2]
    assert ran_at(model(X)) == 1.0


def test_tasks_that_set_a_width_have_it_each_and_in_what_they_start(model):
    async def work(width: float) -> list[float]:
        set_width(model, width)
        await asyncio.sleep(0)
        found = [ran_at(model(X)), ran_at(await asyncio.to_thread(model, X))]
        return [*found, await asyncio.create_task(forward())]

    async def forward() -> float:
        await asyncio.sleep(0)
        return ran_at(model(X))

    async def main() -> list[list[float]]:
        set_width(model, 1.0)
        both = await asyncio.gather(work(0.5), work(0.25))
        return [*both, [await forward()]]

    assert asyncio.run(main()) == [[0.5] * 3, [0.25] * 3, [1.0]]


def test_a_task_follows_the_one_that_has_started_it(model):
    async def forward(turns: int) -> list[float]:
        found = []
        for _ in range(turns):
            found.append(ran_at(model(X)))
            await asyncio.sleep(0)
        return found

    async def main() -> None:
        set_width(model, 0.5)
        outside = asyncio.create_task(forward(3))
        await asyncio.sleep(0)
        with at_width(model, 0.25):
            inside = asyncio.create_task(forward(3))
            await asyncio.sleep(0)
        set_width(model, 1.0)
        assert await outside == [0.5, 0.5, 1.0]
        assert await inside == [0.25] * 3  # also after the end of the block in which it has started
        with at_width(model, 0.25), pytest.raises(WidthError, match="another thread or task"):
            await asyncio.get_running_loop().run_in_executor(None, model, X)

    asyncio.run(main())


# -- copies, and what is left behind
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_at_the_width_of_who_makes_it_and_has_no_users(model, workers, duplicate):
    workers[0](set_width, model, 0.25)
    with at_width(model, 0.5):
        twin = duplicate(model)
        assert width_of(workers[0](duplicate, model)) == 0.25
    assert ran_at(twin(X)) == 0.5
    assert workers[0](lambda: ran_at(twin(X))) == 0.5
    assert workers[1](lambda: ran_at(twin(X))) == 0.5


def test_nothing_of_threads_and_tasks_stays(model):
    users: list[weakref.ref[Any]] = []

    def use() -> None:
        set_width(model, 0.25)
        with at_width(model, 0.5):
            model(X)
            users.append(weakref.ref(recompute._current()))
        users.append(weakref.ref(recompute._current()))

    async def request() -> None:
        use()
        with at_width(model, 0.5):
            await asyncio.to_thread(use)

    async def main() -> None:
        await asyncio.gather(*(request() for _ in range(3)))

    for _ in range(3):
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    asyncio.run(main())
    gc.collect()
    assert len(users) == 18
    assert [user for user in users if user() is not None] == []
    assert recompute._blocks == []


def test_no_model_stays_where_it_was_used(workers):
    def use() -> weakref.ref[nn.Module]:
        model = converted()
        set_width(model, 0.5)
        with at_width(model, 0.25):
            model(X)
        states.extend(weakref.ref(module.__dict__["_slim"]) for module in model.modules() if "_slim" in vars(module))
        return weakref.ref(model)

    states: list[weakref.ref[Any]] = []
    models = [use(), workers[0](use)]
    gc.collect()
    assert len(states) == 10
    assert [ref for ref in (*models, *states) if ref() is not None] == []


# -- compiled
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_code_does_not_run_for_users_that_differ(model, workers, fullgraph):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    blocks = Blocks(model)
    with at_width(model, 0.5):
        assert ran_at(compiled(X)) == 0.5
        workers[0](blocks.enter, 0.5)
        assert ran_at(compiled(X)) == 0.5  # as both have the same
        workers[0](set_width, model, 0.25)
        if fullgraph:
            with pytest.raises(torch._dynamo.exc.Unsupported, match="differ"):
                compiled(X)
        else:
            assert ran_at(compiled(X)) == 0.5
        assert workers[0](lambda: ran_at(model(X))) == 0.25
        workers[0](blocks.leave)
        assert ran_at(compiled(X)) == 0.5
    assert ran_at(compiled(X)) == 1.0


def test_a_switch_in_compiled_code_is_one_of_the_running_user(model):
    @torch.compile(backend="eager")
    def step(x: torch.Tensor) -> torch.Tensor:
        set_width(model, 0.25)
        return model(x)

    with at_width(model, 0.5):
        assert ran_at(step(X)) == 0.25
        assert ran_at(model(X)) == 0.25
    assert ran_at(model(X)) == 1.0
    step(X)
    assert ran_at(model(X)) == 0.25


# -- what a process shares
def test_replicas_of_data_parallel_run_in_their_threads_at_the_width_of_their_maker(model, monkeypatch):
    """As on several GPUs, but with copies on the CPU."""

    def copies(given: list[torch.Tensor], devices: list[int], detach: bool = False) -> list[list[torch.Tensor]]:
        return [[tensor.clone() for tensor in given] for _ in devices]

    replication = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(replication, "_get_device_index", lambda device, *_: device)
    monkeypatch.setattr(replication, "_broadcast_coalesced_reshape", copies)
    with at_width(model, 0.5), ThreadPoolExecutor(2) as pool:
        replicas = replication.replicate(model, [0, 1])
        with at_width(model, 0.25):
            assert [ran_at(output) for output in pool.map(lambda each: each(X), replicas)] == [0.5, 0.5]
    assert ran_at(model(X)) == 1.0


@pytest.mark.parametrize("first_out", [0, 1])
def test_synchronised_blocks_that_overlap_restore_what_they_patch(workers, monkeypatch, first_out):
    monkeypatch.setattr(batchnorm, "world_size", lambda: 2)
    before = nn.functional.batch_norm, torch.batch_norm
    blocks = [batchnorm.synchronised_batchnorm() for _ in range(2)]
    for worker, block in zip(workers, blocks, strict=False):
        worker(block.__enter__)
    for number in (first_out, 1 - first_out):
        assert nn.functional.batch_norm is not before[0]
        assert torch.batch_norm is not before[1]
        workers[number](blocks[number].__exit__, None, None, None)
    assert (nn.functional.batch_norm, torch.batch_norm) == before


def test_plans_made_in_several_threads_are_right_and_restore_what_they_patch():
    def state() -> list[Any]:
        functions = [value for name, value in vars(nn.functional).items() if name.startswith("has_torch_function")]
        backends = torch.backends.mkldnn.enabled, torch.backends.mha.get_fastpath_enabled()
        return [*functions, *backends, torch.are_deterministic_algorithms_enabled(), *warnings.filters]

    networks = [network(), nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 1)), nn.LSTM(8, 6)]
    inputs = [X, X[:, :, None, None], X[None]]
    jobs = list(zip(networks, inputs, strict=True))
    expected, before = [str(slimmable.plan(net, WIDTHS, example_inputs=x)) for net, x in jobs], state()
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda job: str(slimmable.plan(job[0], WIDTHS, example_inputs=job[1])), jobs * 4)
        assert list(found) == expected * 4
    assert state() == before
