"""Predict the LoKr that LyCORIS 4.1.3 builds for a file before it copies the tensors in.

`LokrModule.make_module_from_state_dict` infers rank and factor from the shapes, and builds a module with them.
"""

from __future__ import annotations

from lycoris.algorithms import LoKr
from lycoris.algorithms.dora import unwrap_dora
from lycoris.algorithms.serialization import TensorShapes
from lycoris.files.programs.program import Case
from lycoris.layers.geometry import Geometry
from lycoris.ops.factorization import factorize


def mismatches_rebuilt_lokr(case: Case) -> bool:
    """Return whether LyCORIS 4.1.3 builds a LoKr with other tensors than the file's, so that loading fails.

    False for other algorithms.
    """
    if not isinstance(unwrap_dora(case.entry.algorithm), LoKr):
        return False
    own = {name: tuple(tensor.shape) for name, tensor in case.entry.tensors.items() if name[:2] in ("w1", "w2", "t2")}
    return _predict_shapes(own, case.entry.geometry) != own


def _predict_shapes(own: TensorShapes, g: Geometry) -> TensorShapes:
    """Names and shapes of the tensors that it makes for a file's."""
    rank = own["w1_a"][1] if "w1_a" in own else own["w2_a"][1] if "w2_a" in own else 0
    first = own["w1"] if "w1" in own else (own["w1_a"][0], own["w1_b"][1])
    second = own["w2"] if "w2" in own else (own["w2_a"][0], own["w2_b"][1])
    factor = _predict_factor(own, first, second)
    (ol, ok), (im, inner) = factorize(g.out_features, factor), factorize(g.shape[1], factor)
    kernel = g.kernel if g.kind == "conv" else ()
    made: dict[str, tuple[int, ...]] = {}
    if "w1" not in own and "w2" not in own and 2 * rank < max(ol, im):
        made |= {"w1_a": (ol, rank), "w1_b": (rank, im)}
    else:
        made["w1"] = (ol, im)
    if not rank or 2 * rank >= max(ok, inner):
        made["w2"] = (ok, inner, *kernel)
    elif "t2" in own and any(size != 1 for size in kernel):
        made |= {"t2": (rank, rank, *kernel), "w2_a": (rank, ok), "w2_b": (rank, inner)}
    else:
        size = 1
        for each in kernel:
            size *= each
        made |= {"w2_a": (ok, rank), "w2_b": (rank, inner * size)}
    return made


def _predict_factor(own: TensorShapes, first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """The factor that it finds; of kernels in w2_b and of cores it takes sizes for others."""
    whole = first[0] * second[0], first[1] * second[1]
    if (first[0], first[1]) == (factorize(whole[0])[0], factorize(whole[1])[0]):
        return -1
    outs, ins = (first[0], second[0]), (first[1], second[1])
    largest = (
        max(own["w1"] if "w1" in own else (own["w1_a"][0], own["w1_b"][1])),
        max(own["w2"] if "w2" in own else (own["w2_a"][0], own["w2_b"][1])),
    )
    for factor in largest:
        if not any(size % factor for size in whole) and factor in outs and factor in ins:
            return factor
    return min(largest)
