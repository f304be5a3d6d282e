"""Base weights on disk are those of the model's layers, whatever kind of layer they are of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cases import LAYERS, One
from lycoris.adapters.attach import bottom
from lycoris.files.container.model_weights import BaseWeights
from lycoris.files.layout import NamedLayout
from lycoris.layers.sites import ModelSites, Site


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_on_disk_is_the_layer_in_memory(layer: str, tmp_path: Path) -> None:
    model = One(LAYERS[layer].layer())
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "a.safetensors")
    ((path, module, attribute, _),) = ModelSites(model).values()
    found = BaseWeights.open(tmp_path / "a.safetensors").affine(path, NamedLayout.from_model(model))
    there = bottom(Site.of(module, attribute)).affine()
    assert torch.equal(found.weight, there.weight)
    assert (found.bias is None) == (there.bias is None)
    assert found.bias is None or torch.equal(found.bias, there.bias)
