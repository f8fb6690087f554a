"""The cases of an instantstyle folder that need an image prompt."""

from .golden_latent import kind_of, whole_entry
from .golden_reader import Case, Folder
from .golden_sampling import alone

KINDS = ("image_tokens", "unet_ip", "subtraction", "sample", "inpaint", "controlnet")


def cases(folder: Folder) -> list[Case]:
    """One case a file, skipped."""
    found = []
    for path in sorted(folder.path.glob("*.safetensors")):
        kind, stem = kind_of(path.stem), path.stem
        if kind in KINDS[:3] or (kind in KINDS and not alone(folder, stem)):
            claims, said = frozenset(folder.tensors(stem)), whole_entry(folder, stem)
            why = "needs the IP-Adapter"
            found.append(Case(f"{stem}-image", lambda case: None, folder, stem, claims, said, skip=why))
    return found
