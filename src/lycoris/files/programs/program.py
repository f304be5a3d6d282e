"""What defines a program that reads adapter files: a table of what it does with which adapters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

from lycoris.adapters.bundle import Bundle
from lycoris.algorithms import DoRA, Replace
from lycoris.algorithms.base import Entry
from lycoris.algorithms.dora import unwrap_dora
from lycoris.files.programs.keys import ANY_ARCHITECTURE, EXAMINED_ARCHITECTURES, KeysByDialect, KnownKeys
from lycoris.files.programs.routes import Route
from lycoris.files.programs.taking import LayerPlace, TakeTensors
from lycoris.layers.geometry import Affine, Kind

Reads = Literal["as trained", "differently", "not at all", "not known"]
Remedy = Literal[
    "smaller",
    "dense",
    "lora",
    "no core",
    "flat w2",
    "unsplit w1",
    "unlimited",
    "both norms",
    "both diffs",
    "joined",
    "rewritten",
    "scale",
    "format",
]
"""Names of exports, which are defined in `lycoris.files.programs.portable`."""
EXAMINED_ALGORITHMS = frozenset({"lora", "loha", "lokr", "full", "norm", "glora", "ia3", "diag-oft", "boft", "tlora"})
"""Algorithms for which programs were examined; nothing is claimed about any other."""
EXAMINED_TENSORS = frozenset(
    {
        *("alpha", "dora_scale", "diff", "diff_b", "w_norm", "b_norm", "bias_indices", "bias_values"),
        *("lora_up.weight", "lora_down.weight", "lora_mid.weight", "bias_size", "lora_magnitude_vector"),
        *(f"hada_{each}" for each in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        *(f"lokr_{each}" for each in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
        *(f"{each}.weight" for each in ("a1", "a2", "b1", "b2")),
        *("weight", "on_input", "oft_blocks", "oft_diag", "rescale"),
        *("q_layer.weight", "p_layer.weight", "lambda_layer"),
        *("base_q.weight", "base_p.weight", "base_lambda"),
    }
)
"""Tensors for which programs were examined."""


class Verdict(NamedTuple):
    """What a program makes of one layer's adapter, at strength 1.

    `remedy` names one of the `EXPORTS` in `lycoris.files.programs.portable`.
    """

    reads: Reads
    why: str
    """One sentence."""
    error: float | None = None
    """‖Δ' - Δ‖ / ‖Δ‖ of the changes to the weight, where the adapter's tensors alone determine it."""
    remedy: Remedy | None = None
    """The export that fixes it; None if none is needed, or none is known."""
    stops: bool = False
    """Whether the program rejects the entire file for it."""


class Case(NamedTuple):
    """A layer's adapter in a file, and the base weight where that is known.

    What conditions of program tables are asked about.
    """

    entry: Entry
    base: Affine | None = None
    extra: tuple[Entry, ...] = ()
    """What else the file has for the layer."""
    dialect: str = ""
    architecture: str | None = None
    """None: unknown."""
    key: str = ""
    """What the names of its tensors begin with, prefix included; "": unknown."""
    stored: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    """Shapes of its tensors in the file, by suffix in LyCORIS' spelling; empty: as LyCORIS writes them."""
    place: LayerPlace = ""
    file_suffixes: frozenset[str] = frozenset()
    """Suffixes of all tensors in the file, in the same spelling."""
    spelled: frozenset[str] = frozenset()
    """Suffixes of its tensors as the file spells them; empty: as the dialect does."""
    model: str = ""
    """The known model that its component is taken to be; "": unknown."""

    @property
    def name(self) -> str:
        """The name of the algorithm, or of the one under DoRA.

        "lora" for DyLoRA, since its files are those of a LoRA.
        """
        algorithm = self.entry.algorithm
        name = unwrap_dora(algorithm).name
        return "lora" if name == "dylora" else name

    @property
    def dora(self) -> str:
        """The axis of DoRA's magnitude, "out" or "in".

        "" without DoRA.
        """
        algorithm = self.entry.algorithm
        return algorithm.axis if isinstance(algorithm, DoRA) else ""

    @property
    def dimensions(self) -> int:
        """The number of kernel dimensions.

        0 for everything but convolutions.
        """
        return len(self.entry.geometry.kernel) if self.entry.geometry.kind == "conv" else 0


Condition = Callable[[Case], bool]


class Row(NamedTuple):
    """One line of a program's table: for which adapters it holds, and what the program does with them.

    `why` and `error` may depend on the case; the other fields mean what they mean in `Verdict`.
    """

    when: Condition
    reads: Reads
    why: str | Callable[[Case], str]
    remedy: Remedy | None = None
    error: Callable[[Case], float | None] | None = None
    stops: bool = False
    """Whether the program rejects the entire file for it."""


