"""`slimmable.inference`: the numbers of the extracted network, whatever changes, and nothing left behind."""

import asyncio
import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import prune

import slimmable
from slimmable.errors import ConversionError
from tests.life.networks import FAMILIES, WIDTHS, converted, images


class Network(nn.Module):
    """Convolutions, norms, a sum, and a square layer, in eval mode; its forward leaves something in `self`."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Tanh())
        self.hidden = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def features(self, x):
        x = self.stem(x)
        x = x + self.block(x)
        if not torch.compiler.is_compiling():  # torch 2.6 exports nothing that assigns attributes
            self.left = x
        return x.mean((2, 3))

    def forward(self, x):
        return self.head(self.hidden(self.features(x)).relu())


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network(**options):
    torch.manual_seed(0)
    net = Network()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return slimmable.slimify(net.eval(), WIDTHS, example_inputs=X, **options)


def expected(model, width, x=X):
    """What the extracted network says, of a copy that no block of inference knows."""
    with torch.no_grad():
        return slimmable.extract(copy.deepcopy(model), width)(x)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def twin(model):
    return vars(model)["_compiled_call_impl"].twin()


# -- the same numbers
@pytest.mark.parametrize("name", FAMILIES)
def test_each_width_gives_what_its_extracted_network_gives(name):
    slim, x = converted(name).eval(), images()
    with slimmable.inference(slim):
        for width in (*WIDTHS, *WIDTHS):
            slimmable.set_width(slim, width)
            assert torch.equal(slim(x), expected(slim, width, x)), width


@pytest.mark.parametrize("options", [{"universal": True}, {"overlap": False}, {"switchable": "hidden"}])
def test_all_kinds_of_conversions(options):
    slim = network(**options)
    widths = (*WIDTHS, 0.3, 0.7, 0.3) if "universal" in options else WIDTHS
    with slimmable.inference(slim):
        for width in widths:
            with slimmable.at_width(slim, width):
                close(slim(X), expected(slim, width))


def test_widths_by_layer_and_of_parts():
    slim = network()
    with slimmable.inference(slim):
        for setting in ({"hidden": 0.5}, {"stem*": 0.25}, {"hidden": 0.25}, 0.5):
            slimmable.set_width(slim, setting)
            close(slim(X), expected(slim, setting))
        slimmable.set_width(slim, 1.0)
        features = slim.features(X)
        slimmable.set_width(slim.hidden, 0.5)  # a part, which then gives features that the next layer does not read
        assert slim.hidden(features[:, : slim.hidden.weight.shape[1]]).shape == (2, 8)


def test_layers_made_by_hand():
    layers = slimmable.layers
    slim = nn.Sequential(
        layers.SlimConv2d(3, 8, 3, widths=WIDTHS, slim_in=False),
        layers.SwitchableBatchNorm2d(8, widths=WIDTHS),
        layers.SlimConv2d(8, 4, 3, widths=WIDTHS),
    ).eval()
    with torch.no_grad():
        wanted = slimmable.run_widths(slim, X)
    with slimmable.inference(slim):
        for width, found in slimmable.run_widths(slim, X).items():
            close(found, wanted[width])


def test_methods_and_parts_called_by_themselves_are_right_and_leave_what_they_leave():
    slim = network()
    with slimmable.inference(slim), slimmable.at_width(slim, 0.5):
        small = slimmable.extract(slim, 0.5)
        close(slim.features(X), small.features(X))
        close(slim.stem(X), small.stem(X))
        del slim.left
        slim(X), small(X)
        close(slim.left, small.left)


def test_gates_decide_as_outside():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2)).eval()
    slim = slimmable.slimify(net, (1.0, 0.5), example_inputs=torch.zeros(2, 4))
    slim = slimmable.gating.gate(slim, example_inputs=torch.zeros(2, 4)).eval()
    x = torch.randn(16, 4)
    for gate in (module for module in slim.modules() if hasattr(module, "open_at_zero")):
        nn.init.normal_(gate.expand.bias)
        gate.norm.num_batches_tracked += 1
    for width in (1.0, 0.5):
        slimmable.set_width(slim, width)
        with torch.no_grad():
            plain = slim(x)
            with slimmable.gating.gated(slim) as run:
                gated = slim(x)
                masks = run.masks()
        with slimmable.inference(slim):
            close(slim(x), plain)
            with slimmable.gating.gated(slim) as run:
                close(slim(x), gated)
                assert all(torch.equal(mask, masks[name]) for name, mask in run.masks().items())
            close(slim(x), plain)


# -- every change is noticed
def in_place(slim):
    with torch.no_grad():
        slim.hidden._parameters["weight"].mul_(2)


def step(slim, **options):
    optimizer = torch.optim.SGD(slim.parameters(), 0.1, **options)
    with torch.enable_grad():
        slim(X).square().sum().backward()
    optimizer.step()


def load(slim, assign=False):
    slim.load_state_dict({name: tensor * 1.5 for name, tensor in slim.state_dict().items()}, assign=assign)


def replace_data(slim):
    slim.hidden._parameters["weight"].data = slim.hidden._parameters["weight"].detach() * 2


def transpose_data(slim):
    weight = slim.hidden._parameters["weight"]
    weight.data = weight.data.t()


def replace_bias_data(slim):
    slim.hidden._parameters["bias"].data = slim.hidden._parameters["bias"].detach() + 2


def replace_parameter(slim):
    slim.hidden.weight = nn.Parameter(torch.randn(16, 16))


def set_storage(slim):
    with torch.no_grad():
        slim.hidden._parameters["weight"].set_(torch.randn(16, 16))


def swap(slim):
    torch.utils.swap_tensors(slim.hidden._parameters["weight"], nn.Parameter(torch.randn(16, 16)))


def round_off(slim):
    """To lower precision and back, where the old memory may be used again."""
    slim.bfloat16()
    slim.float()


def past_autograd(slim):
    slim.hidden._parameters["weight"].data.mul_(2)


def in_numpy(slim):
    array = slim.hidden._parameters["weight"].detach().numpy()
    array *= 2


def in_inference_mode(slim):
    with torch.inference_mode():
        slim.hidden._parameters["weight"].mul_(2)


def initialise(slim):
    nn.init.normal_(slim.block[0]._parameters["weight"])


def change_statistics(slim):
    for norm in slim.stem[1].norms():
        norm.running_mean += 1


def replace_a_layer(slim):
    slim.block[2] = nn.Sigmoid()


def replace_a_narrow_norm(slim):
    container = slim.stem[1]
    container.full = nn.BatchNorm2d(16).eval()
    for place, norm in enumerate(container.narrow):
        container.narrow[place] = nn.BatchNorm2d(norm.num_features).eval()


def add_a_layer(slim):
    slim.stem.append(nn.Sigmoid())


def prune_weights(slim):
    prune.l1_unstructured(slim.head, "bias", 0.5)


def calibrate(slim):
    slimmable.calibrate_bn(slim, [X * 3])


CHANGES = [
    in_place, step, load, replace_data, transpose_data, replace_bias_data, replace_parameter, set_storage, swap,
    round_off, past_autograd, in_numpy, in_inference_mode, initialise, change_statistics, replace_a_layer,
    replace_a_narrow_norm, add_a_layer, prune_weights, calibrate,
    pytest.param(lambda slim: step(slim, foreach=True), id="foreach"),
    pytest.param(lambda slim: step(slim, fused=True), id="fused"),
    pytest.param(lambda slim: load(slim, assign=True), id="assign"),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_at_every_width(change):
    slim = network()
    with slimmable.inference(slim):
        before = slimmable.run_widths(slim, X)
        change(slim)
        slim.left = None  # which has a history after a step
        with torch.no_grad():
            wanted = slimmable.run_widths(copy.deepcopy(slim), X)
        for width, found in slimmable.run_widths(slim, X).items():
            assert not torch.equal(found, before[width])
            close(found, wanted[width])
    with torch.no_grad():
        for width, found in slimmable.run_widths(slim, X).items():
            close(found, wanted[width])


def test_a_change_in_precision_and_values_of_attributes():
    slim = converted("test_vit").eval()
    x = images()
    with slimmable.inference(slim), slimmable.at_width(slim, 0.5):
        wanted = slim(x)
        assert slim.double()(x.double()).dtype == torch.float64
        close(slim(x.double()).float(), wanted)
        slim.float()
        slimmable.set_width(slim, 1.0)
        before = slim(x)
        slim.blocks[0].attn.scale = 0.0
        slim.blocks[0].attn.fused_attn = False
        close(slim(x), copy.deepcopy(slim)(x))
        assert not torch.equal(slim(x), before)


def test_a_part_that_is_called_for_the_first_time_after_a_change():
    slim = network()
    with slimmable.inference(slim), slimmable.at_width(slim, 0.5):
        slim(X)
        in_place(slim)
        with torch.no_grad():
            close(slim.hidden(torch.ones(1, 8)), slimmable.extract(slim, 0.5).hidden(torch.ones(1, 8)))
        close(slim(X), expected(slim, 0.5))


def test_a_hook_is_told_the_module_itself_and_only_while_it_is_registered():
    slim, told = network(), []
    with slimmable.inference(slim), slimmable.at_width(slim, 0.5):
        before = slim(X)
        modules = [slim, slim.hidden, slim.block[2], slim.stem[1], slim.stem[1].module_at(1)]
        handles = [module.register_forward_hook(lambda module, *_: told.append(module)) for module in modules]
        close(slim(X), before)
        assert len(told) == len(modules)
        assert all(any(module is each for each in told) for module in modules)
        for handle in handles:
            handle.remove()
        close(slim(X), before)
        assert len(told) == len(modules)
        with torch.nn.modules.module.register_module_forward_hook(lambda module, *_: told.append(module)):
            slim(X)
        assert any(module is slim.hidden for module in told[len(modules) :])


def test_parameters_given_for_one_call_count_for_that_call():
    slim = network()
    given = {name: parameter.detach() * 2 for name, parameter in slim.named_parameters()}
    with slimmable.inference(slim), slimmable.at_width(slim, 0.5):
        before = slim(X)
        wanted = torch.func.functional_call(copy.deepcopy(slim), given, X)
        close(torch.func.functional_call(slim, given, X), wanted)
        close(slim(X), before)
        stacked = {name: torch.stack([tensor, tensor / 2]) for name, tensor in given.items() if "narrow" not in name}
        both = torch.vmap(lambda own: torch.func.functional_call(slim, own, X))(stacked)
        close(both[1], before)
        close(torch.vmap(slim)(X[:, None])[:, 0], before)


def test_weights_that_have_no_versions_are_read_anew():
    with torch.inference_mode():
        slim = network()
        with slimmable.inference(slim), slimmable.at_width(slim, 0.5):
            before = slim(X)
            slim.hidden._parameters["weight"].mul_(2)
            assert not torch.equal(slim(X), before)
            close(slim(X), slimmable.extract(slim, 0.5)(X))


# -- gradients, threads, tasks, programs, copies
def test_gradients_are_off_and_whole_where_they_are_turned_on():
    slim = network()
    slimmable.set_width(slim, 0.5)
    slim(X).square().sum().backward()
    wanted = {name: parameter.grad.clone() for name, parameter in slim.named_parameters() if parameter.grad is not None}
    slim.zero_grad()
    with slimmable.inference(slim):
        assert not slim(X).requires_grad
        with torch.enable_grad():
            slim(X).square().sum().backward()
    found = {name: parameter.grad for name, parameter in slim.named_parameters() if parameter.grad is not None}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert slim(X).requires_grad


def test_threads_and_tasks_each_run_at_their_width():
    slim = network()
    wanted = {width: expected(slim, width) for width in WIDTHS}
    wrong, start = [], threading.Barrier(len(WIDTHS))

    def run(width):
        start.wait()
        for _ in range(20):
            with torch.no_grad(), slimmable.at_width(slim, width):
                if not torch.allclose(slim(X), wanted[width], rtol=1e-4, atol=1e-6):
                    wrong.append(width)

    async def task(width):
        with slimmable.at_width(slim, width):
            for _ in range(5):
                await asyncio.sleep(0)
                close(slim(X), wanted[width])

    async def tasks():
        await asyncio.gather(*map(task, WIDTHS))

    with slimmable.inference(slim):
        threads = [threading.Thread(target=run, args=(width,)) for width in WIDTHS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        asyncio.run(tasks())
    assert wrong == []


def test_compiled_and_exported_programs():
    slim = network()
    torch._dynamo.reset()
    counter = CompileCounter()
    with slimmable.inference(slim):
        compiled = torch.compile(slim, backend=counter, fullgraph=True)
        for width in (*WIDTHS, *WIDTHS):
            slimmable.set_width(slim, width)
            close(compiled(X), expected(slim, width))
            close(slim(X), expected(slim, width))
        assert counter.frame_count == len(WIDTHS)
        program = torch.export.export(slim, (X,))
    close(program.module()(X), expected(slim, 0.25))
    assert {name for name, _ in program.named_parameters()} <= {name for name, _ in slim.named_parameters()}
    with slimmable.inference(slim):
        traced = torch.jit.trace(slim, (X,))
    close(traced(X), expected(slim, 0.25))


def test_a_width_that_compiled_code_has_set_counts_in_the_next_call():
    slim = network()
    full, half = expected(slim, 1.0), expected(slim, 0.5)

    @torch.compile(backend="eager")
    def narrowed(x):
        slimmable.set_width(slim, 0.5)
        return x + 1

    torch._dynamo.reset()
    with slimmable.inference(slim):
        for _ in range(3):
            slimmable.set_width(slim, 1.0)
            close(slim(X), full)
            narrowed(X)
            close(slim(X), half)


def test_copies_and_pickles_made_inside_are_like_those_made_outside():
    slim = network()
    with slimmable.inference(slim), slimmable.at_width(slim, 0.5):
        wanted = slim(X)
        copied, file = copy.deepcopy(slim), io.BytesIO()
        torch.save(slim, file)
        assert list(slim.state_dict()) == list(network().state_dict())
        again = slimmable.slimify(slim, (1.0, 0.5), example_inputs=X)
    file.seek(0)
    for other in (copied, torch.load(file, weights_only=False), again):
        assert not any("_compiled_call_impl" in vars(module) for module in other.modules())
        with torch.no_grad(), slimmable.at_width(other, 0.5):
            close(other(X), wanted)


# -- blocks in blocks, and after them
def test_nothing_is_left_behind_even_after_an_error():
    slim = network()
    before = {module: (type(module), dict(vars(module))) for module in slim.modules()}
    hooks = dict(torch.nn.modules.module._global_module_registration_hooks)
    with pytest.raises(RuntimeError, match="mat1"), slimmable.inference(slim):  # noqa: PT012
        slimmable.run_widths(slim, X)
        slim.hidden(torch.ones(1, 3))
    assert torch.is_grad_enabled()
    assert hooks == dict(torch.nn.modules.module._global_module_registration_hooks)
    for module, (kind, attributes) in before.items():
        attributes.pop("left", None)
        assert type(module) is kind
        assert attributes.keys() == vars(module).keys() - {"left"}
    gc.disable()  # the memory is free at once
    try:
        with slimmable.inference(slim), slimmable.at_width(slim, 0.5):
            slim(X)
            parts = [weakref.ref(twin(slim).hidden.weight), weakref.ref(twin(slim).hidden)]
        assert all(part() is None for part in parts)
    finally:
        gc.enable()


def test_blocks_in_blocks():
    slim = network()
    with slimmable.inference(slim.stem), slimmable.inference(slim):
        with slimmable.inference(slim), slimmable.at_width(slim, 0.5):
            close(slim(X), expected(slim, 0.5))
        in_place(slim)
        close(slim(X), expected(slim, 1.0))
    assert not any("_compiled_call_impl" in vars(module) for module in slim.modules())


def copied_bytes(model):
    """The memory of the blocks that are copies, each counted once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    blocks = vars(model)["_compiled_call_impl"].blocks
    parts = [block.part for known in blocks.values() for block in known.values()]
    assert all(part.is_contiguous() for part in parts)
    return sum(part.nbytes for part in parts if part.untyped_storage().data_ptr() not in own)


