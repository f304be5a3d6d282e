"""Write the trained base as the demo ships it: float16 files, without traces of where it was trained.

python ship.py out/base/pipeline ../../src/lycoris/demo/assets/base
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()

    pipe = StableDiffusionPipeline.from_pretrained(args.pipeline, dtype=torch.float16, safety_checker=None)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.to(torch.float16)
    shutil.rmtree(args.out, ignore_errors=True)
    pipe.save_pretrained(args.out)
    for config in args.out.rglob("*.json"):
        content = json.loads(config.read_text())
        # Diffusers loads its parts in float32 whatever the files are in; transformers takes what the config says.
        shipped = {key: "float32" if key == "dtype" else value for key, value in content.items()}
        shipped.pop("_name_or_path", None)
        if shipped != content:
            config.write_text(json.dumps(shipped, indent=2) + "\n")
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
