"""Which tensors of a layer a program looks for, by their names as the file spells them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

LayerPlace = Literal["", "rows", "swapped", "renamed"]
"""How a program's model holds a layer of a file: as one of its own, as some rows of one, as one whose two halves are
the other way round, or as one of another name."""


class TakenTensors(NamedTuple):
    """The tensors of a layer that a program uses."""

    names: frozenset[str]
    """Those that it uses."""
    stops: bool = False
    """Whether it gives the file up, since it uses none."""


TakeTensors = Callable[[frozenset[str], str, LayerPlace], TakenTensors]
"""The names of a layer's tensors, its key, and how the program's model holds it → what the program makes of them."""

ALPHA_AND_MAGNITUDE = frozenset({"alpha", "dora_scale"})
"""What is taken whatever else there is, and changes nothing alone."""
PROCESSOR_SUFFIXES = "_lora.up.weight", "_lora.down.weight"
"""Behind a projection's name, of attention processors."""
_LORA_TENSORS = "lora_up.weight", "lora_down.weight"
_PEFT_TENSORS = "lora_B.weight", "lora_A.weight"
_LOHA_TENSORS = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_LOHA_CORES = frozenset({"hada_t1", "hada_t2"})
_LOKR_TENSORS = frozenset(f"lokr_{each}" for each in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))
_GLORA_TENSORS = frozenset(f"{each}.weight" for each in ("a1", "a2", "b1", "b2"))


def take_by_forge(names: frozenset[str], key: str, place: LayerPlace = "") -> TakenTensors:
    """Return the tensors that Forge's `load_lora` uses.

    It looks for all of these, and the last one found for a weight counts.
    """
    pairs = (
        _LORA_TENSORS,
        PROCESSOR_SUFFIXES,
        _PEFT_TENSORS,
        ("lora.up.weight", "lora.down.weight"),
        ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
    )
    found = names & {*ALPHA_AND_MAGNITUDE, "diff", "diff_b", "set_weight", "w_norm", *_LOKR_TENSORS}
    pair = next((pair for pair in pairs if pair[0] in names), ())
    found |= names & {*pair, *(("lora_mid.weight",) if pair == _LORA_TENSORS else ())}
    if "hada_w1_a" in names:
        found |= names & (_LOHA_TENSORS | _LOHA_CORES if "hada_t1" in names else _LOHA_TENSORS)
    if "a1.weight" in names:
        found |= names & _GLORA_TENSORS
    if "w_norm" in names:
        found |= names & {"b_norm"}
    # What does not end in weight has a key of its own there.
    if key.startswith("diffusion_model."):
        found |= names & {"bias.diff", "bias.set_weight"}
    return TakenTensors(found)


def take_by_webui(names: frozenset[str], key: str, place: LayerPlace = "") -> TakenTensors:
    """Return the tensors that WebUI uses.

    The first kind of network that finds its tensors counts; `NetworkModule` reads the scale next to them.
    """
    if key.startswith("transformer."):
        # Of SD 3's names the last two steps are the tensor's, and of others the layer is another one.
        names = frozenset(name for name in names if name.count(".") == 1)
    taken = next((names & taken for needed, taken in _list_networks() if names >= needed), frozenset[str]())
    return TakenTensors(taken, stops=bool(names) and not taken)


def _list_networks() -> Iterator[tuple[frozenset[str], frozenset[str]]]:
    """What each kind of network needs → what it takes."""
    scaled = ALPHA_AND_MAGNITUDE | {"scale"}
    yield frozenset(_LORA_TENSORS), scaled | {*_LORA_TENSORS, "lora_mid.weight"}
    # Of these two it makes a new layer, without anything else.
    yield frozenset(_PEFT_TENSORS), frozenset(_PEFT_TENSORS)
    yield _LOHA_TENSORS, scaled | _LOHA_TENSORS | _LOHA_CORES
    yield frozenset({"weight", "on_input"}), scaled | {"weight", "on_input"}
    for first in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}):
        for second in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}):
            yield frozenset({*first, *second}), scaled | _LOKR_TENSORS
    yield frozenset({"diff"}), scaled | {"diff", "diff_b"}
    yield frozenset({"w_norm", "b_norm"}), scaled | {"w_norm", "b_norm"}
    yield _GLORA_TENSORS | {"alpha"}, scaled | _GLORA_TENSORS
    for blocks in ("oft_blocks", "oft_diag"):
        yield frozenset({blocks}), scaled | {blocks, "rescale"}
