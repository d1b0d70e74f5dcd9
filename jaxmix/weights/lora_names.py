"""The names that LoRA files give to modules and factors, and which of a model's modules they mean.

Files come from diffusers and PEFT (dotted names, in four generations), and from kohya's scripts and their followers
(``lora_unet_`` and underscores; diffusers' or the original latent diffusion layout). An underscore may stand for a dot
or for itself, so names are not parsed but looked up among the model's modules, all spelt with underscores.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

from jaxmix.types import InputError
from jaxmix.weights.single_file_names import TEXT_MODEL, UNET, unet_table

Role = Literal["down", "up", "alpha"]

KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
KOHYA_XL = KOHYA | {"text_encoder": "lora_te1_"}

_PREFIXES = {
    **{prefix: part for table in (KOHYA, KOHYA_XL) for part, prefix in table.items()},
    **{f"{part}.": part for part in KOHYA},
    "diffusion_model.": "unet",
    UNET: "unet",
    "base_model.model.": "unet",  # PEFT's own files, which hold one model
}
_FACTORS = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?P<module>.+)\.lora_(?P<end>A|B)(\.[^.]+)?\.weight",  # PEFT, with or without an adapter's name
        r"(?P<module>.+)\.to_(?P<old>q|k|v|out)_lora\.(?P<end>down|up)\.weight",  # diffusers before 0.17
        r"(?P<module>.+)\.(lora_|lora\.|lora_linear_layer\.)(?P<end>down|up)\.weight",  # kohya; diffusers since then
        r"(?P<module>.+)\.(?P<end>alpha)",
    )
)
_ROLES: dict[str, Role] = {"A": "down", "B": "up", "down": "down", "up": "up", "alpha": "alpha"}
_OTHER_FORMS = {
    r"\.lora_mid\.": "a Tucker decomposition (LoCon with lora_mid)",
    r"\.dora_scale$|\.lora_magnitude_vector": "DoRA",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.(oft_|boft_)": "OFT",
    r"\.on_input$": "(IA)^3",
    r"\.diff(_b)?$|\.(w|b)_norm$": "a difference of full weights",
    r"\.(lora_B|lora_up)(\.[^.]+)?\.bias$": "a LoRA with biases",
    r"\.lora_embedding_": "a LoRA of an embedding",
}


class Meaning(NamedTuple):
    """The meaning of a file's key: the part, the module (by the file's name for it), and which of its arrays."""

    part: str
    module: str
    role: Role


def parse(key: str) -> Meaning | None:
    """Return what a file's key means, or None if it is not of a LoRA."""
    dotted = key.replace(".processor.", ".")
    found = next((found for pattern in _FACTORS if (found := pattern.fullmatch(dotted))), None)
    if found is None:
        return None
    module = found["module"]
    prefix = next((prefix for prefix in _PREFIXES if module.startswith(prefix)), None)
    part = "unet" if prefix is None else _PREFIXES[prefix]
    module = module.removeprefix(prefix or "")
    if old := found.groupdict().get("old"):
        unet_names = {"out": "to_out.0"}
        module += "." + (unet_names.get(old, f"to_{old}") if part == "unet" else f"{old}_proj")
    return Meaning(part, module, _ROLES[found["end"]])


def refuse_other_forms(where: str, keys: Collection[str]) -> None:
    """Raise `InputError` if a file holds a form of low-rank change other than plain down, up and alpha."""
    for pattern, form in _OTHER_FORMS.items():
        of_it = [key for key in keys if re.search(pattern, key)]
        if of_it:
            raise InputError(
                f"{where}: {len(of_it)} of {len(keys)} tensors are {form}, such as {of_it[0]}: "
                "expected a plain LoRA (down, up and alpha)"
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
