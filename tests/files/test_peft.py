"""PEFT's folders against PEFT itself: what it trains is read to the last digits, and what is written it loads."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cases import ALGORITHMS, LAYERS, One, adapt, perturb, relative, serves
from lycoris import IA3, AdapterSet, DoRA, DyLoRA, Full, LoHa, LoKr, LoRA, Rule, plan
from lycoris.bundle import Bundle
from lycoris.errors import FileError
from lycoris.files import load_tensors
from lycoris.files.peft import encode_peft, lora_adapter_metadata, read_peft, write_peft
from lycoris.geometry import sites

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:::transformers", "ignore::UserWarning")


class Net(nn.Module):
    """One layer of each kind that PEFT knows, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict(
            {
                "linear": nn.Linear(12, 18),
                "bare": nn.Linear(18, 12, bias=False),
                "conv1d": nn.Conv1d(6, 8, 3, padding=1),
                "wide1d": nn.Conv1d(16, 24, 3),
                "conv2d": nn.Conv2d(6, 8, 3, padding=1, stride=2),
                "pointwise": nn.Conv2d(8, 12, 1),
                "grouped": nn.Conv2d(8, 12, 3, padding=1, groups=4),
                "conv3d": nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1)),
                "embedding": nn.Embedding(9, 8),
                "turned": Conv1D(18, 12),
                "norm": nn.LayerNorm(12),
            }
        )

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: layer(x[name]) for name, layer in self.inner.items()}


def net() -> Net:
    torch.manual_seed(0)
    return Net().double().eval()


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    x = {
        "linear": (2, 12),
        "bare": (2, 18),
        "conv1d": (2, 6, 9),
        "wide1d": (2, 16, 9),
        "conv2d": (2, 6, 7, 6),
    }
    x |= {
        "pointwise": (2, 8, 4, 4),
        "grouped": (2, 8, 5, 5),
        "conv3d": (1, 4, 2, 4, 5),
        "turned": (2, 5, 12),
        "norm": (2, 12),
    }
    return {name: torch.randn(shape).double() for name, shape in x.items()} | {"embedding": torch.randint(0, 9, (2, 5))}


def at(*names: str) -> list[str]:
    return [f"inner.{name}" for name in names]


