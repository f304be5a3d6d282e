"""PEFT's folders that are wrong, hostile, or of something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_net import at, net, trained

from lycoris.errors import FileError
from lycoris.files import load_tensors
from lycoris.files.peft import read_peft

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:::transformers", "ignore::UserWarning")

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
    "zero": ({"r": 0}, "integer of at least 1"),
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
    for text, told in (
        ("[" * 100_000, "cannot be read as JSON"),
        ("[1]", "holds a JSON list; expected an object"),
        (" " * (5 * 2**20), "bytes"),
        ("{", "JSON"),
    ):
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
