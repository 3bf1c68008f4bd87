"""Stems, transitions and heads keep their inputs alone, and train exactly as the naive ones."""

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.densenet import _Transition

from efficient_densenet import DenseNet, EfficientDenseBlock
from efficient_densenet.functional import forward
from efficient_densenet.modules import sequence
from efficient_densenet.modules.calls import BlockCall, StemCall
from efficient_densenet.modules.naive import (
    AVG_POOLS,
    CONVS,
    MAX_POOLS,
    NORMS,
    DenseBlock,
    Transition,
)
from efficient_densenet.modules.sequence import EfficientSequential, EfficientTransition
from support.compare import (
    FORMATS,
    KINDS,
    MODES,
    SPATIAL,
    assert_all_close,
    assert_close,
    assert_same_state,
    assert_same_training,
    image,
    norms,
    randomise_,
    training_results,
)

both_kinds = pytest.mark.parametrize("bn_size", KINDS.values(), ids=KINDS)
all_dims = pytest.mark.parametrize("dims", SPATIAL)
LAYOUTS = [
    pytest.param(dims, layout, id=f"{dims}d-{layout}".replace("torch.", ""))
    for dims in SPATIAL
    for layout in (torch.contiguous_format, FORMATS.get(dims, None))
    if layout
]


def no_change(module):
    pass


def norm_eval(module):
    norms(module)[0].eval()


def frozen(module):
    module.requires_grad_(False)


def frozen_convolution(module):
    convolution(module).weight.requires_grad_(False)


def frozen_norm(module):
    norms(module)[0].requires_grad_(False)


def cumulative_average(module):
    norms(module)[0].momentum = None


def no_running_statistics(module):
    norm = norms(module)[0]
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None


CHANGES = (
    no_change,
    norm_eval,
    frozen,
    frozen_convolution,
    frozen_norm,
    cumulative_average,
    no_running_statistics,
)
any_change = pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)


def convolution(module):
    return next(m for m in module.modules() if isinstance(m, tuple(CONVS.values())))


def pair(efficient, naive, change=no_change, dtype=torch.float64):
    """Both modules with ``change`` applied, equal in every parameter and buffer."""
    for module in (efficient.to(dtype), naive.to(dtype)):
        change(module)
    for norm in norms(naive):
        if norm.running_mean is not None:
            randomise_(norm)
    efficient.load_state_dict(naive.state_dict())
    return efficient, naive


def transitions(dims=2, bias=False, **options):
    arguments = {"dims": dims, "bias": bias}
    return pair(EfficientTransition(5, 3, **arguments), Transition(5, 3, **arguments), **options)


def stem_modules(dims=2, bias=False, pool=None, channels=5):
    return OrderedDict(
        conv0=CONVS[dims](channels, 6, kernel_size=3, stride=2, padding=1, bias=bias),
        norm0=NORMS[dims](6),
        relu0=nn.ReLU(inplace=True),
        pool0=pool or MAX_POOLS[dims](kernel_size=3, stride=2, padding=1),
    )


def stems(dims=2, bias=False, pool=None, **options):
    modules = stem_modules(dims, bias, pool)
    return pair(EfficientSequential(modules), nn.Sequential(copy.deepcopy(modules)), **options)


def stages(recompute, bn_size, dims=2, **options):
    """Two blocks around a transition, and one after the last."""

    def modules(block, transition, **mode):
        return OrderedDict(
            denseblock1=block(2, 5, bn_size, 3, dims=dims, **mode),
            transition1=transition(11, 4, dims=dims),
            denseblock2=block(2, 4, bn_size, 3, dims=dims, **mode),
            transition2=transition(10, 5, dims=dims),
        )

    efficient = modules(EfficientDenseBlock, EfficientTransition, recompute=recompute)
    naive = modules(DenseBlock, Transition)
    return pair(EfficientSequential(efficient), nn.Sequential(naive), **options)


@pytest.fixture
def calls(monkeypatch):
    """Counts what runs through the recomputing functions."""
    found = {StemCall: 0, BlockCall: 0}
    for kind in found:
        run = kind.run

        def counted(self, run=run, kind=kind):
            found[kind] += 1
            return run(self)

        monkeypatch.setattr(kind, "run", counted)
    return found


