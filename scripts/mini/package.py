"""Put a trained pipeline into the package as the embedded model, or trained adapters and their CLIP beside it.

python -m scripts.mini.package --pipeline runs/t2i/pipeline --vae runs/decoder/vae
python -m scripts.mini.package --vmix runs/vmix/adapter.safetensors
python -m scripts.mini.package --clip runs/clip/clip
python -m scripts.mini.package --ip runs/ip/ip_adapter.safetensors --ip_plus runs/ip_plus/ip_adapter.safetensors
python -m scripts.mini.package --edges runs/edges/controlnet --tile runs/tile/controlnet --masks runs/masks/controlnet
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxmix
from jaxmix import command
from jaxmix.methods.controlnet import PLACES as NETS
from jaxmix.methods.ip_adapter import PLACES as PICTURES
from jaxmix.methods.style_adapter import PLACES as STYLES
from jaxmix.methods.vmix import EMBEDDED
from jaxmix.models import AutoencoderKL, VAEConfig
from jaxmix.pipeline.loading import ASSETS
from jaxmix.pipeline.vision import EMBEDDED as ENCODERS
from jaxmix.types import InputError
from jaxmix.weights import load_tree, read_config


@dataclasses.dataclass
class Config:
    """What to package.

    Attributes:
        pipeline: diffusers folder written by train.text_to_image.
        vae: folder of the autoencoder to use instead of the pipeline's; the pipeline's if empty.
        vmix: adapter.safetensors written by train.vmix for the embedded model.
        clip: folder written by train.clip.
        ip: ip_adapter.safetensors written by train.ip_adapter for the embedded model, of kind base.
        ip_plus: the same of kind plus.
        style: style_adapter.safetensors written by train.style_adapter for the embedded model.
        edges: folder of a net by train.controlnet for the embedded model, of Canny's edges.
        tile: the same of small pictures.
        masks: the same of masks by colour.
        out: folder to which a pipeline is written.
        default_steps: default number of sampling steps.
        default_guidance_scale: default guidance.
    """

    pipeline: str = ""
    vae: str = ""
    vmix: str = ""
    clip: str = ""
    ip: str = ""
    ip_plus: str = ""
    style: str = ""
    edges: str = ""
    tile: str = ""
    masks: str = ""
    out: str = str(ASSETS / "mini")
    default_steps: int = 25
    default_guidance_scale: float = 3.0

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        others = ("vmix", "clip", "ip", "ip_plus", "style", "edges", "tile", "masks")
        if bool(self.pipeline) == any(getattr(self, name) for name in others):
            found = "both" if self.pipeline else "neither"
            raise InputError(f"pipeline, or some of {', '.join(others)}: found {found}, expected one of the two")


def package_vmix(path: str) -> None:
    """Cast an adapter for the embedded model to float16 and write it."""
    adapter = jaxmix.VMix.load(path)
    adapter.check(jaxmix.load("mini"))
    out = EMBEDDED["mini-vmix"]
    out.parent.mkdir(exist_ok=True)
    adapter.save(out, jnp.float16)
    count = sum(x.size for x in jax.tree.leaves(jaxmix.VMix.load(out).params))
    print(f"wrote {out}: {out.stat().st_size / 1e6:.2f} MB, {count:,} parameters beside its LoRA")


def package_clip(path: str) -> None:
    """Copy the CLIP of the scenes, which train.clip writes in float16."""
    jaxmix.ImageEncoder.load(path).texts(["a cat"])
    out = ENCODERS["mini-clip"]
    shutil.copytree(path, out, dirs_exist_ok=True)
    encoder = jaxmix.ImageEncoder.load("mini-clip")
    print(f"wrote {out}: {sum(x.stat().st_size for x in out.iterdir()) / 1e6:.2f} MB\n{encoder}")


def package_reader(name: str, kind: Any, path: str) -> None:
    """Cast an adapter that reads pictures with the embedded CLIP to float16 and write it."""
    pipe = jaxmix.load("mini")
    out = {**PICTURES, **STYLES}[name]
    kind.load(path, pipe, "mini-clip").save(out, jnp.float16)
    print(f"wrote {out}: {out.stat().st_size / 1e6:.2f} MB\n{kind.load(out, pipe, 'mini-clip')}")


def package_net(name: str, path: str) -> None:
    """Cast a ControlNet for the embedded model to float16 and write it."""
    pipe, out = jaxmix.load("mini"), NETS[name]
    jaxmix.ControlNet.load(path, pipe).save(out, jnp.float16)
    size = sum(x.stat().st_size for x in out.iterdir()) / 1e6
    print(f"wrote {out}: {size:.2f} MB\n{jaxmix.ControlNet.load(out, pipe)}")


def main(cfg: Config) -> int:
    """Load, cast to float16 and write; then load the result to check that it opens."""
    if not cfg.pipeline:
        for name, package in (("vmix", package_vmix), ("clip", package_clip)):
            if path := getattr(cfg, name):
                package(path)
        readers = {"ip": "mini-ip", "ip_plus": "mini-ip-plus", "style": "mini-style"}
        for key, name in readers.items():
            if path := getattr(cfg, key):
                package_reader(name, jaxmix.StyleAdapter if key == "style" else jaxmix.IPAdapter, path)
        for key in ("edges", "tile", "masks"):
            if path := getattr(cfg, key):
                package_net(f"mini-{key}", path)
        return 0
    pipe = jaxmix.load(cfg.pipeline)
    changes = {"default_steps": cfg.default_steps, "default_guidance_scale": cfg.default_guidance_scale}
    if cfg.vae:
        vae = AutoencoderKL(VAEConfig.from_dict(read_config(Path(cfg.vae))))
        if vae.config != pipe.vae.config:
            raise InputError(
                f"{cfg.vae}: its config differs from that of {cfg.pipeline}/vae, expected the same latents"
            )
        params = {**pipe.params, "vae": load_tree(cfg.vae, vae.abstract_params())}
        pipe = dataclasses.replace(pipe, params=params)
    # The folder keeps one tokenizer, the one that ships; the trained copy is the same file.
    dataclasses.replace(pipe, **changes, tokenizer=Path(cfg.pipeline) / "tokenizer").save(cfg.out, jnp.float16)
    again = jaxmix.load(cfg.out)
    counts = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in again.params.items()}
    size = sum(p.stat().st_size for p in Path(cfg.out).rglob("*") if p.is_file())
    shown = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in counts.items())
    print(f"wrote {cfg.out}: {size / 1e6:.1f} MB, parameters: {shown}")
    return 0


if __name__ == "__main__":
    command.run(main)
