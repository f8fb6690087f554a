"""Write a trained checkpoint as the embedded model: half precision, in the layout of diffusers' UNet2DModel.

python examples/shapes/export.py runs/shapes weights/embedded/shapes
"""

import argparse
from pathlib import Path

import torch
from diaphane.weights.export import write_diffusers_ddpm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder that train.py wrote")
    parser.add_argument("folder", type=Path, help="where config.json and the weights go")
    args = parser.parse_args()
    state = torch.load(args.run / "checkpoint.pt", map_location="cpu", weights_only=True)
    tensors = {name: tensor.half().contiguous() for name, tensor in state["average"].items()}
    about = {"title": "shapes world, unconditional DDPM", "steps": str(state["step"]), "license": "Apache-2.0"}
    file = write_diffusers_ddpm(args.folder, state["config"], tensors, about)
    print(f"wrote {file}: {sum(t.numel() for t in tensors.values()):,} parameters after {state['step']} steps")


if __name__ == "__main__":
    main()