def big(dims):
    """A random image large enough to be halved twice."""
    return torch.randn(3, 5, *(17, 14, 11)[:dims], dtype=torch.float64)


@any_change
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(("dims", "layout"), LAYOUTS)
def test_transition_trains_as_naive_transition(dims, layout, bias, change):
    efficient, naive = transitions(dims, bias, change=change)
    x = image(dims=dims).to(memory_format=layout)
    assert efficient.why_naive(x) is None
    assert_same_training(efficient, naive, x, steps=2)


@pytest.mark.parametrize("expected", [1, 6])
def test_wrong_number_of_channels_is_refused_as_batch_norm_does(expected):
    transition = EfficientTransition(expected, 2)
    x = torch.randn(2, 5, 4, 4)
    assert f"expects {expected} channels and gets 5" in transition.why_naive(x)
    block = EfficientDenseBlock(1, 3, 2, 2)
    for model, shape in (
        (transition, (2, 5, 4, 4)),
        (EfficientSequential(OrderedDict(block=block, transition=transition)), (2, 3, 4, 4)),
        (lambda x: sequence.run_to_average([block, transition.norm], x, 2), (2, 3, 4, 4)),
        (lambda x: sequence.run_to_average([nn.Identity(), transition.norm], x, 2), (2, 5, 4, 4)),
    ):
        with pytest.raises(RuntimeError, match="running_mean should contain 5 elements"):
            model(torch.randn(shape))


@any_change
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(("dims", "layout"), LAYOUTS)
def test_stem_trains_as_naive_stem(calls, dims, layout, bias, change):
    efficient, naive = stems(dims, bias, change=change)
    x = big(dims).to(memory_format=layout)
    assert_same_training(efficient, naive, x, steps=2)
    assert calls[StemCall] == 2


@pytest.mark.parametrize("average", [False, True], ids=["maximum", "average"])
@pytest.mark.parametrize(("dims", "layout"), LAYOUTS)
def test_stem_of_large_samples_is_computed_by_channels(calls, monkeypatch, dims, layout, average):
    """In groups of unequal size, with and without statistics of the batch."""
    monkeypatch.setattr(forward, "LARGE_SAMPLE_BYTES", 16)
    monkeypatch.setattr(forward, "LEAST_CHANNELS", 2)
    walked = []
    walk = forward._stem_channels
    monkeypatch.setattr(forward, "_stem_channels", lambda *args: walked.append(args) or walk(*args))
    pool = AVG_POOLS[dims](3, 2, 1) if average else None
    for change in (no_change, norm_eval, frozen_norm):
        efficient, naive = stems(dims, True, pool=pool, change=change)
        x = big(dims).to(memory_format=layout)
        assert_same_training(efficient, naive, x, steps=2)
    assert len(walked) == 3 * 2 * 3
    assert calls[StemCall] == 3 * 2


@all_dims
def test_stem_with_average_pooling_trains_as_naive_stem(calls, dims):
    efficient, naive = stems(dims, pool=AVG_POOLS[dims](3, 2, 1))
    assert_same_training(efficient, naive, big(dims), steps=2)
    assert calls[StemCall] == 2


@any_change
@both_kinds
@pytest.mark.parametrize("recompute", MODES)
def test_transition_reads_features_inside_block(calls, recompute, bn_size, change):
    efficient, naive = stages(recompute, bn_size, change=change)
    assert_same_training(efficient, naive, big(2), steps=2)
    assert calls[BlockCall] == 2 * 2  # two blocks with their transitions, two steps


@all_dims
@pytest.mark.parametrize("recompute", MODES)
def test_stages_train_as_naive_stages_in_all_dimensions(recompute, dims):
    efficient, naive = stages(recompute, 2, dims)
    assert_same_training(efficient, naive, big(dims), steps=2)


@pytest.mark.parametrize("input_grad", [True, False], ids=["input-grad", "no-input-grad"])
@pytest.mark.parametrize("trained", ["transition2", "denseblock2", "transition1", "denseblock1"])
def test_partly_frozen_stages_train_as_naive_stages(trained, input_grad):
    def change(module):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.startswith(trained))

    efficient, naive = stages("bottleneck", 2, change=change)
    assert_same_training(efficient, naive, big(2), steps=2, input_grad=input_grad)


