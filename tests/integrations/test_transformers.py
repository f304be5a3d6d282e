"""transformers' own trainers with adapters: what their checkpoints hold, and what comes back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import lycoris
from covering import select_quick
from lycoris import AdapterSet, ConfigError, DoRA, FileError, LoKr, LoRA, RankSchedule, Rule, TLoRA, plan
from lycoris.adapters.saving import BaseOnlyWarning
from lycoris.integrations.transformers import AdapterCallback

pytestmark = pytest.mark.filterwarnings(
    # transformers' own.
    "ignore:::transformers",
    "ignore:::bitsandbytes",
)
WEIGHTS = "pytorch_lora_weights.safetensors"


class Sentences(Dataset[dict[str, Tensor]]):
    """Sixteen of eight words."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        words = torch.randint(0, 64, (8,), generator=torch.Generator().manual_seed(at))
        return {"input_ids": words, "labels": words}


class Noise(Dataset[dict[str, Tensor]]):
    """For a denoiser: what to denoise, and when."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(at)
        return {"x": torch.randn(16, generator=draw), "timestep": torch.tensor(60 * at)}


class Denoiser(nn.Module):
    """A model that is none of transformers', and takes a timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.two(torch.relu(self.one(x))) - x).square().mean()}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config).requires_grad_(False)


def adapt(model: nn.Module, *algorithms: Any, path: str = "model.layers.*") -> list[AdapterSet]:
    """One set for each; the start is random, so that a fresh one would not pass for a resumed one."""
    return [
        AdapterSet.build(model, plan(model, Rule(algorithm, path=path)), f"set{at}").attach()
        for at, algorithm in enumerate(algorithms)
    ]


def arguments(folder: Path, epochs: int, **given: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 4,
        "save_strategy": "epoch",
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        # A schedule that does not depend on how long a run is.
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 14,
        **given,
    }


def train(sets: list[AdapterSet], folder: Path, epochs: int, resume: bool | str | None = None, **given: Any) -> Trainer:
    model = sets[0].model
    data = Noise() if isinstance(model, Denoiser) else Sentences()
    args = TrainingArguments(**arguments(folder, epochs, **given))
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[AdapterCallback(*sets)])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def values(sets: Iterable[AdapterSet]) -> list[Tensor]:
    return [tensor.clone() for each in sets for tensor in each.state_dict().values()]


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are equal to the last bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def adapted_llama(*algorithms: Any) -> Callable[[], list[AdapterSet]]:
    def make() -> list[AdapterSet]:
        torch.manual_seed(1)
        return adapt(llama(), *algorithms)

    return make


def timed_denoiser() -> list[AdapterSet]:
    torch.manual_seed(1)
    sets = adapt(Denoiser().requires_grad_(False), TLoRA(rank=4, dropout=0.2), path="*")
    sets[0].schedule = RankSchedule(max_rank=4, min_rank=1, steps=1000)
    sets[0].rank_masks.follow()
    return sets


CASES = {
    "lokr": adapted_llama(LoKr(rank=4)),
    "dora with dropout": adapted_llama(DoRA(inner=LoRA(rank=4, dropout=0.3))),
    "two sets": adapted_llama(LoKr(rank=4, dropout=0.2), LoRA(rank=2)),
    "tlora by timestep, on a plain module": timed_denoiser,
}


