"""Compiled code holds one operator for each pass of a block, and trains as eager code does."""

import copy

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import nn

from efficient_densenet import DenseNet, EfficientDenseBlock
from efficient_densenet.memory.step import measure
from support.compare import (
    FORMATS,
    assert_all_close,
    assert_close,
    assert_same_state,
    block_pair,
    gradients,
    image,
    norms,
    randomise_,
    training_results,
)
from support.marks import both_kinds, clause, every_mode, recomputing
from support.precision import DRAWS, assert_as_precise, truth_of

OPERATORS = torch.ops.efficient_densenet


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Inductor compiles in this process: starting others takes longer than these graphs do."""
    torch.compiler.reset()
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def without_poison(poisoned_memory):
    """The compiler's own memory is not filled: deterministic algorithms change its graphs."""
    torch.use_deterministic_algorithms(False)


class Graphs:
    """A backend that remembers what it is given; ``inner`` compiles it."""

    def __init__(self, inner):
        self.inner = torch._dynamo.lookup_backend(inner)
        self.seen = []

    def __call__(self, graph, inputs):
        self.seen.append(graph)
        return self.inner(graph, inputs)

    def count(self, operator):
        return sum(node.target is operator.default for g in self.seen for node in g.graph.nodes)


def compiled(module, inner="aot_eager", **options):
    """The module compiled whole, and the graphs that it became."""
    torch.compiler.reset()  # graphs of earlier modules count against a limit
    graphs = Graphs(inner)
    return torch.compile(module, backend=graphs, fullgraph=True, **options), graphs


def assert_same_compiled_training(efficient, naive, images, rtol=1e-10, **options):
    """One step on each image, without a graph break; returns the graphs."""
    fast, graphs = compiled(efficient, **options)
    for x in images:
        results = []
        for module in (fast, naive):
            leaf = x.clone().requires_grad_()
            found = training_results(module, leaf)
            results.append(dict(enumerate(found.values())))
        assert_all_close(*results, rtol)
    assert_same_state(efficient, naive, rtol=rtol)
    return graphs


def path(graphs, operator=OPERATORS.block_forward):
    return None if graphs.count(operator) else "naive path"


@clause("4 · compiled: no graph break, the same training")
@every_mode
@both_kinds
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_compiled_block_matches_naive(mode, bn_size, dims, took):
    efficient, naive = block_pair(bn_size=bn_size, dims=dims, recompute=mode)
    graphs = assert_same_compiled_training(efficient, naive, [image(dims=dims) for _ in "ab"])
    took(path(graphs))
    assert len(graphs.seen) == 1
    assert graphs.count(OPERATORS.block_forward) == (mode != "none")


@recomputing
@pytest.mark.parametrize("dims", FORMATS)
def test_compiled_block_keeps_layout(mode, dims):
    efficient, naive = block_pair(dims=dims, recompute=mode)
    x = image(dims=dims).to(memory_format=FORMATS[dims])
    assert_same_compiled_training(efficient, naive, [x])
    assert torch.compile(efficient, backend="aot_eager")(x).is_contiguous(
        memory_format=FORMATS[dims]
    )


def cumulative(block):
    for norm in norms(block):
        norm.momentum = None


def first_norms_eval(block):
    for layer in block.values():
        layer.norm1.eval()


def without_affine(block):
    for layer in block.values():
        layer.norm1 = nn.BatchNorm2d(layer.norm1.num_features, affine=False).double()


def frozen_convolutions(block):
    for layer in block.values():
        layer.conv1.requires_grad_(False)


def with_bias(block):
    for layer in block.values():
        layer.conv1.bias = nn.Parameter(torch.zeros(len(layer.conv1.weight)).double())


CHANGES = {
    "evaluation": nn.Module.eval,
    "first norms frozen": first_norms_eval,
    "cumulative average": cumulative,
    "without affine": without_affine,
    "frozen convolutions": frozen_convolutions,
    "bias": with_bias,
}


@recomputing
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_compiled_variants_match_naive(mode, change):
    efficient, naive = block_pair(recompute=mode, change=change)
    graphs = assert_same_compiled_training(efficient, naive, [image(), image()])
    assert graphs.count(OPERATORS.block_forward) == 1


def network(mode, **options):
    torch.manual_seed(0)
    model = DenseNet(3, (3, 2), 6, 2, num_classes=3, recompute=mode, **options).double()
    randomise_(model)
    return model


@clause("4 · compiled: dynamic batch")
@every_mode
def test_compiled_network_takes_another_batch_without_compiling_again(mode, took):
    """By the second batch size the graph is dynamic; stem, transition and head are operators."""
    model, naive = network(mode), network("none")
    images = [torch.randn(n, 3, 32, 32, dtype=torch.float64) for n in (4, 6, 9, 3)]
    graphs = assert_same_compiled_training(model, naive, images, rtol=1e-9)
    took(path(graphs))
    assert len(graphs.seen) == 2
    if mode != "none":
        assert graphs.count(OPERATORS.stem_forward) == 2
        assert graphs.count(OPERATORS.block_forward) == 4