def test_transition_is_torchvisions():
    theirs = _Transition(5, 3).double()
    randomise_(theirs)
    ours = EfficientTransition(5, 3).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_training(ours, theirs, image(), steps=3)


def eval_mode(module):
    module.eval()


@pytest.mark.parametrize("change", [no_change, eval_mode], ids=lambda c: c.__name__)
@pytest.mark.parametrize("build", [transitions, stems], ids=lambda b: b.__name__)
def test_gradients_pass_gradcheck(build, change):
    efficient, _ = build(bias=True, change=change)
    x = torch.randn(2, 5, 6, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, *_: efficient(x), (x, *efficient.parameters()), fast_mode=True
    )


@pytest.mark.parametrize("build", [transitions, stems], ids=lambda b: b.__name__)
def test_double_backward_is_refused(build):
    efficient, _ = build()
    x = big(2).requires_grad_()
    with pytest.raises(RuntimeError, match='recompute="none"'):
        (grad,) = torch.autograd.grad(efficient(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("build", [transitions, stems], ids=lambda b: b.__name__)
def test_call_without_grad_matches_naive_call(build, training):
    efficient, naive = build()
    efficient.train(training), naive.train(training)
    x = big(2)
    with torch.no_grad():
        assert_close("output", efficient(x), naive(x), 1e-10)
    assert_same_state(efficient, naive)


@pytest.mark.parametrize("build", [transitions, stems], ids=lambda b: b.__name__)
def test_slabs_of_one_sample_change_nothing(build, monkeypatch):
    from efficient_densenet.kernels import workspace

    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 1)
    efficient, naive = build(bias=True)
    assert_same_training(efficient, naive, big(2), steps=2)


# What is kept


def kept_storages(module, x):
    """Storages saved for backward, but those of parameters, buffers and the input."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = module(x)
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers(), x)}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in saved}
    return sum(s.nbytes() for p, s in storages.items() if p not in own), out


@all_dims
@pytest.mark.parametrize("build", [transitions, stems], ids=lambda b: b.__name__)
def test_only_input_and_vectors_are_kept(build, dims):
    efficient, naive = build(dims)
    x = big(dims).requires_grad_()
    vectors = 2 * 6 * x.element_size()
    assert kept_storages(efficient, x)[0] <= vectors
    assert kept_storages(naive, x)[0] > 10 * vectors


def test_stages_keep_only_their_features():
    efficient, _ = stages("bottleneck", 2)
    x = torch.randn(3, 5, 32, 36, dtype=torch.float64).requires_grad_()
    features = 3 * 8 * (11 * 32 * 36 + 10 * 16 * 18)
    assert kept_storages(efficient, x)[0] == pytest.approx(features, rel=0.02)


# What falls back


def hook_transition(module):
    module.transition1.register_forward_hook(lambda m, args, out: out * 2)


def hook_block(module):
    module.denseblock1.register_forward_hook(lambda m, args, out: out * 2)


def hook_inner_norm(module):
    module.transition1.norm.register_forward_hook(lambda m, args, out: out * 2)


def other_pool(module):
    module.transition1.pool = nn.MaxPool2d(2, 2)


def padded_pool(module):
    module.transition1.pool = nn.AvgPool2d(2, 2, padding=1)


def ceiling_pool(module):
    module.transition1.pool = nn.AvgPool2d(2, 2, ceil_mode=True)


def wide_convolution(module):
    module.transition1.conv = nn.Conv2d(11, 4, 3, padding=1).double()


def extra_child(module):
    module.transition1.add_module("extra", nn.Tanh())


def own_forward(module):
    plain = module.transition1.forward
    module.transition1.forward = lambda x: plain(x) + 1


FALLBACKS = (
    hook_transition,
    hook_block,
    hook_inner_norm,
    other_pool,
    padded_pool,
    ceiling_pool,
    wide_convolution,
    extra_child,
    own_forward,
)


@pytest.mark.parametrize("change", FALLBACKS, ids=lambda c: c.__name__)
def test_unknown_module_is_called_by_itself(change):
    efficient, naive = stages("bottleneck", 2, change=change)
    assert_same_training(efficient, naive, big(2), steps=2)


def hook_on_relu(module):
    module.relu0.register_forward_hook(lambda m, args, out: out * 2)


def reflecting(module):
    module.conv0 = nn.Conv2d(5, 6, 3, padding=1, padding_mode="reflect").double()


def padding_by_name(module):
    module.conv0 = nn.Conv2d(5, 6, 3, padding="same").double()


@pytest.mark.parametrize("change", [hook_on_relu, reflecting, padding_by_name])
def test_unknown_stem_is_called_module_by_module(calls, change):
    efficient, naive = stems(change=change)
    assert_same_training(efficient, naive, big(2))
    assert calls[StemCall] == 0


def test_stem_without_its_pool_is_called_module_by_module(calls):
    modules = stem_modules()
    del modules["pool0"]
    efficient, naive = pair(EfficientSequential(modules), nn.Sequential(copy.deepcopy(modules)))
    assert_same_training(efficient, naive, big(2))
    assert calls[StemCall] == 0


@all_dims
def test_one_value_per_channel_is_refused_as_batch_norm_does(dims):
    size = (1,) * dims
    for efficient, channels in ((transitions(dims)[0], 5), (stems(dims)[0], 5)):
        x = torch.randn(1, channels, *size, dtype=torch.float64)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            efficient(x)


# As modules


@pytest.mark.parametrize("build", [transitions, stems, lambda: stages("norm", 2)])
def test_copies_are_independent_and_efficient(build):
    efficient, naive = build()
    buffer = io.BytesIO()
    torch.save(efficient, buffer)
    buffer.seek(0)
    duplicates = (
        copy.deepcopy(efficient),
        pickle.loads(pickle.dumps(efficient)),
        torch.load(buffer, weights_only=False),
    )
    with torch.no_grad():
        for parameter in efficient.parameters():
            parameter.zero_()
    for duplicate in duplicates:
        twin = copy.deepcopy(naive)
        assert type(duplicate) is type(efficient)
        assert_same_training(duplicate, twin, big(2))


# In a model


def model_pair(change=no_change, **options):
    arguments = (3, (2, 2), 6, 2, 0.0, 4)
    efficient = DenseNet(*arguments, **options)
    naive = DenseNet(*arguments, recompute="none", **options)
    return pair(efficient, naive, change)


def test_model_runs_stem_and_stages_together(calls):
    model, naive = model_pair()
    x = torch.randn(3, 3, 33, 35, dtype=torch.float64)
    assert_same_training(model, naive, x, rtol=1e-9)
    assert calls == {StemCall: 1, BlockCall: 2}


def observe(name):
    def change(model):
        model.seen = []
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, args, out: model.seen.append(out.detach().clone()))
        module.register_full_backward_hook(
            lambda m, ins, outs: model.seen.append(outs[0].detach().clone())
        )

    return change


HOOKED = ("features", "features.denseblock2", "features.transition1", "features.norm5")


@pytest.mark.parametrize("name", (*HOOKED, "features.denseblock2.denselayer2"))
def test_hooks_see_what_they_see_in_naive_model(name):
    model, naive = model_pair(observe(name))
    x = torch.randn(3, 3, 65, 67, dtype=torch.float64)
    assert_same_training(model, naive, x, rtol=1e-9)
    assert len(model.seen) == len(naive.seen) == 2
    for ours, theirs in zip(model.seen, naive.seen, strict=True):
        assert_close(name, ours, theirs, 1e-9)


def test_features_may_be_called_by_themselves():
    model, naive = model_pair()
    x = torch.randn(3, 3, 33, 35, dtype=torch.float64)
    assert_same_training(model.features, naive.features, x, rtol=1e-9)


def without_head(model):
    model.features.norm5 = nn.Identity()


def with_tail(model):
    model.features.add_module("tail", nn.Conv2d(12, 12, 1).double())


@pytest.mark.parametrize("change", [without_head, with_tail], ids=lambda c: c.__name__)
def test_changed_model_is_run_as_it_is(change):
    model, naive = model_pair(change)
    x = torch.randn(3, 3, 33, 35, dtype=torch.float64)
    assert_same_training(model, naive, x, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_every_part_naive_types(dtype):
    model, naive = model_pair()
    model.float(), naive.float()
    x = torch.randn(4, 3, 33, 35).requires_grad_()

    def run(module):
        twin = x.detach().clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            logits = module(twin)
        logits.float().square().sum().backward()
        return logits, twin.grad, [p.grad for p in module.parameters()]

    (ours, dx, grads), (theirs, their_dx, their_grads) = run(model), run(naive)
    assert ours.dtype == theirs.dtype
    assert dx.dtype == their_dx.dtype
    assert [g.dtype for g in grads] == [g.dtype for g in their_grads]
    error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    assert error < 20 * torch.finfo(dtype).eps


def test_networks_are_as_precise_as_naive_ones():
    """In float32 against float64: logits and gradients of a small network, several draws."""
    errors = {"ours": [], "naive": []}
    for seed in range(9):
        torch.manual_seed(seed)
        model, naive = model_pair()
        x = torch.randn(4, 3, 33, 35, dtype=torch.float64)
        truth = training_results(copy.deepcopy(naive), x.clone().requires_grad_())
        upstream = None
        for name, module in (("ours", model), ("naive", naive)):
            got = training_results(module.float(), x.float().requires_grad_(), upstream)
            error = [((got[k].double() - v).norm() / v.norm()).item() for k, v in truth.items()]
            errors[name].append(sum(e * e for e in error) ** 0.5)
    error, allowed = (sorted(errors[name])[4] for name in ("ours", "naive"))
    assert error <= 1.5 * allowed + torch.finfo(torch.float32).eps


def test_results_do_not_depend_on_running_together():
    model, _ = model_pair()
    apart = copy.deepcopy(model)
    for module in apart.features:
        module.register_forward_hook(lambda m, args, out: None)
    x = torch.randn(3, 3, 33, 35, dtype=torch.float64)
    results = [training_results(m, x.clone().requires_grad_()) for m in (model, apart)]
    assert_all_close(*results, 1e-10)
    assert_same_state(model, apart)


def test_sequence_knows_stem():
    modules = list(stem_modules().values())
    x = torch.randn(2, 5, 9, 9)
    call, count = sequence.read_stem(modules, x, "auto")
    assert count == 4 and call.run().shape == (2, 6, 3, 3)
    assert sequence.read_stem(modules[:3], x, "auto") is None
    assert sequence.read_stem(modules[::-1], x, "auto") is None


def norms_of_exits_in_training(module):
    module.eval()
    for name in ("transition1", "norm5"):
        if hasattr(module, name):
            getattr(module, name).train()


def test_exit_of_one_value_per_channel_is_refused_as_batch_norm_does():
    efficient, _ = stages("norm", 2, change=norms_of_exits_in_training)
    model, _ = model_pair(lambda m: norms_of_exits_in_training(m.features))
    for module, shape in ((efficient, (1, 5, 1, 1)), (model, (1, 3, 8, 8))):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            module(torch.randn(shape, dtype=torch.float64))


def test_empty_batch_passes_in_evaluation_mode():
    model, naive = model_pair(nn.Module.eval)
    x = torch.randn(0, 3, 33, 35, dtype=torch.float64)
    assert_same_training(model, naive, x)


def test_hook_on_last_norm_holds_what_caller_changes_in_place():
    features, held = EfficientSequential(OrderedDict(norm=nn.BatchNorm2d(4))), []
    features.norm.register_forward_hook(lambda module, args, output: held.append(output))
    out = features(torch.randn(2, 4, 5, 5))
    F.relu(out, inplace=True)
    assert torch.equal(held[0], out)


def test_change_of_features_in_place_is_refused_with_remedy():
    block = EfficientDenseBlock(2, 4, 2, 4)
    out = block(torch.randn(2, 4, 5, 5))
    out *= 2
    with pytest.raises(RuntimeError, match=r"modified by an inplace[\s\S]*x = x \* y instead"):
        out.sum().backward()