@dataclass(frozen=True)
class Program:
    """A program that reads adapter files, as far as it was examined.

    `judge` answers for one layer; `lycoris.files.check` for a file.
    """

    name: str
    title: str
    """What it calls itself, with the version that was examined where that matters."""
    keys: KeysByDialect
    """Dialect → architecture → which of its keys the program knows. The first dialect is the one to write for it."""
    rows: tuple[Row, ...]
    """The first that holds counts; if none does, the adapter is read as trained."""
    kinds: tuple[Kind, ...] = ("linear", "conv", "norm")
    """Kinds of layers that it applies adapters to."""
    supports_transposed: bool = False
    """Whether it supports linear layers that store their weight as (I, O), as in GPT-2."""

    examined_algorithms: frozenset[str] = EXAMINED_ALGORITHMS
    """Algorithms for which it was examined."""
    by_naming: Callable[[str, str], KnownKeys | None] | None = None
    """(architecture, naming of the file) → known keys, whatever the dialect. None: `keys` says it."""
    missing_architectures: frozenset[str] = frozenset()
    """Architectures that it has no model of."""
    examined_tensors: frozenset[str] = EXAMINED_TENSORS
    """Tensors for which it was examined."""
    supports_replacement: bool = False
    """Whether it supports weights that replace a layer's own."""
    max_unmatched: int | None = None
    """The most unknown keys in a file that it accepts; None: any number."""
    native_dialect: str = ""
    """The dialect with the names of its own models; "": unknown, or its models have the layers of any file."""
    route: Route | None = None
    """What it makes of all keys of a file together; if there is one, only the dialects in `keys` count."""
    explain_rejection: Callable[[Collection[str], str | None], str] | None = None
    """(names of all tensors, architecture of the denoiser) → why it rejects the file, "" if it does not."""
    take_tensors: TakeTensors | None = None
    """Which tensors of a layer it reads; None: not examined, and assumed to be all, in any spelling."""
    stops: bool = False
    """Whether it rejects the file for any layer that it cannot read."""
    detect_algorithm: Callable[[Iterable[str], str | None], str] | None = None
    """(names of all tensors, architecture of the denoiser) → the algorithm it takes the entire file for. None, or ""
    as its result: each layer has its own."""
    reads_header: bool = False
    """Whether it reads the scale from a file's header, or from a config next to it."""
    explain_conflict: Callable[[Bundle], str] | None = None
    """Why it rejects adapters together that it accepts one by one; "" if it does not."""

    def find_keys(self, dialect: str, architecture: str | None, *finer: str) -> KnownKeys | None:
        """Return what the program knows of the keys that a dialect has for an architecture; None: nothing.

        `finer` are more specific names that are tried first, such as that of a known model.
        """
        there = self.keys.get(dialect, {})
        return next(
            (there[each] for each in (*finer, architecture or ANY_ARCHITECTURE, ANY_ARCHITECTURE) if each in there),
            None,
        )

    def judge(
        self,
        entry: Entry,
        base: Affine | None = None,
        *,
        beside: tuple[Entry, ...] = (),
        dialect: str | None = None,
        architecture: str | None = None,
        key: str = "",
        stored: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
        place: LayerPlace = "",
        among: frozenset[str] = frozenset(),
        spelled: frozenset[str] = frozenset(),
        model: str = "",
    ) -> Verdict:
        """Return what the program makes of an adapter: the first row of its table that holds decides.

        Args:
            base: The weight below; without it some verdicts are "not known".
            next to: What else the file has for the layer.
            dialect: How the file writes it; None: the program's preferred dialect.
            architecture: That of the model; None: not known.
            key: What the file calls the layer.
            stored: Shapes of its tensors in the file, by suffix.
            place: How the program's model stores the layer.
            among: Suffixes of all tensors in the file.
            spelled: Suffixes of the layer's tensors as the file spells them.
            model: The known model that the component is taken to be.

        Returns:
            The verdict; "not known" for algorithms and tensors of which it was not examined what the program does.
        """
        g = entry.geometry
        if g.kind not in self.kinds:
            return Verdict("not at all", f"{self.title} has no adapters for a layer of kind {g.kind}")
        if g.transposed and g.kind != "embedding" and not self.supports_transposed:
            return Verdict("not at all", f"{self.title} knows no layers that keep their weight as (inputs, outputs)")
        if not self.supports_replacement and any(isinstance(each.algorithm, Replace) for each in (entry, *beside)):
            return Verdict("not at all", f"{self.title} is not known to put full weights in place of a layer's own")
        case = Case(
            *(entry, base, beside, dialect or next(iter(self.keys)), architecture, key, stored, place, among),
            spelled=spelled,
            model=model,
        )
        for row in self.rows:
            if row.when(case):
                error = None if row.error is None else row.error(case)
                why = row.why if isinstance(row.why, str) else row.why(case)
                stops = row.reads == "not at all" and (row.stops or self.stops)
                return Verdict(row.reads, f"{self.title} {why}", error, row.remedy, stops)
        if case.name not in self.examined_algorithms:
            return Verdict("not known", f"what {self.title} makes of {case.name} was not examined")
        if strange := sorted(stored.keys() - self.examined_tensors):
            return Verdict("not known", f"what {self.title} makes of {', '.join(strange)} was not examined")
        return Verdict("as trained", f"{self.title} computes what was trained")

    def is_examined(self, architecture: str | None) -> bool:
        """Return whether it was examined which keys the program knows for an architecture.

        True also for architectures that it is known not to have.

        Args:
            architecture: None where it is unknown.
        """
        named = any(ANY_ARCHITECTURE in there or architecture in there for there in self.keys.values())
        return architecture in EXAMINED_ARCHITECTURES or architecture in self.missing_architectures or named