ALL_LORA = at("linear", "bare", "conv1d", "conv2d", "pointwise", "conv3d", "embedding", "turned")
LYCORIS = at("linear", "bare", "conv1d", "conv2d", "pointwise", "grouped")
PATTERNS = {"rank_pattern": {"bare|conv1d": 2, "lin.*": 5, "linear": 3}, "alpha_pattern": {"^inner.bare": 7, "2d": 5}}
IMPORTS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=ALL_LORA),
    "lora-rs": lambda: peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=ALL_LORA),
    "lora-patterns": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL_LORA, **PATTERNS),
    "lora-bias": lambda: peft.LoraConfig(
        r=3, lora_alpha=5, lora_bias=True, target_modules=at("linear", "conv1d", "conv2d", "conv3d", "turned")
    ),
    "lora-fan-in": lambda: peft.LoraConfig(r=3, fan_in_fan_out=True, target_modules=at("turned")),
    "lora-all-biases": lambda: peft.LoraConfig(r=3, bias="all", target_modules=at("linear", "bare", "conv2d")),
    "lora-only-biases": lambda: peft.LoraConfig(r=3, bias="lora_only", target_modules=at("linear", "bare")),
    "dora": lambda: peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=ALL_LORA),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=LYCORIS),
    "loha-effective": lambda: peft.LoHaConfig(r=4, alpha=6, use_effective_conv2d=True, target_modules=LYCORIS),
    "loha-patterns": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=LYCORIS, **PATTERNS),
    "lokr": lambda: peft.LoKrConfig(r=1, alpha=5, target_modules=LYCORIS),
    "lokr-whole": lambda: peft.LoKrConfig(r=100, alpha=30, target_modules=LYCORIS),
    "lokr-both": lambda: peft.LoKrConfig(r=1, alpha=3, decompose_both=True, target_modules=LYCORIS),
    "lokr-effective": lambda: peft.LoKrConfig(
        r=1, alpha=3, use_effective_conv2d=True, decompose_factor=2, target_modules=at("linear", "conv2d", "grouped")
    ),
    "lokr-effective-1d": lambda: peft.LoKrConfig(
        r=2, alpha=3, use_effective_conv2d=True, target_modules=at("linear", "wide1d")
    ),
    "lokr-1d": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=at("linear", "wide1d")),
    "lokr-factor": lambda: peft.LoKrConfig(r=2, alpha=3, decompose_factor=2, target_modules=LYCORIS),
    "lokr-unswapped": lambda: peft.LoKrConfig(r=2, alpha=3, decompose_factor=6, target_modules=at("linear", "bare")),
    "lokr-patterns": lambda: peft.LoKrConfig(r=1, alpha=6, target_modules=LYCORIS, **PATTERNS),
    "ia3": lambda: peft.IA3Config(
        target_modules=at("linear", "bare", "conv2d", "grouped", "conv3d", "turned"),
        feedforward_modules=at("bare", "grouped"),
    ),
    "ia3-pattern": lambda: peft.IA3Config(target_modules=at("linear", "bare"), feedforward_modules=r".*\.lin.*"),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=at("linear", "pointwise", "embedding")),
    "oft-terms": lambda: peft.OFTConfig(oft_block_size=6, num_cayley_neumann_terms=8, target_modules=at("linear")),
    "oft-two-terms": lambda: peft.OFTConfig(oft_block_size=6, num_cayley_neumann_terms=2, target_modules=at("linear")),
    "oft-exact": lambda: peft.OFTConfig(r=3, oft_block_size=0, use_cayley_neumann=False, target_modules=at("linear")),
    "oft-shared": lambda: peft.OFTConfig(oft_block_size=4, block_share=True, target_modules=at("linear", "embedding")),
    "coft": lambda: peft.OFTConfig(oft_block_size=4, coft=True, eps=0.1, target_modules=at("linear", "embedding")),
    "oft-biases": lambda: peft.OFTConfig(oft_block_size=4, bias="oft_only", target_modules=at("linear")),
    "boft": lambda: peft.BOFTConfig(boft_block_size=2, target_modules=at("linear", "bare", "conv2d", "pointwise")),
    "boft-number": lambda: peft.BOFTConfig(boft_block_size=0, boft_block_num=3, target_modules=at("linear")),
}
LOOSE = {"dora": 1e-6, "loha-patterns": 1e-7, "coft": 1e-7}
"""DoRA here adds a small number to each norm, for the sake of rows of zeros; PEFT rounds 6 / 5 and √3 to float32."""


def trained(config: peft.PeftConfig, model: nn.Module | None = None) -> peft.PeftModel:
    """As after training: every trainable tensor moved."""
    wrapped = peft.get_peft_model(net() if model is None else model, config).double().eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return wrapped


