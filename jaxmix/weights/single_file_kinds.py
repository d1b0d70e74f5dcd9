"""What a single safetensors file is, told from the names and shapes of its tensors alone."""

from __future__ import annotations

import re
from collections.abc import Mapping

from jaxmix.types import InputError
from jaxmix.weights.single_file_names import TEXTS, UNET, VAE, text_prefixes

Shapes = Mapping[str, tuple[int, ...]]

EXPECTED = "expected a Stable Diffusion 1.x, 2.x or SDXL checkpoint with UNet, VAE and text encoder in one file"

CONTROLNET = "a ControlNet"

# The first pattern that matches the start of a key (after any `model.diffusion_model.`) names the file. Adapters come
# first, because they repeat the names of what they adapt.
_KINDS = [
    (r"lora_controlnet$", "a control-LoRA"),
    (r"lllite_", "a ControlLLLite"),
    (r".*(lora_(up|down|A|B|unet|te)|\.lora\.|_lora\.|hada_w1|lokr_w|\.dora_scale)", "a LoRA or another adapter"),
    (r"(ip_adapter|image_proj|proj\.norm)\.|image_proj$", "an IP-Adapter"),
    (r"style_emb\.", "a StyleAdapter"),
    (r"(style|content)_(blip|proj_layer)\.", "a DEADiff checkpoint"),
    (r"(.*\.)?(task_embedding|control_add_embedding)\b", "a ControlNet-Union"),
    (r".*(control_to_base|ctrl_to_base)", "a ControlNet-XS"),
    (r"(adapter\.)?body\.\d+\.(resnets|block[12]|in_conv)\.", "a T2I-Adapter"),
    (r"controlnet_(blocks|x_embedder)\b", "a ControlNet of a diffusion transformer"),
    (r"control_model\.|.*zero_convs\.|controlnet_|input_hint_block\.", CONTROLNET),
    (r"emb_params$|string_to_param|(clip_l|clip_g)$", "a textual inversion embedding"),
    (r".*motion_modules\.", "an AnimateDiff motion module"),
    (r".*joint_blocks\.|.*\.add_k_proj\.|context_embedder\.", "a Stable Diffusion 3 model or one of its relatives"),
    (r"(double_blocks|double_stream_modulation|double_layers)\.", "a Flux model or one of its relatives"),
    (r"(clip_txt|clip|effnet|clip_txt_pooled)_mapper\.", "a Stable Cascade model"),
    (r"(y_embedder|caption_projection|adaln_single)\.", "a PixArt model"),
    (
        r"(net\.)?(blocks|layers|transformer_blocks|single_blocks|double_stream_blocks)\.|cap_embedder",
        "a diffusion transformer",
    ),
    (r"(down_blocks|up_blocks|mid_block)\.", "a UNet in the layout of diffusers"),
    (r"(text_model|transformer\.text_model|encoder\.layers|text_projection|embeddings)\b", "a text encoder alone"),
    (r"(first_stage_model\.)?((encoder|decoder)\.(conv_|mid|down|up)|(post_)?quant_conv\.)", "a VAE alone"),
    (r"(diffusion_model\.)?(input_blocks|middle_block|output_blocks)\.", "a UNet alone"),
    (r"(cond_stage_model|conditioner|text_encoders)\.", "a text encoder alone"),
]
# The same for files that do have such a UNet, anywhere in a key.
_VARIANTS = [
    (r"control_model\.", "a ControlNet with its Stable Diffusion model"),
    (r"(^|\.)edm_(mean|std)$|edm_vpred\.", "a model with the EDM noise schedule, such as Playground 2.5"),
    (r"\.(time_stack|time_mixer|temporal_transformer|motion_modules)\.", "a video model"),
    (r"\.(position_net|fuser)\.", "a GLIGEN model"),
]


def family_of(where: str, shapes: Shapes, needs_vae: bool = True) -> str:
    """Return "sd1", "sd2" or "sdxl"; raises InputError with one line that says what else the file is."""
    if not {f"{UNET}input_blocks.0.0.weight", f"{UNET}out.2.weight"} <= set(shapes):
        kind = kind_of(shapes)
        hint = "; --base (base=) takes the rest from another" if "UNet" in kind else ""
        raise InputError(f"{where}: this is {kind}, {EXPECTED}{hint}")
    for pattern, kind in _VARIANTS:
        if any(re.search(pattern, key) for key in shapes):
            raise InputError(f"{where}: this is {kind}, {EXPECTED}")

    texts = {family: text_prefixes(family, shapes) for family in TEXTS}
    added = f"{UNET}label_emb.0.0.weight" in shapes
    if f"{UNET}label_emb.weight" in shapes or (added and any(key.startswith("cond_stage_model.") for key in shapes)):
        raise InputError(f"{where}: this is an upscaler or unCLIP model (its UNet takes class labels), {EXPECTED}")
    if added and _any(texts["sd2"]) and not _any(texts["sdxl"]):
        raise InputError(f"{where}: this is an SDXL refiner, {EXPECTED}")

    family = "sdxl" if added else "sd2" if _any(texts["sd2"]) else "sd1"
    if family == "sd1" and _any(texts["sd1"]) and len(shapes.get(f"{UNET}middle_block.1.proj_in.weight", ())) == 2:
        raise InputError(
            f"{where}: has the UNet of Stable Diffusion 2.x with a text encoder in the layout of 1.x, {EXPECTED}"
        )
    vae = f"{VAE}decoder.conv_in.weight" in shapes
    found = "a UNet and a VAE" if vae else "a UNet"
    missing = [part for part, prefix in texts[family].items() if prefix is None]
    if missing:
        which = f"no {missing[0]}" if len(missing) < len(texts[family]) else "no text encoder"
        raise InputError(f"{where}: has {found} but {which}, {EXPECTED}; --base (base=) takes the rest from another")
    if not vae and needs_vae:
        raise InputError(
            f"{where}: has a UNet and a text encoder but no VAE (no key begins with {VAE}), {EXPECTED}; --vae (vae=) "
            "names one"
        )
    _check_widths(where, shapes, [prefix for prefix in texts[family].values() if prefix])
    return family


def kind_of(shapes: Shapes) -> str:
    """Say what a file is that is no whole checkpoint, by the names of its tensors."""
    if not shapes:
        return "a file without tensors"
    names = [key.removeprefix(UNET).removeprefix("model.") for key in shapes]
    for pattern, kind in _KINDS:
        if (hit := next((i for i, name in enumerate(names) if re.match(pattern, name)), None)) is not None:
            return f"{kind} (it has {list(shapes)[hit]!r})"
    first = ", ".join(repr(key) for key in list(shapes)[:3])
    return f"an unknown kind of model ({len(shapes)} tensors: {first}{', ...' if len(shapes) > 3 else ''})"


def _check_widths(where: str, shapes: Shapes, prefixes: list[str]) -> None:
    """Raise InputError if the UNet attends to text of another width than the text encoders' combined one."""
    wanted = next((s[1] for key, s in shapes.items() if key.endswith(".attn2.to_k.weight") and len(s) == 2), None)
    names = ("token_embedding.weight", "embeddings.token_embedding.weight")
    tables = [prefix + name for prefix in prefixes for name in names]
    found = sum(shapes[key][-1] for key in tables if key in shapes)
    if wanted != found:
        raise InputError(
            f"{where}: its UNet attends to text of width {wanted}, but its text encoders give {found}: these are "
            f"parts of different models"
        )


def _any(prefixes: Mapping[str, str | None]) -> bool:
    return any(prefixes.values())
