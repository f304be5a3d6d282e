"""A small pipeline and networks for it, as trainers of sd-scripts' kind configure them."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from cases import perturb
from hosts import TextEncoder, UNet
from lycoris.kohya import LycorisNetworkKohya, create_network

ARGS: dict[str, dict[str, str]] = {
    "lora": {"algo": "lora"},
    "locon": {"algo": "locon", "conv_dim": "2", "conv_alpha": "1", "use_tucker": "True"},
    "lora-scalar": {"algo": "lora", "use_scalar": "True"},
    "lora-dora": {"algo": "lora", "dora_wd": "True"},
    "loha": {"algo": "loha"},
    "loha-scalar": {"algo": "loha", "use_scalar": "True"},
    "lokr": {"algo": "lokr", "factor": "4"},
    "lokr-scalar": {"algo": "lokr", "use_scalar": "True"},
    "lokr-whole": {"algo": "lokr", "full_matrix": "True"},
    "full": {"algo": "full"},
    "dylora": {"algo": "dylora", "block_size": "2"},
    "glora": {"algo": "glora"},
    "diag-oft": {"algo": "diag-oft", "constraint": "0.1", "rescaled": "True"},
    "boft": {"algo": "boft"},
    "ia3": {"algo": "ia3", "preset": "ia3"},
    "tlora": {"algo": "tlora"},
}


def sd_scripts_header(name: str) -> dict[str, str]:
    """What train_network.py writes into a file's header, in short."""
    return {
        "ss_v2": "False",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "ss_network_dropout": "None",
        "ss_network_args": json.dumps(ARGS[name] | {"dropout": None}),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    }


class Host:
    """A UNet and two text encoders in double precision, and what they give."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.unet, self.encoders = UNet().double().eval(), [TextEncoder().double().eval() for _ in range(2)]
        for model in (self.unet, *self.encoders):
            model.requires_grad_(False)
        self.x, self.ids = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randint(0, 9, (2, 5))

    def __call__(self) -> Tensor:
        return torch.cat([m.flatten() for m in (self.unet(self.x), *(te(self.ids) for te in self.encoders))])


def made(host: Host, name: str = "lora", multiplier: float = 1.0, **more: Any) -> LycorisNetworkKohya:
    """A network with random tensors, not applied."""
    args = {"dropout": None, "neuron_dropout": None} | ARGS[name] | more
    network = create_network(multiplier, 4, 2, None, host.encoders, host.unet, **args).double()
    for part in network.parts:
        perturb(part.adapters, 0.2)
    return network