@pytest.mark.parametrize("case", select_quick(CASES, "two sets", "tlora by timestep, on a plain module"))
def test_resuming_continues_to_the_last_bit(case: str, tmp_path: Path) -> None:
    straight = CASES[case]()
    train(straight, tmp_path / "straight", 4)
    train(CASES[case](), tmp_path / "parts", 2)
    resumed = CASES[case]()
    train(resumed, tmp_path / "parts", 4, resume=True)
    assert same(values(resumed), values(straight))
    assert not same(values(resumed), values(CASES[case]()))
    for name in ("optimizer.pt", "scheduler.pt"):
        one, other = (torch.load(tmp_path / run / "checkpoint-16" / name) for run in ("straight", "parts"))
        assert same(one, other)


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", CASES)
def test_checkpoints_hold_adapters_and_not_the_base(case: str, tmp_path: Path) -> None:
    sets = CASES[case]()
    train(sets, tmp_path, 1)
    folder = tmp_path / "checkpoint-4"
    state = load_file(folder / "model.safetensors")
    assert all(".set" in name and name.startswith("lycoris.") for name in state)
    size = sum(tensor.nbytes for each in sets for tensor in each.state_dict().values())
    assert size <= (folder / "model.safetensors").stat().st_size < 1.5 * size + 4096
    base = sum(p.nbytes for p in sets[0].model.parameters()) - size
    written = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*.safetensors")}
    names = {f"set{at}/{WEIGHTS}" for at in range(len(sets))} if len(sets) > 1 else {WEIGHTS}
    assert written.keys() == {"model.safetensors", *names}
    if base > 20_000:
        assert sum(written.values()) < base
    # It would look like a model, and load as one with random weights.
    assert not (folder / "config.json").exists()


def test_the_best_comes_back_at_the_end(tmp_path: Path) -> None:
    sets = adapted_llama(LoKr(rank=4), LoRA(rank=2))()
    trainer = train(
        sets,
        tmp_path,
        4,
        load_best_model_at_end=True,
        eval_strategy="epoch",
        metric_for_best_model="loss",
        # The loss at the start is the best there is.
        greater_is_better=True,
    )
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(best[name], tensor) for name, tensor in sets[0].model.state_dict().items())
    last = load_file(tmp_path / "checkpoint-16" / "model.safetensors")
    assert not all(torch.equal(best[name], last[name]) for name in best)


def test_what_is_saved_in_the_end_reads_as_an_adapter(tmp_path: Path) -> None:
    sets = adapted_llama(LoKr(rank=4))()
    train(sets, tmp_path / "run", 1).save_model(str(tmp_path / "out"))
    fresh = llama()
    AdapterSet.load(fresh, lycoris.read(tmp_path / "out" / WEIGHTS, fresh)).attach()
    words = torch.arange(8)[None]
    assert torch.equal(fresh.eval()(words).logits, sets[0].model.eval()(words).logits)
    assert not torch.equal(fresh(words).logits, llama().eval()(words).logits)


def test_a_config_in_the_header_goes_beside_the_file(tmp_path: Path) -> None:
    sets = adapted_llama(LoKr(rank=4))()
    sets[0].metadata["lycoris_config"] = '{"algo": "lokr", "linear_dim": 4}'
    train(sets, tmp_path, 1)
    assert '"linear_dim": 4' in (tmp_path / "checkpoint-4" / "lycoris_config.json").read_text()


