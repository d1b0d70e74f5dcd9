"""The names that LoRA files give to modules and factors, and which of a model's modules they mean.

Files come from diffusers and PEFT (dotted names, in four generations), from kohya's scripts and their followers
(``lora_unet_`` and underscores; diffusers' or the original latent diffusion layout), and from ComfyUI and LyCORIS. An
underscore may stand for a dot or for itself, so names are not parsed but looked up among the model's modules, all spelt
with underscores.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from jaxmix.types import InputError
from jaxmix.weights.single_file_names import TEXT_MODEL, UNET, unet_table

KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
KOHYA_XL = KOHYA | {"text_encoder": "lora_te1_"}

_COMFY = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}
_PREFIXES: dict[str, str | None] = {
    **{
        prefix + wrapped: part
        for wrapped in ("wrapped_transformer_", "")
        for table in (KOHYA, KOHYA_XL)
        for part, prefix in table.items()
        if part != "unet" or not wrapped
    },
    **{f"{part}.": part for part in KOHYA},
    **{
        f"{start}{name}.transformer.": part
        for start in ("text_encoders.", "clip.", "")
        for name, part in _COMFY.items()
    },
    "diffusion_model.": "unet",
    UNET: "unet",
    "lycoris_unet_": "unet",
    "lycoris_te_": "text_encoder",
    "lycoris_": None,
    "base_model.model.": None,  # PEFT's own files, which hold one model
}
_NAME = r"(\.[^.]+)?"  # of PEFT's adapter, where it is written
_FACTORS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(?P<module>.+)\.lora_(?P<end>A|B){_NAME}\.weight",  # PEFT
        r"(?P<module>.+)\.to_(?P<old>q|k|v|out)_lora\.(?P<end>down|up)\.weight",  # diffusers before 0.17
        rf"(?P<module>.+)\.(lora_|lora\.|lora_linear_layer\.)(?P<end>down|up|mid){_NAME}\.weight",  # kohya; diffusers
        r"(?P<module>.+)\.(?P<end>alpha)",
        rf"(?P<module>.+)\.(?P<end>hada_(?:w[12]_[ab]|t[12])){_NAME}(\.weight)?",
        rf"(?P<module>.+)\.(?P<end>lokr_(?:w[12](?:_[ab])?|t2)){_NAME}(\.weight)?",
        rf"(?P<module>.+)\.(?P<end>lora_magnitude_vector){_NAME}",
        r"(?P<module>.+)\.(?P<end>dora_scale|diff|diff_b|w_norm|b_norm)",
        rf"(?P<module>.+)\.(?P<end>lora_B|lora_up){_NAME}\.bias",
    )
)
_ROLES = {
    "A": "down",
    "B": "up",
    "w_norm": "diff",
    "b_norm": "diff_b",
    "lora_magnitude_vector": "magnitude",
    "lora_B": "up_bias",
    "lora_up": "up_bias",
}
BUNDLED = "bundle_emb."
"""The beginning of textual inversions that OneTrainer puts beside a LoRA."""

_OTHER_FORMS = {
    r"\.(oft_|boft_)": "OFT",
    r"\.(a1|a2|b1|b2)\.weight$": "GLoRA",
    r"\.on_input$": "(IA)^3",
    r"\.lora_embedding_": "a LoRA of an embedding",
    r"\.(vera_lambda|vera_)": "VeRA",
    r"\.ia3_l": "(IA)^3",
}


class Meaning(NamedTuple):
    """The meaning of a file's key: the part (None if its name does not tell), the module (by the file's name for it).

    ``role`` is one of `jaxmix.lora_forms`, or "dora_scale", or "up_bias", a bias beside "up".
    """

    part: str | None
    module: str
    role: str


def parse(key: str) -> Meaning | None:
    """Return what a file's key means, or None if it is not of a LoRA."""
    dotted = key.replace(".processor.", ".")
    found = next((found for pattern in _FACTORS if (found := pattern.fullmatch(dotted))), None)
    if found is None:
        return None
    module = found["module"]
    prefix = next((prefix for prefix in _PREFIXES if module.startswith(prefix)), None)
    part = None if prefix is None else _PREFIXES[prefix]
    module = module.removeprefix(prefix or "")
    if old := found.groupdict().get("old"):
        unet_names = {"out": "to_out.0"}
        in_unet = part == "unet" or (part is None and module.rpartition(".")[2] in ("attn1", "attn2"))
        module += "." + (unet_names.get(old, f"to_{old}") if in_unet else f"{old}_proj")
    return Meaning(part, module, _ROLES.get(found["end"], found["end"]))


def refuse_other_forms(where: str, keys: Collection[str]) -> None:
    """Raise `InputError` if a file holds a change of weights that is none of `jaxmix.lora_forms`."""
    for pattern, form in _OTHER_FORMS.items():
        of_it = [key for key in keys if re.search(pattern, key)]
        if of_it:
            raise InputError(
                f"{where}: {len(of_it)} of {len(keys)} tensors are {form}, such as {of_it[0]}: expected LoRA, LoCon, "
                "LoHa, LoKr, DoRA or full differences"
            )


def original_names(modules: Collection[str], unet_config: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of a UNet's modules in the original latent diffusion layout, given its diffusers config."""
    table = unet_table(unet_config)
    links = {module: table.of_ours(f"{module}.weight") for module in modules}
    return {
        module: link.key.removeprefix(UNET).removesuffix(".weight")
        for module, link in links.items()
        if link is not None
    }


class Index:
    """The modules of one part of a model under all the names that files use for them."""

    def __init__(self, part: str, modules: Collection[str], unet_config: Mapping[str, Any]):
        """Make the table; ``unet_config`` gives the UNet's names in the original layout."""
        self._modules = {flat(module): module for module in modules}
        if part == "unet":
            self._modules |= {flat(name): module for module, name in original_names(modules, unet_config).items()}
        else:  # transformers 5 leaves the prefix out
            self._modules |= {flat(module.removeprefix(TEXT_MODEL)): module for module in modules}

    def find(self, name: str) -> str | None:
        """Return our name of the module that a file calls ``name``, or None."""
        return self._modules.get(flat(name))

    def near(self, name: str) -> str | None:
        """Return the module with the name most like ``name``, or None if none is similar."""
        found = difflib.get_close_matches(flat(name), self._modules, n=1)
        return self._modules[found[0]] if found else None


def flat(name: str) -> str:
    """Return a module's name with underscores for dots, as in kohya's files."""
    return name.replace(".", "_")