@pytest.mark.slow
@clause("4 · compiled by Inductor: the same training")
@every_mode
def test_inductor_trains_alike(mode, took):
    efficient, naive = block_pair(num_layers=2, recompute=mode)
    graphs = assert_same_compiled_training(efficient, naive, [image()], inner="inductor")
    took(path(graphs))


@clause("4 · compiled: dropout")
@recomputing
def test_compiled_dropout_draws_masks_of_eager_code(mode, took):
    """From the same seed; so that the backward pass draws the forward's masks again."""
    model = network(mode, drop_rate=0.4)
    fast, graphs = compiled(copy.deepcopy(model))
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    found = []
    for module in (model, fast):
        torch.manual_seed(3)
        steps = [training_results(module, x.clone().requires_grad_()) for _ in range(2)]
        found.append({f"{i}.{j}": v for i, s in enumerate(steps) for j, v in enumerate(s.values())})
    took(path(graphs))
    assert_all_close(*found, 1e-10)
    assert (found[0]["0.0"] - found[0]["1.0"]).abs().max() > 1e-3, "both steps drew the same masks"


@clause("4 · compiled: a small activation memory budget")
@recomputing
@torch._functorch.config.patch(activation_memory_budget=0.1)
def test_small_activation_budget_recomputes_no_operator(mode, took):
    """PyTorch's partitioner may then recompute what it likes; dropout stays right."""
    model = network(mode, drop_rate=0.4)
    fast, graphs = compiled(copy.deepcopy(model), inner="aot_eager_decomp_partition")
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    found = []
    for module in (model, fast):
        torch.manual_seed(3)
        found.append(dict(enumerate(training_results(module, x.clone().requires_grad_()).values())))
    took(path(graphs))
    assert_all_close(*found, 1e-9)


@clause("4 · compiled: autocast")
@every_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_autocast_is_as_precise_as_naive_block(mode, dtype, took):
    efficient, naive = block_pair(recompute=mode, dtype=torch.float32)
    state = copy.deepcopy(naive.state_dict())
    function, graphs = compiled(efficient)
    draws = []
    for _ in range(DRAWS):
        x = image(dtype=torch.float32).requires_grad_()
        upstream = torch.randn(3, 14, 7, 5)
        truth, _ = truth_of(naive, x, upstream)
        found = []
        for module, call in ((efficient, function), (naive, naive)):
            module.zero_grad()
            x.grad = None
            with torch.autocast("cpu", dtype=dtype):
                out = call(x)
            out.backward(upstream.to(out.dtype))
            found.append({"output": out.detach()} | gradients(module, x))
            module.load_state_dict(state)
        draws.append((*found, truth))
    took(path(graphs))
    assert_as_precise(draws, dtype)


@clause("4 · compiled: memory at the ledger")
@recomputing
@both_kinds
def test_compiled_block_keeps_what_ledger_says(mode, bn_size, took):
    layers, channels, growth, values = 12, 8, 8, 4 * 31 * 33
    block = EfficientDenseBlock(layers, channels, bn_size, growth, recompute=mode)
    fast, graphs = compiled(block)
    x = torch.randn(4, channels, 31, 33).requires_grad_()
    fast(x)  # compiles
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = fast(x)
    own = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers(), x)}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*kept, out)}
    found = sum(size for pointer, size in storages.items() if pointer not in own)
    bottlenecks = layers * (bn_size or 0) * growth if mode == "norm" else 0
    expected = (channels + layers * growth + bottlenecks) * values * 4
    took(path(graphs))
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
@recomputing
def test_compiled_step_needs_no_more_at_its_peak(mode):
    """By the allocator."""
    block = EfficientDenseBlock(8, 16, 4, 8, recompute=mode)
    x = torch.randn(8, 16, 32, 32)
    peaks = []
    for module in (block, torch.compile(block)):
        measure(module, x)
        peaks.append(measure(module, x).peak.total)
    assert peaks[1] <= 1.1 * peaks[0]


@recomputing
def test_frozen_block_is_compiled_for_inference(mode):
    efficient, naive = block_pair(recompute=mode, change=nn.Module.eval)
    fast, graphs = compiled(efficient)
    x = image()
    with torch.no_grad():
        assert_close("output", fast(x), naive(x), 1e-10)
    assert graphs.count(OPERATORS.block_forward) == 1


def test_hook_on_inner_module_takes_naive_path():
    def change(block):
        block["denselayer2"].relu2.register_forward_hook(lambda module, args, out: 2 * out)

    efficient, naive = block_pair(change=change)
    graphs = assert_same_compiled_training(efficient, naive, [image()])
    assert graphs.count(OPERATORS.block_forward) == 0


def test_switching_to_evaluation_compiles_again():
    efficient, naive = block_pair()
    fast, graphs = compiled(efficient)
    for train in (True, False, True):
        efficient.train(train), naive.train(train)
        x = image()
        assert_close("output", fast(x), naive(x), 1e-10)
    assert_same_state(efficient, naive)
    assert len(graphs.seen) == 2


def test_second_derivative_is_refused():
    efficient, _ = block_pair()
    fast, _ = compiled(efficient)
    x = image().requires_grad_()
    with pytest.raises(RuntimeError, match=r"double backward|second derivative"):
        (grad,) = torch.autograd.grad(fast(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
