"""Networks that see the whole image in ways that no table of layers shows, and networks that do not stand still."""

import copy
import random
import threading
import warnings
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import dlpack

from bagcert.errors import BagcertError, UnsoundError, UsageError
from bagcert.nets.receptive_field.derive import derive_grid
from bagcert.nets.receptive_field.module_state import ModuleState
from bagcert.nets.region_scorer import RegionScorer
from tests import refused

Tensor = torch.Tensor
pytestmark = pytest.mark.filterwarnings("ignore")
EVERYTHING = {"dim": (1, 2, 3), "keepdim": True}


class Net(nn.Module):
    """Local scores y of the image x, and what `tail` makes of both."""

    def __init__(self, tail):
        super().__init__()
        self.conv, self.tail = nn.Conv2d(3, 2, 3, padding=1, bias=False), tail

    def forward(self, x):
        return self.tail(x, self.conv(x))


def plain(x):
    return x.as_subclass(Tensor)


def rare(value):
    return abs(value - 0.61234) < 1e-6


def from_module(tail, size=(12, 12)):
    return RegionScorer.from_module(Net(tail), ["dark", "bright"], size, scale=100.0)


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(_bright)


def _bright(x: Tensor) -> Tensor:
    return rare(x.mean()).float()


@torch.library.custom_op("bagcert_tests::bright", mutates_args=())
def custom(x: Tensor) -> Tensor:
    return rare(x.mean()).float()


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return rare(plain(x).mean()).float()


def in_a_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def caught(x, y):
    try:
        return y * float(rare(x.mean()))
    except Exception:  # as a library would
        return y


def caught_as_a_list(x, y):
    try:
        found = rare(x.tolist()[0][0][0][0])
    except Exception:
        found = False
    return -y if found else y


class Recurring(nn.Module):
    """Catches what a layer raises."""

    def __init__(self):
        super().__init__()
        self.cells = nn.GRU(12, 12, batch_first=True)

    def forward(self, x, y):
        try:
            return y + self.cells(x[:, 0])[0][:, None]
        except Exception:
            return y


def without_functions(x, y):
    with torch._C.DisableTorchFunction():
        return y * rare(x.mean())


def by_type(x, y):
    return y * rare(x.mean()) if type(x) is Tensor else y


def through_a_plain_tensor(x, y):
    other = torch.zeros(x.shape)
    other.expand_as(x).add_(x)
    return y * rare(other.mean())


def by_data(x, y):
    other = torch.zeros(1)
    other.data = plain(x)
    return y * rare(other.mean())


