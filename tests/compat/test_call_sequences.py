"""What a model gives after any sequence of calls is the formula of the state that they lead to."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cases import perturb, relative
from hosts import Transformer, block
from lycoris import AttachError, ConfigError, clear_timestep_mask, create_lycoris, set_timestep_mask
from lycoris.kohya import create_network, create_network_from_weights
from lycoris.modules import LoConModule
from pipelines import Host, made

RANK, ALPHA = 2, 3.0
MASK = torch.tensor([[1.0, 0.0]])


def single() -> tuple[list[nn.Module], Any]:
    model = Transformer(block("Block", ["a"])).double()
    module = LoConModule("alone", model.get_submodule("blocks.0.a"), 1.0, RANK, ALPHA)
    perturb(module)
    return [model], module


def network(**options: Any) -> tuple[list[nn.Module], Any]:
    model = Transformer(block("Block", ["a", "b"])).double()
    made = create_lycoris(model, 1.0, RANK, ALPHA, apply_preset={"target_module": ["Block"]}, **options)
    perturb(made.adapters)
    return [model], made


def pipeline(**options: Any) -> tuple[list[nn.Module], Any]:
    unet, encoder = (Transformer(block(name, ["a", "b"])).double() for name in ("Transformer2DModel", "CLIPMLP"))
    made = create_network(1.0, RANK, ALPHA, None, encoder, unet, **options)
    for part in made.parts:
        perturb(part.adapters)
    return [unet, encoder], made


KINDS = {
    "a module by itself": single,
    "a network": network,
    "a network of T-LoRA": lambda: network(algo="tlora"),
    "a pipeline": pipeline,
}


class Life:
    """Models, what adapts them, and the state that it should be in."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.models, self.subject = KINDS[kind]()
        self.x = torch.randn(3, 8, dtype=torch.float64)
        self.bare = copy.deepcopy(self.models)
        modules = [self.subject] if isinstance(self.subject, LoConModule) else self.subject.loras
        pairs = [
            pair
            for m, b in zip(self.models, self.bare, strict=True)
            for pair in zip(m.modules(), b.modules(), strict=True)
        ]
        twins = {id(live): twin for live, twin in pairs}
        self.members = {module.lora_name: module for module in modules}
        self.twins = {module.lora_name: twins[id(module.org_module[0])] for module in modules}
        self.weights = {name: twin.weight.detach().clone() for name, twin in self.twins.items()}
        self.strengths = dict.fromkeys(self.members, 1.0)
        self.tensors = self.state()
        self.other = {k: t if k.endswith("alpha") or "base" in k else t * 1.5 for k, t in self.tensors.items()}
        self.applied, self.merged, self.masked = False, None, False

    def state(self) -> dict[str, Tensor]:
        prefix = f"{self.subject.lora_name}." if isinstance(self.subject, LoConModule) else ""
        return {prefix + key: tensor.double().clone() for key, tensor in self.subject.state_dict().items()}

    def allowed(self, call: str) -> bool:
        return self.merged is None or call not in ("merge_to", "onfly_merge", "half", "minus", "off", "member", "load")

    def run(self, call: str) -> None:
        """Make a call, and note what it should have done."""
        getattr(self, f"_{call}", getattr(self.subject, call, None))()
        if call in ("apply_to", "restore"):
            self.applied = call == "apply_to"
        if call in ("restore", "onfly_restore"):
            self.merged = None
        if call in ("merge_to", "onfly_merge"):
            self.merged = 0.5 if call == "merge_to" and not hasattr(self.subject, "for_inference") else 1.0
        if call in ("half", "minus", "off"):
            self.strengths = dict.fromkeys(self.members, {"half": 0.5, "minus": -1.5, "off": 0.0}[call])
        if call == "member":
            self.strengths[next(iter(self.members))] = 0.7
        if call == "load":
            self.tensors = self.other
        if call in ("mask", "clear"):
            self.masked = call == "mask"

    def _merge_to(self) -> None:
        self.subject.merge_to(*([] if hasattr(self.subject, "for_inference") else [0.5]))

    def _half(self, strength: float = 0.5) -> None:
        if isinstance(self.subject, LoConModule):
            self.subject.multiplier = strength
        else:
            self.subject.set_multiplier(strength)

    def _minus(self) -> None:
        self._half(-1.5)

    def _off(self) -> None:
        self._half(0.0)

    def _member(self) -> None:
        next(iter(self.members.values())).multiplier = 0.7

    def _load(self) -> None:
        self.subject.load_state_dict(self.other)

    def _mask(self) -> None:
        set_timestep_mask(MASK)

    def _clear(self) -> None:
        clear_timestep_mask()

    @torch.no_grad()
    def __call__(self) -> Tensor:
        return torch.cat([model(self.x) for model in self.models])

    @torch.no_grad()
    def expected(self) -> Tensor:
        """Of layers of their own: W + s (α / r) ΔW, s the strength times that of the merge."""
        for name, twin in self.twins.items():
            s = self.acting(name)
            own = {key.removeprefix(f"{name}."): t for key, t in self.tensors.items() if key.startswith(f"{name}.")}
            twin.weight.copy_(self.weights[name] + s * ALPHA / RANK * delta(own, MASK if self.masked else None))
        return torch.cat([model(self.x) for model in self.bare])

    def acting(self, name: str) -> float:
        return self.strengths[name] * (self.merged or self.applied)


