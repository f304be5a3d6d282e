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
"""Names of exports, which `lycoris.files.programs.portable` makes."""
EXAMINED_ALGORITHMS = frozenset({"lora", "loha", "lokr", "full", "norm", "glora", "ia3", "diag-oft", "boft", "tlora"})
"""Algorithms of which it was looked at what programs make of them; nothing is claimed of any other."""
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
"""Tensors of which it was looked at what programs make of them."""


class Verdict(NamedTuple):
    """What a program makes of one layer's adapter, at strength 1."""

    reads: Reads
    why: str
    """In one sentence."""
    error: float | None = None
    """‖Δ' - Δ‖ / ‖Δ‖ of the changes to the weight, where the adapter's tensors alone determine it."""
    remedy: Remedy | None = None
    """The export that makes it right; None where none is needed, or none is known."""
    stops: bool = False
    """Whether it costs the whole file."""


class Case(NamedTuple):
    """A layer's adapter in a file, and the base weight where that is known.

    What conditions of program tables are asked about.
    """

    entry: Entry
    base: Affine | None = None
    extra: tuple[Entry, ...] = ()
    """What the file has for the layer besides."""
    dialect: str = ""
    architecture: str | None = None
    """None: not known."""
    key: str = ""
    """The layer as its keys call it, with what they begin with; "" not known."""
    stored: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    """The shapes of its tensors in the file, by their names in LyCORIS' files; none: as LyCORIS writes them."""
    place: LayerPlace = ""
    file_suffixes: frozenset[str] = frozenset()
    """The own names of all tensors of the file, likewise."""
    spelled: frozenset[str] = frozenset()
    """The names of its tensors as the file spells them; none: as the dialect does."""
    model: str = ""
    """The known model that its component is taken to be; "" not known."""

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
    """One line of a program's table: for which adapters it holds, and what the program does with them."""

    when: Condition
    reads: Reads
    why: str | Callable[[Case], str]
    remedy: Remedy | None = None
    error: Callable[[Case], float | None] | None = None
    stops: bool = False
    """Whether it costs the whole file."""


@dataclass(frozen=True)
class Program:
    """A program that reads adapter files, as far as it was examined.

    `judge` answers for one layer; `lycoris.files.check` for a file.
    """

    name: str
    title: str
    """As it calls itself, with the version that was looked at where that matters."""
    keys: KeysByDialect
    """Dialects whose keys it knows, the one to write for it first → architecture → what of them."""
    rows: tuple[Row, ...]
    """The first that holds counts; where none does, it reads as trained."""
    kinds: tuple[Kind, ...] = ("linear", "conv", "norm")
    """Kinds of layers that it has adapters for."""
    supports_transposed: bool = False
    """Whether it knows the linear layers of GPT-2, which keep their weight as (I, O)."""

    examined_algorithms: frozenset[str] = EXAMINED_ALGORITHMS
    """Algorithms of which it was looked at what it makes of them."""
    by_naming: Callable[[str, str], KnownKeys | None] | None = None
    """What it knows of keys by an architecture and the naming that a file has for it, whatever the dialect; None of it,
    or of an architecture: as `keys` says."""
    missing_architectures: frozenset[str] = frozenset()
    """Architectures of which it has no model."""
    examined_tensors: frozenset[str] = EXAMINED_TENSORS
    """Tensors of which it was looked at what it makes of them."""
    supports_replacement: bool = False
    """Whether it knows weights that stand in place of a layer's own."""
    max_unmatched: int | None = None
    """More keys than these that it passes over, and it rejects the file; None: any number."""
    native_dialect: str = ""
    """The dialect whose names its models have; "" not known, or it holds every layer as a file does."""
    route: Route | None = None
    """What becomes of a file's keys, by all of them; where there is one, `keys` lists dialects only."""
    explain_rejection: Callable[[Collection[str], str | None], str] | None = None
    """Why it rejects a file by the names of its tensors and the denoiser's architecture; "" where it does not."""
    take_tensors: TakeTensors | None = None
    """The tensors of a layer that it looks for; None: not looked at, and taken to be all, however they are spelled."""
    stops: bool = False
    """Whether every layer that it cannot take costs the whole file."""
    detect_algorithm: Callable[[Iterable[str], str | None], str] | None = None
    """The one algorithm that it takes all of a file for, by the names of its tensors and the denoiser's architecture;
    None or "": each layer has its own."""
    reads_header: bool = False
    """Whether it honors the scale that a file's header, or a config next to it, has."""
    explain_conflict: Callable[[Bundle], str] | None = None
    """Why it does not take adapters together that it takes one by one; "" where it does."""

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
        """Return whether it was examined which keys the program knows for an architecture."""
        named = any(ANY_ARCHITECTURE in there or architecture in there for there in self.keys.values())
        return architecture in EXAMINED_ARCHITECTURES or architecture in self.missing_architectures or named