def outputs(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        return model(inputs())


def worst(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(relative(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", IMPORTS)
def test_what_peft_trained_is_read_exactly(name: str, tmp_path: Path) -> None:
    wrapped = trained(IMPORTS[name]())
    wanted = outputs(wrapped)
    wrapped.save_pretrained(tmp_path)
    model = net()
    plain = outputs(model)
    adapters = AdapterSet.load(model, read_peft(tmp_path, model)).attach()
    assert worst(outputs(model), wanted) < LOOSE.get(name, 1e-10)
    assert worst(plain, wanted) > 1e-2
    adapters.merge()
    assert worst(outputs(model), wanted) < LOOSE.get(name, 1e-10)


def test_a_convolution_of_oft_has_the_weight_that_peft_merges(tmp_path: Path) -> None:
    """Unmerged, PEFT's own forward gives something else than its merge."""
    wrapped = trained(peft.OFTConfig(oft_block_size=6, target_modules=at("conv2d", "pointwise")))
    wrapped.save_pretrained(tmp_path)
    model = net()
    bundle = read_peft(tmp_path, model)
    AdapterSet.load(model, bundle).attach()
    assert worst(outputs(model), outputs(wrapped.merge_and_unload())) < 1e-10
    assert "1 convolutions" in " ".join(bundle.remarks)
    assert "inner.conv2d" in " ".join(bundle.remarks)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_butterflies_of_boft(factor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several stages, which PEFT makes only where its CUDA kernel compiles: here the same in plain torch."""

    class BlockDiagonal:
        @staticmethod
        def apply(stages: Tensor) -> Tensor:
            return torch.stack([torch.block_diag(*stage) for stage in stages])

    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: True)
    monkeypatch.setattr("peft.tuners.boft.layer.FastBlockDiag", BlockDiagonal)
    config = peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=factor, target_modules=["layer"])
    wrapped = trained(config, One(nn.Linear(24, 10).double()))
    x = torch.randn(3, 24).double()
    wanted = wrapped(x).detach()
    wrapped.save_pretrained(tmp_path)
    model = wrapped.unload()
    AdapterSet.load(model, read_peft(tmp_path, model)).attach()
    assert relative(model(x), wanted) < 1e-10


PADDED, BARE = {"conv2d-circular", "conv2d-reflect"}, {"parameter", "experts"}
DILATED, GROUPED = {"conv2d-same", "conv2d-stride"}, {"conv2d-groups", "conv2d-depthwise"}
LIKE_LYCORIS = PADDED | BARE | {"conv1d-transformers", "conv3d", "embedding"}
WITHOUT: dict[str, set[str]] = {
    "lora": PADDED | BARE | DILATED,
    "dylora": PADDED | BARE | DILATED,
    # PEFT's DoRA fails on a single picture without a batch.
    "dora": PADDED | BARE | DILATED | GROUPED | {"conv2d-unbatched"},
    "loha": LIKE_LYCORIS,
    "lokr": LIKE_LYCORIS,
    "ia3": set(LAYERS) - {"linear-no-bias", "conv2d-rectangle"},
    "ia3-in": BARE | {"conv1d", "embedding"},
    "lokr-whole": LIKE_LYCORIS | {"conv1d"},
    "lokr-tucker": LIKE_LYCORIS | {"conv1d", "conv2d-groups"},
    "lokr-factor": LIKE_LYCORIS | {"conv1d", "conv2d-groups"},
    "lokr-full-matrix": LIKE_LYCORIS | {"conv1d", "conv2d-rectangle", "conv2d-same", "conv2d-unbatched"},
    "lokr-unbalanced": LIKE_LYCORIS
    | {"linear", "linear-one-vector", "conv2d-rectangle", "conv2d-1x1", "conv2d-same", "conv2d-unbatched"},
    "dora-lora-in": set(LAYERS),
}
"""Layers for which PEFT has no counterpart, by algorithm or, where it has no line of its own, by what its name begins
with. The sizes of some have no one `decompose_factor`."""
EXPORTS = [
    (name, layer)
    for name, algorithm in ALGORITHMS.items()
    if name.startswith(("lora", "loha", "lokr", "dylora", "dora-lora", "dora-dylora", "ia3"))
    for layer, case in LAYERS.items()
    if serves(One(case.layer()), algorithm)
]


def written(name: str) -> set[str]:
    return set(LAYERS) - WITHOUT.get(name, WITHOUT[name.partition("-")[0]] if name not in WITHOUT else set())


@pytest.mark.parametrize(("name", "layer"), EXPORTS)
def test_peft_loads_what_is_written(name: str, layer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    case, folder = LAYERS[layer], tmp_path / "adapter"
    model = One(case.layer()).eval()
    plain, x = copy.deepcopy(model), case.input()
    adapters = adapt(model, ALGORITHMS[name])
    if layer not in written(name):
        if layer != "conv2d-unbatched" or "dora" not in name:
            with pytest.raises(FileError, match="PEFT"):
                write_peft(adapters.bundle(), folder)
            assert not folder.exists()
        return
    write_peft(adapters.bundle(), folder)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder).double().eval()
    # LoHa's scale is rounded to float32 by PEFT; for DoRA see above.
    assert relative(loaded(x), model(x)) < (1e-6 if name.startswith(("dora", "loha")) else 1e-10)
    assert relative(plain(x), model(x)) > 1e-3
    AdapterSet.load(plain, read_peft(folder, plain)).attach()
    assert relative(plain(x), model(x)) < 1e-10


def built(rules: list[Rule], model: nn.Module | None = None) -> AdapterSet:
    """Adapters with an effect on the net."""
    model = net() if model is None else model
    adapters = AdapterSet.build(model, plan(model, rules, strict=False), dtype=torch.float64)
    perturb(adapters)
    return adapters


WHOLE: dict[str, list[Rule]] = {
    "lora": [
        Rule(LoRA(rank=5, alpha=1.0, rs_lora=True), path="inner.linear"),
        Rule(LoRA(rank=2, alpha=3.0, tucker=True), path="inner.conv2d"),
        Rule(DyLoRA(rank=4, block_size=2), path="inner.embedding", kind="*"),
        Rule(LoRA(rank=3), kind="*", path="inner.[bcptgw]*"),
    ],
    "bias": [
        Rule((LoRA(rank=2, alpha=3.0), Full(weight=False)), path="inner.linear"),
        Rule(LoRA(rank=3), path="inner.conv2d"),
    ],
    "dora": [Rule(DoRA(over=LoRA(rank=3, alpha=1.0)), path="inner.[lbpc]*")],
    "loha": [
        Rule(LoHa(rank=2, alpha=1.0, tucker=True), path="inner.conv2d"),
        Rule(LoHa(rank=4), path="inner.[lb]*"),
    ],
    "lokr": [
        Rule(LoKr(rank=1, alpha=0.5, decompose_both=True), path="inner.linear"),
        Rule(LoKr(full_matrix=True), path="inner.conv2d"),
        Rule(LoKr(rank=2, alpha=3.0, tucker=True), path="inner.wide1d"),
        Rule(LoKr(rank=1, decompose_both=True), path="inner.pointwise"),
    ],
    "ia3": [
        Rule(IA3(on_input=True), path="inner.linear"),
        Rule(IA3(), path="inner.bare"),
        Rule(IA3(on_input=True), path="inner.[gt]*"),
    ],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", WHOLE)
def test_peft_loads_a_model_with_many_kinds(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    adapters = built(WHOLE[name]).attach()
    model: Any = adapters.model
    write_peft(adapters.bundle(), tmp_path / "a", dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        loaded = peft.PeftModel.from_pretrained(net(), tmp_path / "a").double().eval()
    loose = dtype == torch.float32 or name == "dora"
    assert worst(outputs(loaded), outputs(model)) < (1e-6 if loose else 1e-10)
    again = net()
    AdapterSet.load(again, read_peft(tmp_path / "a", again)).attach()
    assert worst(outputs(again), outputs(model)) < (1e-6 if dtype == torch.float32 else 1e-10)


def test_a_path_of_one_step_is_not_taken_for_the_end_of_others(tmp_path: Path) -> None:
    def nested() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"proj": nn.Linear(4, 4), "in_proj": nn.ModuleDict({"proj": nn.Linear(4, 4)})})

    model = nested()
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2), path="proj")))
    write_peft(adapters.bundle(), tmp_path)
    loaded = peft.PeftModel.from_pretrained(nested(), tmp_path)
    assert {key.split(".lora_")[0] for key in loaded.state_dict() if "lora_" in key} == {"base_model.model.proj"}


def test_ia3_tells_paths_apart_by_whole_steps(tmp_path: Path) -> None:
    def both() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "ba": nn.Linear(4, 4, bias=False)}).double()

    model: Any = both()
    adapters = built([Rule(IA3(on_input=True), path="a"), Rule(IA3(), path="ba")], model).attach()
    write_peft(adapters.bundle(), tmp_path)
    loaded, x = peft.PeftModel.from_pretrained(both(), tmp_path).double(), torch.randn(2, 4).double()
    for name in ("a", "ba"):
        assert relative(loaded.base_model.model[name](x), model[name](x)) < 1e-10
    again: Any = both()
    AdapterSet.load(again, read_peft(tmp_path, again)).attach()
    assert relative(again["ba"](x), model["ba"](x)) < 1e-10


def test_a_rotation_is_not_written(tmp_path: Path) -> None:
    adapters = built([Rule(ALGORITHMS["oft"], path="inner.[lb]*")])
    with pytest.raises(FileError, match=r"diag-oft: inner\.bare, inner\.linear\n.*lycoris\.files\.write"):
        write_peft(adapters.bundle(), tmp_path / "a")


def test_layers_of_two_kinds_are_not_written_together(tmp_path: Path) -> None:
    adapters = built([Rule(LoRA(), path="inner.linear"), Rule(LoHa(), path="inner.bare")])
    with pytest.raises(FileError, match=r"LORA: inner\.linear; LOHA: inner\.bare"):
        write_peft(adapters.bundle(), tmp_path / "a")


def test_lokr_names_the_layers_that_need_another_factor() -> None:
    rules = [Rule(LoKr(rank=1, factor=2), path="inner.[lb]*"), Rule(LoKr(rank=1), path="inner.wide1d")]
    with pytest.raises(FileError, match=r"2 of 3 fit, and not inner\.wide1d.*LoRA"):
        encode_peft(built(rules).bundle())


def test_a_folder_that_is_there_keeps_both_files_or_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (built([Rule(LoRA(rank=rank), path="inner.linear")]) for rank in (2, 3))
    write_peft(first.bundle(), tmp_path)
    (tmp_path / "README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if Path(target).name == "adapter_config.json" and self.name == "adapter_config.json":
            raise OSError("full")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="full"):
        write_peft(second.bundle(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    write_peft(second.bundle(), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3
    assert (tmp_path / "README.md").read_text() == "mine"
    assert not [path for path in tmp_path.parent.iterdir() if path.suffix == ".part"]


def test_ia3_of_pefts_goes_back_to_it(tmp_path: Path) -> None:
    """With the model: its biases tell that theirs are scaled too."""
    wrapped = trained(peft.IA3Config(target_modules=at("linear", "conv2d", "bare"), feedforward_modules=at("bare")))
    wrapped.save_pretrained(tmp_path / "a")
    bundle = read_peft(tmp_path / "a", net())
    with pytest.raises(FileError, match=r"a stack of ia3 and full: inner\.conv2d, inner\.linear"):
        write_peft(bundle, tmp_path / "b")
    write_peft(bundle, tmp_path / "b", model=net())
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path / "b").double().eval()
    assert worst(outputs(loaded), outputs(wrapped)) < 1e-10
    bundle.entries["inner.linear"][1].tensors["diff_b"] += 1
    with pytest.raises(FileError, match=r"a stack of ia3 and full: inner\.linear"):
        write_peft(bundle, tmp_path / "b", model=net())


def test_a_whole_tensor_that_differs_is_told() -> None:
    wrapped = trained(peft.LoraConfig(r=3, target_modules=at("linear")))
    state = wrapped.state_dict()
    state["base_model.model.inner.bare.weight"] = state["base_model.model.inner.bare.weight"] + 1
    remarks = read_peft(state, net(), wrapped.peft_config["default"].to_dict()).remarks
    assert any("1 tensors are whole ones" in remark and "inner.bare.weight" in remark for remark in remarks)


def test_a_dump_of_a_state_dict_is_read() -> None:
    wrapped = trained(peft.LoraConfig(r=3, target_modules=ALL_LORA))
    model = net()
    bundle = read_peft(wrapped.state_dict(), model, wrapped.peft_config["default"].to_dict())
    assert any("are the model's own" in remark for remark in bundle.remarks)
    AdapterSet.load(model, bundle).attach()
    assert worst(outputs(model), outputs(wrapped)) < 1e-10


def test_whole_modules_are_a_remark(tmp_path: Path) -> None:
    trained(peft.LoraConfig(r=3, target_modules=at("linear"), modules_to_save=["bare"])).save_pretrained(tmp_path)
    bundle = read_peft(tmp_path, net())
    assert list(bundle.entries) == at("linear")
    assert bundle.remarks == ("full copies of bare (modules_to_save) are no adapters; left out",)


def test_the_meta_device_serves_what_needs_no_weight(tmp_path: Path) -> None:
    with torch.device("meta"):
        hollow = Net()
    for config in (peft.LoraConfig(target_modules=at("linear")), peft.IA3Config(target_modules=at("linear"))):
        config.feedforward_modules = at("linear")
        trained(config).save_pretrained(tmp_path)
        assert list(read_peft(tmp_path, hollow).entries) == at("linear")
    trained(peft.OFTConfig(oft_block_size=4, target_modules=at("linear"))).save_pretrained(tmp_path)
    with pytest.raises(FileError, match=r"inner\.linear: its base weight is needed"):
        read_peft(tmp_path, hollow)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"peft_type": "VERA"}, "unknown peft_type 'VERA'.*Known: BOFT, IA3, LOHA, LOKR, LORA, OFT"),
    "near": ({"peft_type": "LORAX"}, "did you mean 'LORA'"),
    "none": ({"peft_type": None}, "unknown peft_type"),
    "key": ({"use_rslorra": True}, "unknown setting of LORA 'use_rslorra'; did you mean 'use_rslora'"),
    "method": ({"use_qalora": True}, "use_qalora = True makes another method of LORA"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    "rank": ({"r": 5}, "the config says rank 5, its tensors have 3"),
    "text": ({"r": "3"}, "r must be a finite number"),
    "nan": ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number"),
    "zero": ({"r": 0}, "whole number of at least 1"),
    "flag": ({"use_rslora": "yes"}, "use_rslora must be true or false"),
    "pattern": ({"rank_pattern": {"(": 3}}, "no regular expression"),
    "slow": ({"alpha_pattern": {"(a+)+b": 3}}, "repeats a repetition"),
    "long": ({"rank_pattern": {"a" * 2000: 3}}, "characters"),
    "list": ({"rank_pattern": [1]}, "must map names to numbers"),
    "dora": ({"use_dora": True}, "lora_magnitude_vector says otherwise"),
    "bias": ({"bias": "some"}, "bias must be none"),
    "modules": ({"modules_to_save": 3}, "must be a list of names"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_config_that_is_wrong_is_refused(name: str, tmp_path: Path) -> None:
    change, told = BAD[name]
    trained(peft.LoraConfig(r=3, target_modules=at("linear"))).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FileError, match=told) as caught:
        read_peft(tmp_path, net())
    assert str(tmp_path) in str(caught.value)


def test_a_hostile_folder_is_refused(tmp_path: Path) -> None:
    folder, config = tmp_path / "a", tmp_path / "a" / "adapter_config.json"
    with pytest.raises(FileError, match=r"no folder with an adapter_config\.json"):
        read_peft(folder, net())
    trained(peft.LoraConfig(r=3, target_modules=at("linear"))).save_pretrained(folder)
    good = config.read_text()
    for text, told in (("[" * 100_000, "not JSON"), ("[1]", "holds list"), (" " * (5 * 2**20), "bytes"), ("{", "JSON")):
        config.write_text(text)
        with pytest.raises(FileError, match=told):
            read_peft(folder, net())
    config.unlink()
    (tmp_path / "secret.json").write_text(good)
    config.symlink_to(tmp_path / "secret.json")
    with pytest.raises(FileError, match="leads out of its folder"):
        read_peft(folder, net())


def test_the_hugging_face_cache_is_read(tmp_path: Path) -> None:
    made, blobs, folder = tmp_path / "made", tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    trained(peft.LoraConfig(r=3, target_modules=at("linear"))).save_pretrained(made)
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    for at_, name in enumerate(("adapter_config.json", "adapter_model.safetensors")):
        (made / name).rename(blobs / str(at_))
        (folder / name).symlink_to(Path("../../blobs") / str(at_))
    assert list(read_peft(folder, net()).entries) == at("linear")


def test_tensors_that_fit_nothing_are_named(tmp_path: Path) -> None:
    trained(peft.LoraConfig(r=3, target_modules=at("linear"))).save_pretrained(tmp_path)
    tensors, config = load_tensors(tmp_path / "adapter_model.safetensors")[0], {"peft_type": "LORA", "r": 3}
    ends = {key.rsplit(".", 2)[1]: tensor for key, tensor in tensors.items()}
    other = {f"inner.linaer.{name}.weight": tensor for name, tensor in ends.items()}
    with pytest.raises(FileError, match=r"no layers of Net: inner\.linaer; inner\.linaer is like inner\.linear"):
        read_peft(other, net(), config)
    with pytest.raises(FileError, match=r"no tensors of LORA and none of Net: extra"):
        read_peft(tensors | {"extra": torch.zeros(1)}, net(), config)
    dump = {f"inner.linear.{name}.{who}.weight": t for name, t in ends.items() for who in ("one", "two")}
    with pytest.raises(FileError, match="several adapters, one, two"):
        read_peft(dump, net(), config)
    with pytest.raises(FileError, match=r"needs lora_B\.weight|needs lora_B"):
        read_peft({key: t for key, t in tensors.items() if "lora_A" in key}, net(), config)
    with pytest.raises(FileError, match="pass config"):
        read_peft(tensors, net())
    with pytest.raises(FileError, match="NaN"):
        read_peft({key: t * float("nan") for key, t in tensors.items()}, net(), config)


def test_lora_that_mixes_groups_is_refused(tmp_path: Path) -> None:
    trained(peft.LoraConfig(r=8, target_modules=at("grouped"))).save_pretrained(tmp_path)
    with pytest.raises(FileError, match="mixes all channels of a convolution of 4 groups"):
        read_peft(tmp_path, net())


def test_ranks_of_each_group_alone_are_read() -> None:
    wrapped = trained(peft.LoraConfig(r=8, lora_alpha=3, target_modules=at("grouped")))
    state = {key: tensor for key, tensor in wrapped.state_dict().items() if "lora_" in key}
    down = next(tensor for key, tensor in state.items() if "lora_A" in key)
    keep = torch.eye(4).repeat_interleave(2, 0).repeat_interleave(2, 1)
    down.mul_(keep[:, :, None, None])
    model = net()
    AdapterSet.load(model, read_peft(state, model, wrapped.peft_config["default"].to_dict())).attach()
    assert worst(outputs(model), outputs(wrapped)) < 1e-10


def test_metadata_of_diffusers_is_for_lora_alone() -> None:
    lora, loha = (built([Rule(algorithm, path="inner.linear")]).bundle() for algorithm in (LoRA(rank=3), LoHa()))
    told = json.loads(lora_adapter_metadata({"unet": lora, "text_encoder": lora}))
    assert told["unet.r"] == told["text_encoder.lora_alpha"] == 3
    with pytest.raises(FileError, match="unet: diffusers' pipelines read LoRA alone"):
        lora_adapter_metadata({"unet": loha})
    with pytest.raises(FileError, match="no adapters to write"):
        lora_adapter_metadata({"unet": Bundle({})})


def test_every_site_of_the_net_is_a_place_for_adapters() -> None:
    assert {site.path for site in sites(net())} == {f"inner.{name}" for name in inputs()}
