"""What must hold for every algorithm on every kind of layer, as functions that raise `AssertionError`.

All of it runs in float64, where two ways of computing the same thing agree to about 1e-15 and a wrong one does not.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lycoris.adapters import attach
from lycoris.adapters.adapter import Adapter
from lycoris.adapters.adapter_set import AdapterSet
from lycoris.algorithms import ALGORITHMS
from lycoris.algorithms.base import Algorithm
from lycoris.algorithms.layer_below import BareWeight
from lycoris.errors import ConfigError
from lycoris.files import read, write
from lycoris.layers.sites import ModelSites
from lycoris.targeting.planning import Rule, plan
from lycoris.testing.layers import LAYERS, LayerCase, OneLayer

TOLERANCE = 1e-10
FILE_TOLERANCE = 1e-6
"""Files store alpha in float32."""

Check = Callable[[Algorithm, LayerCase], None]


def check_algorithm(algorithm: Algorithm, layers: Iterable[str] = tuple(LAYERS)) -> None:
    """Run every contract over an algorithm, on all of these kinds of layers that it serves.

    Args:
        algorithm: the settings to check; call this once per combination of settings that takes a path of its own.
        layers: names in `lycoris.testing.layers.LAYERS`.

    Raises:
        AssertionError: a contract does not hold; the message names it, the algorithm and the layer.
    """
    served = [name for name in layers if serves(OneLayer(LAYERS[name].layer()), algorithm)]
    assert served, f"{algorithm} serves none of the layers {', '.join(layers)}: see its `kinds`, `check` and `slots`"
    for name in served:
        for check in CONTRACTS:
            with _naming(f"{algorithm} on {name}: {check.__name__}"):
                check(algorithm, LAYERS[name])


@contextmanager
def _naming(where: str) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{where}: {error}") from error


def serves(model: nn.Module, algorithm: Algorithm) -> bool:
    """Tell whether an algorithm can adapt the one layer of a model."""
    ((_, _, _, geometry),) = ModelSites(model).values()
    try:
        algorithm.check(geometry)
    except ConfigError:
        return False
    return True


def check_start_changes_nothing(algorithm: Algorithm, case: LayerCase) -> None:
    """A new adapter leaves the output as it is to the last bit, in training and evaluation, and its memory layout."""
    model, x = OneLayer(case.layer()), case.input()
    before = model(x)
    adapt(model, algorithm, random=False)
    assert torch.equal(model.eval()(x), before), "initialize has to leave the output as it is"
    assert torch.equal(model.train()(x), before), "in training, too, a new adapter has to leave the output as it is"
    assert model(x).stride() == before.stride(), "the output has to keep its memory layout"


def check_start_sets_every_value(algorithm: Algorithm, case: LayerCase) -> None:
    """`initialize` fills every element of every tensor, which come from uninitialized memory."""
    model = OneLayer(case.layer())
    (site,) = ModelSites(model).values()
    geometry = site.geometry
    for below in (attach.top(site), BareWeight(geometry, attach.top(site).affine().weight)):
        adapter = Adapter(algorithm, geometry, dtype=torch.float64)
        with torch.no_grad():
            for tensor in adapter.tensors().values():
                tensor.fill_(float("nan"))
        adapter.initialize(below)
        wrong = [name for name, tensor in adapter.tensors().items() if not torch.isfinite(tensor).all()]
        assert not wrong, f"initialize leaves values of {', '.join(wrong)} unset"


def check_forward_equals_merged(algorithm: Algorithm, case: LayerCase) -> None:
    """`forward` gives the output of the weight that `transform` gives, at any strength, attached and merged."""
    for strength in (1.0, 0.5, -1.0):
        model, x, adapters = build(algorithm, case)
        adapters.set_strength(strength)
        attached = model(x)
        error = relative_error(attached, dense_output(model, x))
        assert error < TOLERANCE, f"forward and transform differ by {error:.1e} at strength {strength}"
        merge_set(adapters)
        error = relative_error(model(x), attached)
        assert error < TOLERANCE, f"forward and the merged layer differ by {error:.1e} at strength {strength}"


def check_strength_zero(algorithm: Algorithm, case: LayerCase) -> None:
    """At strength 0 the output is the base layer's to the last bit."""
    model, x = OneLayer(case.layer()).eval(), case.input()
    before = model(x)
    adapters = adapt(model, algorithm)
    assert not torch.equal(model(x), before), "a trained adapter has to change the output"
    adapters.set_strength(0)
    assert torch.equal(model(x), before), "at strength 0 the output has to be the base layer's exactly"


def check_strength_is_linear(algorithm: Algorithm, case: LayerCase) -> None:
    """The output at strength μ is base + μ(adapted - base)."""
    model, x = OneLayer(case.layer()).eval(), case.input()
    base = model(x)
    adapters = adapt(model, algorithm)
    adapted = model(x)
    adapters.set_strength(0.3)
    error = relative_error(model(x), base + 0.3 * (adapted - base))
    assert error < TOLERANCE, f"strength 0.3 is off the line between 0 and 1 by {error:.1e}"