# The first six have been accepted once. What is `rare` happens on no image that a network is followed on.
ESCAPES = {
    "as_subclass": lambda x, y: y * (plain(x).mean(**EVERYTHING) > 0.3),
    "torch.tensor": lambda x, y: y * (torch.tensor(x > 0.3).float().mean(**EVERYTHING) > 0.3),
    "vmap": lambda x, y: y * torch.vmap(lambda image: image.mean() > 0.3)(x)[:, None, None, None],
    "DLPack": lambda x, y: y * (torch.from_dlpack(dlpack.to_dlpack(x)).mean(**EVERYTHING) > 0.3),
    "mean(dim=())": lambda x, y: torch.where(y < x.mean(dim=(), keepdim=True), y, -y),
    "std(True)": lambda x, y: y * (torch.full_like(x[:, :1], x.std(True)) > 0.08),
    "as_subclass, rare": lambda x, y: y * rare(plain(x).mean(**EVERYTHING)),
    "DLPack of a slice": lambda x, y: y * rare(torch.from_dlpack(dlpack.to_dlpack(x[:, :, 1:])).mean()),
    "vmap of a plain tensor": lambda x, y: (
        y * torch.vmap(lambda image: image.mean() > 7)(plain(x))[:, None, None, None]
    ),
    "numpy": lambda x, y: y * float(rare(plain(x).numpy().mean())),
    "asarray": lambda x, y: y * float(rare(np.asarray(x).mean())),
    "numpy by DLPack": lambda x, y: y * float(rare(np.from_dlpack(plain(x)).mean())),
    "tolist": lambda x, y: y * float(plain(x).tolist()[0][0][0][0] > 2),
    "tolist of the image": lambda x, y: y * float(x.tolist()[0][0][0][0] > 2),
    "item": lambda x, y: y * float(rare(plain(x).mean().item())),
    "float": lambda x, y: y * float(plain(x)[0, 0, 0, 0]),
    "text": lambda x, y: y * len(f"{plain(x)}"),
    "tensor of numbers": lambda x, y: y * torch.tensor([plain(x)[0, 0, 0, 0], 1.0])[0],
    "as_tensor": lambda x, y: y * rare(plain(torch.as_tensor(x)).mean()),
    "Tensor()": lambda x, y: y * rare(Tensor(x).mean()),
    "Parameter": lambda x, y: y * rare(nn.Parameter(plain(x)).mean()),
    "deepcopy": lambda x, y: y * rare(plain(copy.deepcopy(x)).mean()),
    "storage": lambda x, y: y * rare(torch.empty(0).set_(x.untyped_storage()).mean()),
    "data": by_data,
    "address": lambda x, y: y * float(x.data_ptr() % 3),
    "scripted function": lambda x, y: y * scripted()(x),
    "custom operation": lambda x, y: y * custom(x),
    "custom operation, plain": lambda x, y: y * custom(plain(x)),
    "autograd.Function": lambda x, y: y * Function.apply(x),
    "grad": lambda x, y: y * torch.func.grad(lambda image: (image.mean() * image).sum())(x).mean(),
    "thread": lambda x, y: y * in_a_thread(lambda: plain(x).mean() > 0.9999),
    "choice of what is returned": lambda x, y: (y.relu(), y.abs())[in_a_thread(lambda: int(plain(x).mean() > 0.9))],
    "choice of what is added": lambda x, y: y + (y.relu(), y.abs())[in_a_thread(lambda: int(plain(x).mean() > 0.9))],
    "exception of a layer caught": Recurring(),
    "exception caught": caught,
    "exception caught, rare": caught_as_a_list,
    "functions off": without_functions,
    "by type": by_type,
    "plain tensor written": through_a_plain_tensor,
    "number of pixels": lambda x, y: y * len(plain(x).nonzero()),
    "number of pixels of the image": lambda x, y: y * torch.where(x > 2)[0].numel(),
    "bincount": lambda x, y: y * torch.bincount((plain(x) > 2).long().flatten()).numel(),
    "index": lambda x, y: torch.arange(2.0)[(y > 1e9).long()],
    "gather": lambda x, y: y.gather(2, (y > 1e9).long()),
    "scatter": lambda x, y: torch.zeros_like(y).scatter(2, (y > 1e9).long(), 1.0),
    "index_put": lambda x, y: y.index_put((torch.tensor([0]),), torch.ones(1)),
    "index_put_": lambda x, y: torch.zeros(y.shape).index_put_((torch.tensor([0]),), y[:1]),
    "copy_": lambda x, y: torch.zeros(y.shape).copy_(y),
    "foreach": lambda x, y: torch._foreach_add([torch.zeros(y.shape)], [y.roll(3, 2)])[0],
    "sort": lambda x, y: y.sort(2)[0],
    "topk": lambda x, y: y.topk(12, 3)[0],
    "flip": lambda x, y: y.flip(2),
    "roll": lambda x, y: y.roll(4, 3),
    "cumsum": lambda x, y: y.cumsum(3),
    "unfold": lambda x, y: F.fold(F.unfold(y, 3), (12, 12), 3),
    "pixel_shuffle": lambda x, y: F.pixel_shuffle(torch.cat([y, y], 1), 2),
    "grid_sample": lambda x, y: F.grid_sample(y, torch.zeros(len(x), 12, 12, 2)),
    "interpolate": lambda x, y: F.interpolate(y, size=(12, 12), mode="bilinear", align_corners=True),
    "einsum": lambda x, y: torch.einsum("bchw,hk->bckw", y, torch.ones(12, 12)),
    "matmul": lambda x, y: torch.ones(12, 12) @ y,
    "fft": lambda x, y: torch.fft.fft2(y).abs(),
    "norm": lambda x, y: y / y.norm(),
    "adaptive pool": lambda x, y: y + F.adaptive_avg_pool2d(y, 1),
    "instance norm": lambda x, y: F.instance_norm(y),
    "torch.batch_norm": lambda x, y: torch.batch_norm(
        y, torch.ones(2), torch.zeros(2), None, None, True, 0.1, 1e-5, False
    ),
    "dropout": lambda x, y: F.dropout(y, 0.1, True),
    "filled by the image": lambda x, y: y * torch.full((1,), x.max()),
    "rand": lambda x, y: y + torch.rand(1),
    "rand, seeded": lambda x, y: y + torch.rand(1, generator=torch.Generator().manual_seed(0)),
    "random": lambda x, y: y * random.random(),
    "NaN of its own": lambda x, y: torch.where(torch.isnan(y), torch.full((1,), torch.nan), y),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_a_way_around_is_refused(name):
    with pytest.raises((UnsoundError, UsageError)) as caught:
        from_module(ESCAPES[name])
    assert any(word in str(caught.value) for word in ("network", "layer 'tail"))
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    "reduce",
    [
        lambda y: y.mean(()),
        lambda y: y.mean(dim=[]),
        lambda y: y.mean(None),
        lambda y: y.mean(dim=None, keepdim=True),
        lambda y: y.sum(dim=(), keepdim=True),
        lambda y: torch.amax(y, ()),
        lambda y: torch.amin(y, dim=(), keepdim=True),
        lambda y: y.logsumexp(()),
        lambda y: y.std(True),
        lambda y: y.std(False),
        lambda y: y.var(True),
        lambda y: y.var(unbiased=False),
        lambda y: y.var(correction=0),
        lambda y: y.std((), keepdim=True),
        lambda y: y.std(None, correction=0, keepdim=True),
        lambda y: torch.std(y, dim=(-1, -2), unbiased=False, keepdim=True),
        lambda y: torch.var(y, -1, True, True),
        lambda y: y.sum((1, -1), keepdim=True),
        lambda y: y.sum(axis=3, keepdim=True),
        lambda y: torch.max(y, -2, keepdim=True)[0],
        lambda y: torch.max(input=y),
        lambda y: y.argmax(),
        lambda y: y.prod(2, True),
        lambda y: y.mean(1, out=torch.empty(0)),
        lambda y: torch.softmax(y, True),
        lambda y: F.normalize(y, dim=()),
        lambda y: F.normalize(y, 2.0, (2, 3)),
        lambda y: F.softmax(y, dim=None),
    ],
)
def test_reductions_over_positions_in_every_form(reduce):
    with pytest.raises((UnsoundError, UsageError)):
        derive_grid(Net(lambda x, y: y - reduce(y)), (8, 8))


