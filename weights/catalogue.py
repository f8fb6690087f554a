"""Public pixel networks and image prompts: where they are, in which layout, their licence, and which links are dead.

Nothing here was measured by downloading it: sizes are as listed (MB); a sha256 is given where one is published.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One public weight file."""

    name: str
    family: str  # ddpm | adm | ddpmpp | ip_adapter | clip_vision
    layout: str  # ho | diffusers | guided | adm-diffusers | score-sde | ip-adapter | transformers
    file: str  # its name there; with a * where the name was not seen
    repo: str | None = None  # on the Hub
    url: str | None = None  # elsewhere: to be downloaded by hand
    megabytes: int | None = None
    sha256: str | None = None
    licence: str | None = None  # None: not stated
    mirror: str | None = None  # the name of another entry with the same weights
    status: str = "unverified"  # alive | dead | unverified
    note: str = ""


BIN, SAFE = "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"
OPENAI = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"
HEIBOX = "https://github.com/pesser/pytorch_diffusion"
P2 = "https://github.com/jychoi118/P2-weighting"
ILVR = "https://github.com/kwonminki/Asyrp_official"
SDEDIT = "s3://image-editing-test-12345"
SCORE_SDE = "https://github.com/yang-song/score_sde_pytorch"


def google(name: str, **more: Any) -> Entry:
    """One of Google's conversions of Ho et al.'s networks."""
    note = "a torch file only, attention names of 2022"
    fields = {"file": BIN, "megabytes": 455, "licence": "apache-2.0", "status": "alive", "note": note} | more
    return Entry(name=name, family="ddpm", layout="diffusers", repo=f"google/{name}", **fields)


def pixel(name: str, family: str, layout: str, file: str, **more: Any) -> Entry:
    """An entry in the order of the table below."""
    return Entry(name=name, family=family, layout=layout, file=file, **more)


def prompting(name: str, folder: str, megabytes: int, **more: Any) -> Entry:
    """One of the IP-Adapter authors' files."""
    fields = {"file": f"{folder}/{name}.safetensors", "family": "ip_adapter", "layout": "ip-adapter"} | more
    return Entry(name=name, repo="h94/IP-Adapter", megabytes=megabytes, licence="apache-2.0", **fields)


def encoding(name: str, folder: str, megabytes: int, note: str) -> Entry:
    """An image encoder beside them."""
    file = f"{folder}/image_encoder/model.safetensors"
    return prompting(name, folder, megabytes, file=file, family="clip_vision", layout="transformers", note=note)