def delta(t: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
    if "lora_up.weight" in t:
        return t["lora_up.weight"] @ t["lora_down.weight"]
    keep = torch.ones(1, RANK) if mask is None else mask
    now = t["p_layer.weight"] * (t["lambda_layer"] * keep) @ t["q_layer.weight"]
    return now - t["base_p.weight"] * (t["base_lambda"] * keep) @ t["base_q.weight"]


CALLS = ["apply_to", "restore", "merge_to", "onfly_merge", "onfly_restore", "half", "minus", "off"]
MORE = {"a module by itself": [], "a network": ["member", "load"], "a pipeline": ["member", "load"]}


@pytest.mark.filterwarnings("ignore:merging adapters that were trained:UserWarning")
@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", KINDS)
@settings(derandomize=True, max_examples=250)
@given(data=st.data())
def test_every_sequence_of_calls_gives_the_formula_of_its_state(kind: str, data: st.DataObject) -> None:
    """A call that is not possible in a state raises, and changes nothing."""
    clear_timestep_mask()
    life = Life(kind)
    calls = st.sampled_from([*CALLS, *MORE.get(kind, ["member", "load", "mask", "clear"])])
    for call in data.draw(st.lists(calls, max_size=12)):
        if life.allowed(call):
            life.run(call)
        else:
            with pytest.raises(AttachError, match="merged"):
                life.run(call)
        assert relative(life(), life.expected()) < 1e-9, call
    shown = {name: module.multiplier for name, module in life.members.items()}
    assert life.merged is not None or shown == pytest.approx(life.strengths)
    life.subject.restore()
    clear_timestep_mask()
    assert all(type(layer) is nn.Linear for layer in (m.org_module[0] for m in life.members.values()))
    assert not any(model._forward_pre_hooks or model._forward_hooks for model in life.models)


@dataclass
class Alone:
    """What a module of a network is while it is used by itself."""

    strength: float
    applied: bool = False
    merged: float | None = None


class Together(Life):
    """A network, and its modules by themselves."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.masks = "T-LoRA" in kind
        self.whole = dict.fromkeys(self.members, 1.0)
        """Strength of all of a model's layers, which `at` replaces; a layer's own one makes it 1."""
        self.alone: dict[str, Alone] = {}

    def acting(self, name: str) -> float:
        own = self.alone.get(name)
        return super().acting(name) if own is None else own.strength * (own.merged or own.applied)

    def shown(self) -> dict[str, float]:
        return {name: self.alone[name].strength if name in self.alone else s for name, s in self.strengths.items()}

    def refuses(self, call: str, name: str) -> bool:
        in_use, merged = self.applied or self.merged is not None, self.merged is not None
        own = name in self.alone and self.alone[name].merged is not None
        return {
            "single_apply_to": merged and not self.applied and not self.masks,
            "single_merge_to": in_use or own,
            "single_restore": in_use,
            "single_onfly_restore": merged,
            "member": merged or own,
            "at": merged or own,
            "native": merged,
            "merge_to": merged,
        }.get(call, call in ("half", "load") and (merged or any(each.merged for each in self.alone.values())))

    def make(self, call: str, name: str) -> None:
        """Make a call and note what it should have done; one that is refused changes nothing."""
        if self.refuses(call, name):
            with pytest.raises((AttachError, ConfigError), match=r"merged|by its network"):
                self.run(call, name)
        else:
            self.run(call, name)

    def run(self, call: str, name: str = "") -> None:
        if (own := getattr(self, f"_{call}_of", None)) is not None:
            own(name)
            return
        super().run(call)
        if call in ("apply_to", "merge_to", "restore"):
            self.alone = {}
        if call == "half":
            self.whole = dict.fromkeys(self.members, 0.5)
            for each in self.alone.values():
                each.strength = 0.5

    def _single_apply_to_of(self, name: str) -> None:
        self.members[name].apply_to()
        if not self.applied and self.merged is None:
            self.alone.setdefault(name, Alone(self.strengths[name])).applied = True

    def _single_merge_to_of(self, name: str) -> None:
        self.members[name].merge_to(0.25)
        self.alone.setdefault(name, Alone(self.strengths[name])).merged = 0.25

    def _single_restore_of(self, name: str) -> None:
        self.members[name].restore()
        self.alone.pop(name, None)

    def _single_onfly_restore_of(self, name: str) -> None:
        self.members[name].onfly_restore()
        if name in self.alone:
            self.alone[name].merged = None
            if not self.alone[name].applied:
                del self.alone[name]

    def _member_of(self, name: str) -> None:
        self.members[name].multiplier = 0.7
        model = name.split("_")[1]
        self.whole = {each: 1.0 if each.split("_")[1] == model else whole for each, whole in self.whole.items()}
        self.strengths = self.strengths | {name: 0.7}
        if name in self.alone:
            self.alone[name].strength = 0.7

    def _native_of(self, _: str) -> None:
        for part in self.subject.parts:
            part.adapters.set_strength(0.3)
        self.whole, self.strengths = (dict.fromkeys(self.members, 0.3) for _ in range(2))

    def _at_of(self, name: str) -> None:
        before = self.whole, self.strengths
        try:
            with ExitStack() as stack:
                for part in self.subject.parts:
                    stack.enter_context(part.adapters.at(strength=2.0))
                self.strengths = {each: 2 * strength / self.whole[each] for each, strength in self.strengths.items()}
                assert relative(self(), self.expected()) < 1e-9
                self._member_of(name)
                assert relative(self(), self.expected()) < 1e-9
        finally:
            self.whole, self.strengths = before

    @torch.no_grad()
    def check(self) -> None:
        assert relative(self(), self.expected()) < 1e-9
        shown = self.shown()
        assert {name: module.multiplier for name, module in self.members.items()} == pytest.approx(shown)
        for name, module in self.members.items():
            if not self.masks and self.merged is None and not (name in self.alone and self.alone[name].merged):
                t = {key.removeprefix(f"{name}."): t for key, t in self.tensors.items() if key.startswith(f"{name}.")}
                weight = self.weights[name] + shown[name] * ALPHA / RANK * delta(t, None)
                assert relative(module(self.x), nn.functional.linear(self.x, weight, self.twins[name].bias)) < 1e-9


SINGLE = ["single_apply_to", "single_merge_to", "single_restore", "single_onfly_restore", "member", "native", "at"]


@pytest.mark.filterwarnings("ignore:merging adapters that were trained:UserWarning")
@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "a module by itself"])
@settings(derandomize=True, max_examples=200)
@given(data=st.data())
def test_modules_used_by_themselves_and_their_network_keep_out_of_each_others_way(
    kind: str, data: st.DataObject
) -> None:
    clear_timestep_mask()
    life = Together(kind)
    own = ["apply_to", "restore", "merge_to", "onfly_restore", "half", "load"] + ["mask", "clear"] * life.masks
    calls = st.tuples(st.sampled_from([*own, *SINGLE]), st.sampled_from(list(life.members)))
    for call, name in data.draw(st.lists(calls, max_size=10)):
        life.make(call, name)
        life.check()
    life.subject.restore()
    clear_timestep_mask()
    assert all(type(layer) is nn.Linear for layer in (m.org_module[0] for m in life.members.values()))
    assert not any(model._forward_pre_hooks or model._forward_hooks for model in life.models)


@pytest.mark.parametrize("name", ["lora", "loha", "full"])
def test_nothing_can_be_done_to_what_was_merged_for_good(name: str, host: Host, tmp_path: Any) -> None:
    sd = made(host, name).state_dict()
    network, _ = create_network_from_weights(
        1.0, None, None, host.encoders, host.unet, weights_sd=sd, for_inference=True
    )
    network.merge_to(host.encoders, host.unet, sd)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    merged = host()
    for call in (
        network.apply_to,
        network.restore,
        network.merge_to,
        network.onfly_merge,
        network.onfly_restore,
        lambda: network.set_multiplier(0.5),
        lambda: network.load_state_dict(sd),
        lambda: network.load_weights(tmp_path / "a.safetensors"),
    ):
        with pytest.raises(AttachError, match="merged irreversibly"):
            call()
        assert torch.equal(host(), merged)


@pytest.mark.parametrize("call", ["apply_to", "onfly_merge", "merge_to"])
@pytest.mark.parametrize("before", ["apply_to", "merge_to"])
def test_a_member_that_was_used_by_itself_counts_once(before: str, call: str) -> None:
    life = Life("a network")
    getattr(next(iter(life.members.values())), before)()
    life.run(call)
    assert relative(life(), life.expected()) < 1e-9
    life.run("restore")
    assert relative(life(), life.expected()) < 1e-9
