"""ai-toolkit: what is known of it are its files."""

from __future__ import annotations

import torch

from cases import relative
from lycoris import create_lycoris_from_weights
from networks import MyModel


def test_lokr_files_with_a_huge_alpha() -> None:
    """Its files of whole factors have an alpha of about 1e10, which says nothing: the scale is 1."""
    model, x = MyModel().double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    w1, w2 = torch.randn(2, 2).double(), torch.randn(2, 4).double()
    sd = {"lycoris_head.lokr_w1": w1, "lycoris_head.lokr_w2": w2, "lycoris_head.alpha": torch.tensor(1e10)}
    network, _ = create_lycoris_from_weights(0.5, None, model, weights_sd=sd)
    network.double().apply_to()
    live = model(x)
    network.restore()
    model.head.weight.data += 0.5 * torch.kron(w1, w2)
    assert relative(live, model(x)) < 1e-10
