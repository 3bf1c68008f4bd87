"""Stems, transitions and heads keep their inputs alone, and train exactly as the naive ones."""

import copy

import pytest
import torch
from torchvision.models.densenet import _Transition

from efficient_densenet import DenseNet, estimate
from efficient_densenet.functional import stem
from efficient_densenet.modules import sequence
from efficient_densenet.modules.calls import BlockCall, StemCall
from efficient_densenet.modules.naive import AVG_POOLS, CONVS
from efficient_densenet.modules.recomputing import Settings
from efficient_densenet.modules.sequence import EfficientTransition
from support.compare import (
    FORMATS,
    MODES,
    SPATIAL,
    assert_close,
    assert_same_state,
    assert_same_training,
    image,
    norms,
    randomise_,
)
from support.copies import pickled, saved_whole
from support.marks import all_dims, both_kinds
from support.stages import big, no_change, stages, stem_modules, stems, transitions

LAYOUTS = [
    pytest.param(dims, layout, id=f"{dims}d-{layout}".replace("torch.", ""))
    for dims in SPATIAL
    for layout in (torch.contiguous_format, FORMATS.get(dims, None))
    if layout
]


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


@any_change
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(("dims", "layout"), LAYOUTS)
def test_transition_trains_as_naive_transition(dims, layout, bias, change):
    efficient, naive = transitions(dims, bias, change=change)
    x = image(dims=dims).to(memory_format=layout)
    assert efficient.why_naive(x) is None
    assert_same_training(efficient, naive, x, steps=2)


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
    monkeypatch.setattr(stem, "LARGE_SAMPLE_BYTES", 16)
    monkeypatch.setattr(stem, "LEAST_CHANNELS", 2)
    walked = []
    walk = stem._stem_channels
    monkeypatch.setattr(stem, "_stem_channels", lambda *args: walked.append(args) or walk(*args))
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


@pytest.mark.parametrize("build", [transitions, stems, lambda: stages("norm", 2)])
def test_copies_are_independent_and_efficient(build):
    efficient, naive = build()
    duplicates = copy.deepcopy(efficient), pickled(efficient), saved_whole(efficient)
    with torch.no_grad():
        for parameter in efficient.parameters():
            parameter.zero_()
    for duplicate in duplicates:
        twin = copy.deepcopy(naive)
        assert type(duplicate) is type(efficient)
        assert_same_training(duplicate, twin, big(2))


def test_sequence_knows_stem():
    modules = list(stem_modules().values())
    x = torch.randn(2, 5, 9, 9)
    call, count = sequence.read_stem(modules, x, "auto")
    assert count == 4 and call.run().shape == (2, 6, 3, 3)
    assert sequence.read_stem(modules[:3], x, "auto") is None
    assert sequence.read_stem(modules[::-1], x, "auto") is None


# What has a mode by the beginning of its name, and how many blocks and stems run.
MIXES = {
    "stem alone": ({"": "norm"}, 0, 1),
    "all but stem": ({"denseblock": "norm", "transition": "norm"}, 3, 0),
    "blocks alone": ({"denseblock": "bottleneck"}, 3, 0),
    "transitions alone": ({"transition": "norm"}, 2, 0),
    "first block alone": ({"denseblock1": "bottleneck"}, 1, 0),
    "first block and transition": ({"denseblock1": "norm", "transition1": "norm"}, 1, 0),
    "first block and other transition": ({"denseblock1": "norm", "transition2": "norm"}, 2, 0),
}


@pytest.mark.parametrize(("mix", "blocks", "stems"), MIXES.values(), ids=MIXES)
def test_every_part_has_mode_of_its_own(calls, mix, blocks, stems):
    model = DenseNet(4, (2, 2, 2), 8, 2, num_classes=3, recompute="none").double()
    naive = copy.deepcopy(model)
    for name, module in model.features.named_modules():
        for start, mode in mix.items():
            if isinstance(module, Settings) and (name.startswith(start) if start else not name):
                module.recompute = mode
    assert_same_training(model, naive, torch.randn(4, 3, 40, 36, dtype=torch.float64), steps=2)
    assert (calls[BlockCall], calls[StemCall]) == (2 * blocks, 2 * stems)


def test_head_is_as_last_block():
    """Naive after a naive block, inside one that recomputes."""
    model = DenseNet(4, (2, 2), 8, 2, num_classes=3, recompute="norm")
    x = torch.randn(2, 3, 64, 64)
    inside = estimate(model, x).kept
    model.features.denseblock2.recompute = "none"
    model.features.recompute = "none"
    after = estimate(model, x).kept
    features = 2 * 16 * 4 * 4 * 4  # samples, channels, rows, columns, bytes
    assert after >= inside + 2 * features