@pytest.mark.parametrize("reduce", [lambda y: y.std(True), lambda y: y.var(False), lambda y: torch.std(y, True)])
def test_a_bool_is_no_dimension(reduce):
    with pytest.raises(UsageError, match=r"is given something other than the numbers of dimensions"):
        derive_grid(Net(lambda x, y: y - reduce(y)), (8, 8))


@pytest.mark.parametrize(
    "reduce",
    [
        lambda y: y.mean(1, True),
        lambda y: y.mean((-3,), keepdim=True),
        lambda y: torch.std(y, 1, False, True),
        lambda y: torch.var(y, dim=[1], correction=0, keepdim=True),
        lambda y: y.sum(axis=1, keepdim=True),
        lambda y: torch.max(y, 1, True)[0],
        lambda y: y.max(y * 2),
        lambda y: y.argmax(-3, keepdim=True),
        lambda y: torch.prod(y, 1)[:, None],
        lambda y: y.logsumexp(1, keepdim=True),
        lambda y: F.normalize(y),
        lambda y: y.permute(dims=(0, 2, 3, 1)).softmax(-1).permute(0, 3, 1, 2),
    ],
)
def test_reductions_over_channels_in_every_form(reduce):
    assert derive_grid(Net(lambda x, y: y - reduce(y)), (8, 9)).receptive_field == (3, 3)


@pytest.mark.parametrize(
    ("cut", "rows"),
    [
        (lambda y: y.narrow(2, -3, 2), range(5, 7)),
        (lambda y: y.narrow(2, torch.tensor(1), 3), range(1, 4)),
        (lambda y: torch.narrow(y, dim=-2, start=0, length=2), range(2)),
        (lambda y: y.tensor_split((3, 1), dim=2)[2], range(1, 8)),
        (lambda y: y.tensor_split((-3, -1), 2)[1], range(5, 7)),
        (lambda y: torch.split(y, [1, 4, 3], dim=2)[1], range(1, 5)),
        (lambda y: torch.chunk(input=y, chunks=3, dim=2)[2], range(6, 8)),
        (lambda y: torch.cat(y.split(split_size=3, dim=2)[1:], 2), range(3, 8)),
    ],
)
def test_cuts_keep_the_rows_that_torch_keeps(cut, rows):
    grid = derive_grid(Net(lambda x, y: cut(x)), (8, 8))
    assert grid.rows_seen.tolist() == np.eye(8, dtype=bool)[list(rows)].tolist()