ENTRIES = (
    google("ddpm-cifar10-32", file=SAFE, megabytes=143, note=""),
    google("ddpm-celebahq-256", mirror="ddpm-celebahq-256-safetensors"),
    google("ddpm-ema-celebahq-256"),
    google("ddpm-church-256"),
    google("ddpm-ema-church-256"),
    google("ddpm-bedroom-256"),
    google("ddpm-ema-bedroom-256"),
    google("ddpm-cat-256"),
    google("ddpm-ema-cat-256"),
    pixel("ddpm-celebahq-256-safetensors", "ddpm", "diffusers", SAFE, repo="Mou11209203/ddpm-celebahq-256",
          megabytes=455, licence="apache-2.0", mirror="ddpm-celebahq-256", status="alive",
          note="a third party's copy of google/ddpm-celebahq-256"),
    pixel("ddpm-celebahq-256-course", "ddpm", "diffusers", SAFE, repo="tonylin1026/ddpm-celebahq-256", megabytes=455,
          status="alive", note="uploaded for a course; maybe fine-tuned"),
    pixel("sdedit-celebahq", "ddpm", "ho", "celeba_hq.ckpt", url=SDEDIT, megabytes=455,
          mirror="diffusionclip-celebahq", status="dead", note="what Asyrp and DiffStyle used; access is denied"),
    pixel("sdedit-church", "ddpm", "ho", "church_outdoor.ckpt", url=SDEDIT, status="dead",
          note="no mirror known"),
    pixel("sdedit-bedroom", "ddpm", "ho", "bedroom.ckpt", url=SDEDIT, status="dead",
          note="no mirror known"),
    pixel("diffusionclip-celebahq", "ddpm", "ho", "celeba_hq.ckpt", repo="gwang-kim/DiffusionCLIP-CelebA_HQ",
          megabytes=455, mirror="sdedit-celebahq"),
    pixel("pesser-cifar10", "ddpm", "ho", "ema_diffusion_cifar10_model/model-*.ckpt", url=HEIBOX),
    pixel("pesser-bedroom", "ddpm", "ho", "ema_diffusion_lsun_bedroom_model/model-*.ckpt", url=HEIBOX),
    pixel("pesser-cat", "ddpm", "ho", "ema_diffusion_lsun_cat_model/model-*.ckpt", url=HEIBOX),
    pixel("pesser-church", "ddpm", "ho", "ema_diffusion_lsun_church_model/model-*.ckpt", url=HEIBOX),
    pixel("adm-imagenet-256", "adm", "guided", "256x256_diffusion_uncond.pt", megabytes=2210, licence="mit",
          url=OPENAI + "256x256_diffusion_uncond.pt", mirror="adm-imagenet-256-hub"),
    pixel("adm-imagenet-256-hub", "adm", "guided", "256x256_diffusion_uncond.pt",
          repo="ydshieh/256x256_diffusion_uncond_from_blended_diffusion", mirror="adm-imagenet-256", status="alive"),
    pixel("adm-imagenet-256-bin", "adm", "adm-diffusers", BIN, repo="xutongda/adm_imagenet_256x256_unconditional",
          megabytes=2210, licence="mit", mirror="adm-imagenet-256", status="alive"),
    pixel("adm-imagenet-256-safetensors", "adm", "adm-diffusers", f"unet/{SAFE}",
          repo="lukasz-staniszewski/adm-imagenet-256x256-unconditional", mirror="adm-imagenet-256",
          note="the file's name was not seen"),
    pixel("adm-ffhq-256", "adm", "adm-diffusers", BIN, repo="xutongda/adm_ffhq_256x256"),
    pixel("adm-lsun-bedroom-256", "adm", "adm-diffusers", BIN, repo="xutongda/adm_lsun_bedroom_256x256"),
    pixel("adm-imagenet-512", "adm", "guided", "512x512_diffusion.pt", licence="mit",
          url=OPENAI + "512x512_diffusion.pt"),
    pixel("adm-imagenet-512-uncond", "adm", "guided", "*.pt",
          repo="lowlevelware/512x512_diffusion_unconditional_ImageNet", status="alive",
          note="a fine-tune without classes; the file's name was not seen"),
    pixel("adm-lsun-bedroom", "adm", "guided", "lsun_bedroom.pt", licence="mit", url=OPENAI + "lsun_bedroom.pt"),
    pixel("adm-lsun-cat", "adm", "guided", "lsun_cat.pt", licence="mit", url=OPENAI + "lsun_cat.pt"),
    pixel("adm-lsun-horse", "adm", "guided", "lsun_horse.pt", licence="mit", url=OPENAI + "lsun_horse.pt"),
    *(pixel(f"p2-{name}", "adm", "guided", f"{file}.pt", url=P2,
            note="Google Drive, linked from the page; no mirror known")
      for name, file in (("ffhq", "ffhq_p2"), ("ffhq-baseline", "ffhq_baseline"), ("celebahq", "celebahq_p2"),
                         ("metface", "metface_p2"), ("afhq", "afhq_p2"))),
    pixel("ilvr-afhqdog", "adm", "guided", "afhqdog_4m.pt", url=ILVR, note="OneDrive; Asyrp calls it afhq_dog_4m.pt"),
    pixel("ilvr-ffhq", "adm", "guided", "ffhq_10m.pt", url=ILVR, note="OneDrive, linked from the page"),
    pixel("ddpmpp-cifar10", "ddpmpp", "score-sde", "vp/cifar10_ddpmpp/*.pth", url=SCORE_SDE,
          note="Google Drive, linked from the page"),
    pixel("ddpmpp-cifar10-deep", "ddpmpp", "score-sde", "vp/cifar10_ddpmpp_deep/*.pth",
          url=SCORE_SDE, note="Google Drive, linked from the page"),
    prompting("ip-adapter_sdxl", "sdxl_models", 703, note="linear, reads CLIP bigG; InstantStyle's own"),
    prompting("ip-adapter_sdxl_vit-h", "sdxl_models", 698, note="linear, reads CLIP ViT-H",
              sha256="ebf05d918348aec7abb02a5e9ecef77e0aaea6914a5c4ea13f50d45eb1681831"),
    prompting("ip-adapter-plus_sdxl_vit-h", "sdxl_models", 848, note="Plus, reads CLIP ViT-H",
              sha256="3f5062b8400c94b7159665b21ba5c62acdcd7682262743d7f2aefedef00e6581"),
    prompting("ip-adapter-plus-face_sdxl_vit-h", "sdxl_models", 848, note="Plus, of faces, reads CLIP ViT-H"),
    prompting("ip-adapter_sd15", "models", 45, note="linear, reads CLIP ViT-H"),
    prompting("ip-adapter_sd15_light", "models", 45, note="linear, leaves more to the text, reads CLIP ViT-H"),
    prompting("ip-adapter_sd15_vit-G", "models", 46, note="linear, reads CLIP bigG"),
    prompting("ip-adapter-plus_sd15", "models", 98, note="Plus, reads CLIP ViT-H"),
    prompting("ip-adapter-plus-face_sd15", "models", 98, note="Plus, of faces, reads CLIP ViT-H"),
    prompting("ip-adapter-full-face_sd15", "models", 44, note="full, of faces, reads CLIP ViT-H"),
    encoding("ip-adapter-encoder-bigg", "sdxl_models", 3690, "CLIP bigG's tower for pictures"),
    encoding("ip-adapter-encoder-h", "models", 2528, "CLIP ViT-H's tower for pictures"),
)  # fmt: skip
CATALOGUE = {entry.name: entry for entry in ENTRIES}
