"""What a model says of its training and use beside its tensors: prediction, noise schedule, timesteps, sizes."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from .errors import ConfigError

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "eps": "eps", "v": "v", "x0": "x0"}
BETAS = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
SPACINGS = ("leading", "trailing", "linspace")
# what diffusers' schedulers do where a key is not there: betas by the first name that fits, spacing by the kind of step
SILENT = {
    ("LCM", "TCD"): ("scaled_linear", 0.00085, 0.012),
    ("Heun", "KDPM2"): ("linear", 0.00085, 0.012),
    ("DD", "PNDM", "Euler", "LMS", "DPMSolver", "DEIS", "UniPC", "SASolver"): ("linear", 1e-4, 0.02),
}
SPREAD = ("Euler", "Heun", "KDPM2", "LMS", "DPMSolver", "DEIS", "UniPC", "SASolver")  # linspace; others: leading


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """The defaults are those of Stable Diffusion XL (and 1)."""

    prediction: str | None = "eps"  # eps | v | x0; None: nothing says it
    betas: str = "scaled_linear"  # scaled_linear | linear | cosine
    beta_0: float = 0.00085
    beta_1: float = 0.012
    steps: int = 1000
    zero_terminal_snr: bool = False
    spacing: str = "leading"
    offset: int = 1
    karras: bool = False  # sigmas between the spacing's ends as in Karras et al. 2022, where the sampler is in sigma
    zero_negative: bool = False  # no negative prompt: zeros, not the encoded ""
    aesthetic: bool = False  # the refiner's ids end in a score
    side: int = 512  # of pictures in training, in pixels

    def checked(self, where: str) -> "Conventions":
        """Itself.  Raises ConfigError where the prediction is not known or not one."""
        if self.prediction is None:
            raise ConfigError(f"{where} does not say what its UNet predicts: give prediction=eps or v (2.1 at 768: v)")
        if self.prediction not in ("eps", "v", "x0"):
            raise ConfigError(f"prediction is eps, v or x0, not {self.prediction}")
        return self


def of_scheduler(scheduler: Mapping[str, Any], index: Mapping[str, Any], unet: Mapping[str, Any]) -> Conventions:
    """From a scheduler_config.json, model_index.json and the configuration of the UNet.

    Raises ConfigError for what is not done here.
    """

    def said(name: str, table: Mapping[str, str], default: str) -> str:
        if (value := scheduler.get(name, default)) not in table:
            raise ConfigError(f"scheduler_config.json says {name} = {value!r}; {', '.join(table)} are done here")
        return table[value]

    if (kind := str(scheduler.get("_class_name", ""))).startswith(("EDM", "FlowMatch")):
        raise ConfigError(f"scheduler_config.json is of {kind}, whose UNet is trained in other terms than eps, v or x0")
    if scheduler.get("trained_betas") is not None:
        raise ConfigError("scheduler_config.json gives betas one by one; schedules by formula are done here")
    own = ("scaled_linear", 0.00085, 0.012)
    betas, beta_0, beta_1 = next((row for names, row in SILENT.items() if kind.startswith(names)), own)
    spread = "linspace" if kind.startswith(SPREAD) else "leading"
    size = unet.get("sample_size") or 64

    def number(name: str, default: float, low: float, high: float, kind: type = float) -> float:
        value = scheduler.get(name, default)
        good = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
        if not good or not low <= value <= high or kind(value) != value:
            what = "a whole number" if kind is int else "a number"
            raise ConfigError(f"scheduler_config.json says {name} = {value!r}, not {what} in {low:g} ... {high:g}")
        return value

    def switch(name: str) -> bool:
        if not isinstance(value := scheduler.get(name) or False, bool):
            raise ConfigError(f"scheduler_config.json says {name} = {value!r}, not true or false")
        return value

    try:
        return Conventions(
            prediction=said("prediction_type", PREDICTIONS, "epsilon"),
            betas=said("beta_schedule", BETAS, betas),
            beta_0=float(number("beta_start", beta_0, 1e-12, 0.999)),
            beta_1=float(number("beta_end", beta_1, 1e-12, 0.999)),
            steps=int(number("num_train_timesteps", 1000, 1, 1_000_000, int)),
            zero_terminal_snr=switch("rescale_betas_zero_snr"),
            spacing=said("timestep_spacing", dict(zip(SPACINGS, SPACINGS, strict=True)), spread),
            offset=int(number("steps_offset", 0, 0, 1_000_000, int)),
            karras=switch("use_karras_sigmas"),
            zero_negative=bool(index.get("force_zeros_for_empty_prompt", False)),
            aesthetic=bool(index.get("requires_aesthetics_score", False)),
            side=8 * int(max(size) if isinstance(size, list) else size),
        )
    except (TypeError, ValueError) as e:
        raise e if isinstance(e, ConfigError) else ConfigError(f"scheduler_config.json is malformed: {e}") from e


def of_single_file(unet: Mapping[str, Any], implied: Mapping[str, Any], metadata: Mapping[str, str]) -> Conventions:
    """From the kind of UNet, the marks among a file's keys, and its header (modelspec.prediction_type).

    Stable Diffusion 2 was published with both predictions in equal shapes: then nothing may say which it is.  Raises
    ConfigError for a prediction that is not done here.
    """
    xl, second = unet["pooled_dim"] is not None, unet["pooled_dim"] is None and unet["context_dim"] == 1024
    spec = metadata.get("modelspec.prediction_type", "").lower()
    if spec and spec not in PREDICTIONS:
        raise ConfigError(f"its header says modelspec.prediction_type = {spec!r}; eps, v and x0 are done here")
    prediction = implied.get("prediction") or PREDICTIONS.get(spec) or (None if second else "eps")
    return Conventions(
        prediction=prediction,
        zero_terminal_snr="zero_terminal_snr" in implied,
        zero_negative=xl and unet["ids"] == 6,
        aesthetic=xl and unet["ids"] == 5,
        side=1024 if xl else 768 if second and prediction == "v" else 512,
    )