def check_gradients(algorithm: Algorithm, case: LayerCase) -> None:
    """Gradients of `forward` are those of `transform`, for the input, the adapter's tensors and the base bias."""
    model, x, adapters = build(algorithm, case)
    model.requires_grad_(True)
    adapters.set_strength(0.7)
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    parameters = [*inputs, *adapters.parameters(), *(p for p in model.parameters() if p.dim() == 1)]
    weights = torch.randn_like(model(x))
    fast = torch.autograd.grad((model(x) * weights).sum(), parameters, allow_unused=True)
    slow = torch.autograd.grad((dense_output(model, x) * weights).sum(), parameters, allow_unused=True)
    for a, b in zip(fast, slow, strict=True):
        assert a is not None, "forward does not depend on a tensor that has a gradient"
        assert b is not None, "transform does not depend on a tensor that has a gradient"
        # Gradients that cancel to nothing have no scale of their own.
        error = float((a - b).abs().max()) / max(1.0, float(b.abs().max()))
        assert error < TOLERANCE, f"gradients of forward and transform differ by {error:.1e}"


def check_file_round_trip(algorithm: Algorithm, case: LayerCase, dialect: str = "lycoris") -> None:
    """An adapter that is saved and loaded again gives the same output."""
    known = ALGORITHMS.get(algorithm.name)
    assert known is not None, (
        f"files of {algorithm.name} are not recognized: add `from lycoris.algorithms.{algorithm.name} import "
        f"{type(algorithm).__name__} as {type(algorithm).__name__}` to lycoris/algorithms/__init__.py"
    )
    model, x, adapters = build(algorithm, case)
    trained = model(x)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        write(adapters.bundle(), path, dialect)
        adapters.detach()
        AdapterSet.load(model, read(path, model)).attach()
    error = relative_error(model(x), trained)
    assert error < FILE_TOLERANCE, f"after saving and loading the output differs by {error:.1e}"


def check_detach(algorithm: Algorithm, case: LayerCase) -> None:
    """An attached adapter is not in the model's state dict, and detaching it restores the module exactly."""
    model, x = OneLayer(case.layer()).eval(), case.input()
    before, keys, cls, own = model(x), list(model.state_dict()), type(model.layer), set(model.layer.__dict__)
    adapters = adapt(model, algorithm)
    assert list(model.state_dict()) == keys, "attaching has to leave the keys of the state dict as they are"
    model.load_state_dict(model.state_dict(), strict=True)
    adapters.detach()
    assert type(model.layer) is cls, "detaching has to restore the layer's class"
    assert set(model.layer.__dict__) == own, "detaching has to restore the layer's attributes"
    assert not model.layer._modules, "detaching has to remove the adapter's modules"
    assert torch.equal(model(x), before), "after detaching the output has to be the base layer's exactly"


def check_unmerge(algorithm: Algorithm, case: LayerCase) -> None:
    """Unmerging brings back the very same parameters."""
    model, x = OneLayer(case.layer()).eval(), case.input()
    parameters, before = dict(model.layer._parameters), model(x)
    adapters = adapt(model, algorithm)
    attached = model(x)
    merge_set(adapters)
    adapters.unmerge()
    same = all(model.layer._parameters[name] is parameter for name, parameter in parameters.items())
    assert same, "unmerging has to bring back the same parameter objects"
    assert torch.equal(model(x), attached), "after unmerging the output has to be the attached one exactly"
    adapters.detach()
    assert torch.equal(model(x), before), "after detaching the output has to be the base layer's exactly"


CONTRACTS: tuple[Check, ...] = (
    check_start_changes_nothing,
    check_start_sets_every_value,
    check_forward_equals_merged,
    check_strength_zero,
    check_strength_is_linear,
    check_gradients,
    check_file_round_trip,
    check_detach,
    check_unmerge,
)
"""What `check_algorithm` runs."""


def build(algorithm: Algorithm, case: LayerCase) -> tuple[OneLayer, Tensor, AdapterSet]:
    """Build a model of one layer in evaluation mode, an input, and trained adapters on the layer."""
    model = OneLayer(case.layer()).eval()
    return model, case.input(), adapt(model, algorithm)


def adapt(model: nn.Module, *algorithms: Algorithm, name: str = "default", random: bool = True) -> AdapterSet:
    """Attach algorithms to every layer of a model, in the layers' dtype.

    Args:
        random: move every trained tensor away from its start, so that the adapters have an effect.
    """
    dtype = next(model.parameters()).dtype
    rule = Rule(algorithms, kind="*")
    adapters = AdapterSet.build(model, plan(model, rule, strict=False), name=name, dtype=dtype).attach()
    if random:
        perturb(adapters)
    return adapters


@torch.no_grad()
def perturb(adapters: AdapterSet, size: float = 0.3) -> None:
    """Add normal noise of a standard deviation to every trained tensor."""
    for parameter in adapters.parameters():
        parameter.add_(size * torch.randn_like(parameter))


def dense_output(model: OneLayer, x: Tensor) -> Tensor:
    """Return the output of the layer's own operation with the weight and bias that its adapters make."""
    (site,) = ModelSites(model).values()
    layer, attribute = site.module, site.attribute
    affine = attach.top(site).affine()
    if not attribute:
        return attach.top(site).run(x, affine)
    plain = copy.deepcopy(layer)
    plain.__class__ = attach.base_class(plain)
    weights: Mapping[str, Tensor] = {attribute: affine.weight}
    output: Tensor = torch.func.functional_call(plain, dict(weights), (x,))
    return output


def merge_set(adapters: AdapterSet) -> None:
    """Merge, expecting the warning about timesteps exactly where the adapters follow them."""
    with warnings.catch_warnings():
        if adapters.rank_masks.are_used:
            warnings.filterwarnings("ignore", message=".*timestep schedule")
        else:
            warnings.simplefilter("error")
        adapters.merge()


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return the largest difference over the largest value of b."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