def test_what_is_pushed_is_the_adapter_with_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is out of reach: what would be uploaded is looked at."""
    pushed: list[set[str]] = []

    def upload_folder(folder_path: str, **_: Any) -> Any:
        pushed.append({path.name for path in Path(folder_path).iterdir() if path.is_file()})
        return SimpleNamespace(is_done=lambda: True, result=lambda: None, done=lambda: True)

    hub = SimpleNamespace(create_repo=lambda *_, **__: SimpleNamespace(repo_id="me/style"), upload_folder=upload_folder)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    sets = adapted_llama(LoKr(rank=4))()
    trainer = train(sets, tmp_path / "run", 1, push_to_hub=True, hub_always_push=True)
    assert WEIGHTS in pushed[0]  # in training
    trainer.push_to_hub()
    assert {WEIGHTS, "README.md"} <= pushed[-1]
    assert "config.json" not in pushed[-1]
    card = (tmp_path / "run" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "library_name: transformers" in card


@pytest.mark.slow
def test_sequence_to_sequence(tmp_path: Path) -> None:
    def run(epochs: int, folder: Path, resume: bool = False) -> list[Tensor]:
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        model = T5ForConditionalGeneration(config).requires_grad_(False)
        sets = adapt(model, LoRA(rank=2), path="*.SelfAttention.*")
        args = Seq2SeqTrainingArguments(**arguments(folder, epochs))
        trainer = Seq2SeqTrainer(model, args, train_dataset=Sentences(), callbacks=[AdapterCallback(*sets)])
        trainer.train(resume_from_checkpoint=resume or None)
        return values(sets)

    straight, _, resumed = run(2, tmp_path / "a"), run(1, tmp_path / "b"), run(2, tmp_path / "b", True)
    assert same(straight, resumed)


@pytest.mark.slow
def test_a_quantised_base(tmp_path: Path) -> None:
    """Trainer refuses one unless it is told of adapters, and such a base could not be saved in many formats."""
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")

    def run(epochs: int, folder: Path, resume: bool = False) -> list[Tensor]:
        config = BitsAndBytesConfig(load_in_4bit=True)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map="cpu")
        torch.manual_seed(1)
        sets = adapt(model.requires_grad_(False), LoRA(rank=2))
        train(sets, folder, epochs, resume=resume or None)
        assert not model._hf_peft_config_loaded
        return values(sets)

    straight, _, resumed = run(2, tmp_path / "a"), run(1, tmp_path / "b"), run(2, tmp_path / "b", True)
    assert same(straight, resumed)


class TestMistakes:
    def test_without_it_there_is_one_warning(self, tmp_path: Path) -> None:
        model = llama()
        adapt(model, LoRA(rank=2))
        trainer = Trainer(model, TrainingArguments(**arguments(tmp_path, 2)), train_dataset=Sentences())
        with pytest.warns(BaseOnlyWarning, match="save_pretrained of transformers saves this LlamaForCausalLM") as got:
            trainer.train()
        assert [each.filename for each in got if each.category is BaseOnlyWarning] == [__file__]

    def test_a_checkpoint_made_without_it_is_refused(self, tmp_path: Path) -> None:
        model = llama()
        adapt(model, LoRA(rank=2))
        with pytest.warns(BaseOnlyWarning):
            Trainer(model, TrainingArguments(**arguments(tmp_path, 1)), train_dataset=Sentences()).train()
        with pytest.raises(FileError, match="no adapters"):
            train(adapted_llama(LoRA(rank=2))(), tmp_path, 2, resume=True)

    def test_adapters_of_another_model(self, tmp_path: Path) -> None:
        callback = AdapterCallback(*adapt(llama(), LoRA(rank=2)))
        model = llama()
        model.lm_head.weight.requires_grad_(True)
        args = TrainingArguments(**arguments(tmp_path, 1))
        with pytest.raises(ConfigError, match="on another LlamaForCausalLM than the one being trained"):
            Trainer(model, args, train_dataset=Sentences(), callbacks=[callback]).train()

    def test_adapters_that_are_not_attached(self, tmp_path: Path) -> None:
        sets = adapted_llama(LoRA(rank=2), LoRA(rank=2))()
        sets[1].detach()
        with pytest.raises(ConfigError, match="set1 are not attached"):
            train(sets, tmp_path, 1)

    def test_a_set_that_was_not_given(self, tmp_path: Path) -> None:
        sets = adapted_llama(LoRA(rank=2), LoRA(rank=2))()
        with pytest.raises(ConfigError, match="7 adapters would not be saved"):
            train(sets[:1], tmp_path, 1)

    def test_a_model_that_fsdp_shards(self) -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            sets = adapted_llama(LoRA(rank=2))()
            callback, model = AdapterCallback(*sets), sets[0].model
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            with pytest.raises(ConfigError, match="sharded by FSDP or DeepSpeed ZeRO-3"):
                callback.on_train_begin(None, None, None, model=model)
        finally:
            dist.destroy_process_group()

    def test_what_else_trains_is_saved_too_and_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        sets = adapted_llama(LoRA(rank=2))()
        head = sets[0].model.lm_head.weight.requires_grad_(True)
        with caplog.at_level(logging.WARNING, "LyCORIS"):
            train(sets, tmp_path, 1)
        assert "these parameters train in addition to the adapters; checkpoints contain them" in caplog.text
        assert torch.equal(load_file(tmp_path / "checkpoint-4" / "model.safetensors")["lm_head.weight"], head)