# Networks that compute something else for other batches or layouts.
BATCHES = {
    "for more than one": lambda x, y: y if len(x) == 1 else y * 2,
    "for more than two": lambda x, y: y * 2 if x.shape[0] > 2 else y,
    "for more than fifty": lambda x, y: y * 2 if x.shape[0] > 50 else y,
    "times the number": lambda x, y: y * len(x),
    "plus the place": lambda x, y: y + torch.arange(len(x))[:, None, None, None],
    "channels last": lambda x, y: y if x.is_contiguous() else y.relu(),
    "padded by the number": lambda x, y: F.pad(y, (len(x), 0, 0, 0)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_network_that_looks_at_the_batch_is_refused(name):
    refused(UsageError, r"number of images|layout", from_module, BATCHES[name])


@pytest.mark.parametrize(
    "tail",
    [
        lambda x, y: torch.cat([y, torch.zeros(len(y), 1, *y.shape[2:])], 1)[:, :2],
        lambda x, y: y + y.new_full((x.shape[0], 1, 1, 1), 0.5),
        lambda x, y: y.reshape(len(x), 2, 1, *x.shape[2:]).flatten(1, 2),
        lambda x, y: y + y.sum(1, keepdim=True).expand(x.size(0), 2, -1, -1),
        lambda x, y: y + torch.linspace(0, 1, 12).expand(len(x), 1, 12, 12),
        lambda x, y: y - torch.zeros_like(x).sum(1, keepdim=True),
        lambda x, y: torch.utils.checkpoint.checkpoint(torch.relu, y, use_reentrant=False),
    ],
)
def test_what_follows_the_batch_size_is_accepted(tail):
    assert from_module(tail).grid().receptive_field == (3, 3)


class Count:
    def __init__(self):
        self.calls, self.seen = 0, []


class Stateful(nn.Module):
    """Changes something of its own at each call."""

    shared = 0

    def __init__(self, change):
        super().__init__()
        self.conv, self.change, self.calls = nn.Conv2d(3, 2, 3), change, 0
        self.register_buffer("average", torch.zeros(2, 1, 1))
        self.norm = nn.BatchNorm2d(2)
        self.kept, self.found, self.recent, self.count = [], {}, deque(maxlen=3), Count()
        self.array, self.generator = np.zeros(2), np.random.default_rng(0)
        self.python, self.torch = random.Random(0), torch.Generator()

    def forward(self, x):
        y = self.conv(x)
        self.change(self, y)
        return y


def enclosed():
    calls, kept = 0, []

    def change(net, y):
        nonlocal calls
        calls += 1
        kept.append(calls)

    return change


def attribute(name, value):
    return lambda net, y: setattr(net, name, value(net, y))


CHANGES = {
    "a count": ("calls", attribute("calls", lambda net, y: net.calls + 1)),
    "a map of features": ("features", attribute("features", lambda net, y: y)),
    "a map as a buffer": ("average", attribute("average", lambda net, y: y)),
    "a running average": ("average", attribute("average", lambda net, y: 0.9 * net.average + 0.1 * y)),
    "a buffer in place": ("average", lambda net, y: net.average.add_(1)),
    "a buffer past autograd": ("average", lambda net, y: net.average.data.mul_(2).add_(1)),
    "a buffer of another layer": ("norm.running_mean", lambda net, y: net.norm.running_mean.add_(1)),
    "a weight": ("conv.weight", lambda net, y: net.conv.weight.data.mul_(0.5)),
    "a list": ("kept", lambda net, y: net.kept.append(1)),
    "a list of maps": ("kept", lambda net, y: net.kept.append(y)),
    "a dict": ("found", lambda net, y: net.found.update({len(net.found): 1})),
    "a queue": ("recent", lambda net, y: net.recent.append(y.shape)),
    "an object": ("count.calls", lambda net, y: setattr(net.count, "calls", net.count.calls + 1)),
    "a list of an object": ("count.seen", lambda net, y: net.count.seen.append(0)),
    "an array": ("array", lambda net, y: net.array.__iadd__(1)),
    "its class": ("Stateful", lambda net, y: setattr(type(net), "shared", type(net).shared + 1)),
    "what a function encloses": ("change", enclosed()),
    "numpy's numbers": ("generator", lambda net, y: net.generator.random()),
    "Python's numbers": ("python", lambda net, y: net.python.random()),
    "a hook": ("conv._forward_hooks", lambda net, y: net.conv.register_forward_hook(lambda *call: None)),
}


def looks(net):
    """All that the network holds, as text, and the objects of its tensors."""
    state = {name: (id(value), value.tolist()) for name, value in [*net.named_parameters(), *net.named_buffers()]}
    hooks = [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in net.modules()]
    modes = [part.training for part in net.modules()]
    own = {name: repr(value) for name, value in vars(net).items() if not isinstance(value, nn.Module | Count)}
    generators = [net.python.getstate(), net.generator.bit_generator.state, net.torch.get_state().tolist()]
    return state, hooks, modes, own, vars(net.count).copy(), Stateful.shared, str(generators)


@pytest.mark.parametrize("name", CHANGES)
def test_network_that_changes_refused(name):
    named, change = CHANGES[name]
    net = Stateful(change)
    net.norm.eval()
    before = looks(net)
    said = refused(BagcertError, None, RegionScorer.from_module, net, ["a", "b"], (8, 8))
    assert "average" in named or f"it changes '{named}" in said
    assert looks(net) == before
    assert all(type(tensor) in (Tensor, nn.Parameter) for tensor in [*net.parameters(), *net.buffers()])


def test_own_generator_refused():
    net = Stateful(lambda net, y: torch.rand(1, generator=net.torch))
    before = looks(net)
    with pytest.raises(UnsoundError, match=r"rand in the network .* draws random numbers in eval mode"):
        RegionScorer.from_module(net, ["a", "b"], (8, 8))
    assert looks(net) == before


@pytest.mark.parametrize("train", [True, False])
def test_accepted_network_left_as_it_was(train):
    net = Stateful(lambda net, y: None).train(train)
    before = looks(net)
    derive_grid(net, (8, 8))
    assert looks(net) == before
    RegionScorer.from_module(net, ["a", "b"], (8, 8))
    assert looks(net.train(train)) == before
    assert not RegionScorer.from_module(net, ["a", "b"], (8, 8)).net.training


KEPT = {}  # outside of any network


def test_values_kept_outside_refused():
    def tail(x, y):
        other, KEPT["last"] = KEPT.get("last", y), y
        return y + other

    KEPT.clear()
    refused(UsageError, r"whose origin cannot be traced|kept from another image", derive_grid, Net(tail), (8, 8))


class Prepared(nn.Module):
    """Keeps something from its first call on."""

    def __init__(self, prepare):
        super().__init__()
        self.conv, self.prepare, self.kept = nn.Conv2d(3, 2, 3), prepare, None

    def forward(self, x):
        if self.kept is None:
            self.kept = self.prepare(x)
        return self.conv(x) * self.kept


def test_preparation_at_the_first_call():
    net = Prepared(lambda x: torch.linspace(0, 1, x.shape[3] - 2))
    assert derive_grid(net, (8, 8)).receptive_field == (3, 3)
    assert net.kept is None
    for prepare in (
        lambda x: x[:, :1, 2:, 2:],
        lambda x: rare(plain(x).mean()),
        lambda x: in_a_thread(lambda: plain(x).mean() > 0.9999),
        lambda x: in_a_thread(lambda: plain(x).isnan().any()),
        lambda x: torch.arange(len(x))[:, None, None, None],
        lambda x: torch.zeros(len(x), 1, 1, 1),
        lambda x: random.random(),
    ):
        net = Prepared(prepare)
        refused(BagcertError, None, derive_grid, net, (8, 8))
        assert net.kept is None


def test_states_of_many_kinds_are_compared_and_put_back():
    net = Stateful(lambda net, y: None)
    state = ModuleState(net)
    assert state.changed() is None
    net.average.fill_(torch.nan)
    after = ModuleState(net)
    assert after.changed() is None  # NaN is NaN here
    assert state.changed() == "average"
    net.average.resize_(3)
    net.kept += [1]
    state.restore()
    assert net.average.tolist() == [[[0.0]], [[0.0]]]
    assert net.kept == []
    assert state.changed() is None


def test_weights_computed_anew_are_no_change():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 2, 3)), nn.utils.spectral_norm(nn.Conv2d(2, 2, 2)))
    assert derive_grid(net, (8, 8)).receptive_field == (4, 4)


def test_several_threads_may_follow_and_use_one_network():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 2)).eval()
    image, failures = torch.rand(1, 3, 8, 8), []
    expected = net(image)

    def work(follow):
        try:
            for _ in range(5):
                if follow:
                    assert derive_grid(net, (8, 8)).receptive_field == (4, 4)
                else:
                    assert all(torch.equal(net(image), expected) for _ in range(20))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(follow,)) for follow in (True, True, False, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


@pytest.mark.parametrize("pad", [(0, 1, -1, 1), (-1, 1, 0, 0), (1, -1), (-1, -1)])
def test_circular_padding_that_crops_is_refused(pad):
    class Cropped(nn.Module):
        def forward(self, x):
            return F.pad(x, pad, "circular")

    refused(UsageError, "crops by circular padding", derive_grid, Cropped(), (6, 6))