@pytest.mark.parametrize("universal", [False, True])
def test_memory_is_that_of_the_blocks_that_are_not_contiguous(universal):
    slim = network(universal=universal)
    with slimmable.inference(slim):
        slim(X)
        assert copied_bytes(slim) == 0
        for count, width in enumerate((0.5, 0.25, 0.5), 1):
            slimmable.set_width(slim, width)
            slim(X)
            sizes = {0.5: 8 * 8 * 9 + 8 * 8 + 4 * 8, 0.25: 4 * 4 * 9 + 4 * 4 + 4 * 4}  # block, hidden, head
            assert copied_bytes(slim) == 4 * (sizes[0.5] if count == 1 else sum(sizes.values()))
        if universal:  # of widths that are none of the model's own, only the active one is kept
            for width in (0.3, 0.4, 0.6, 0.7):
                slimmable.set_width(slim, width)
                slim(X)
            slimmable.set_width(slim, 0.5)
            slimmable.set_width(slim, 0.3)
            slim(X)
            gc.collect()
            guest = 5 * 5 * 9 + 5 * 5 + 4 * 5
            assert copied_bytes(slim) == 4 * (sum(sizes.values()) + guest)


def test_what_has_no_widths_is_refused():
    with pytest.raises(ConversionError, match="was never converted"), slimmable.inference(nn.Linear(2, 2)):
        pass
