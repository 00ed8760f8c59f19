"""The CVM translator at the size of `CVMConfig.student()`, quantized in torch and in ONNX Runtime, and by peers."""

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import neural_layers
from neural_layers.benchmarks.case import Call, Case, Inputs, Maker, Peer, Size, sweep

MODELS = "pip install 'neural-layers[models]'"
ONNX = "pip install 'neural-layers[models,onnx]'"
# Contender → the arguments of `quantize`; None leaves the model in float32.
_TORCH: dict[str, dict[str, Any] | None] = {
    "torch float32": None,
    "torch bfloat16": {"scheme": "bfloat16"},
    "torch int8_dynamic": {"scheme": "int8_dynamic"},
    "torch int8_static": {"scheme": "int8_static"},
    "torch int4": {"scheme": "int4"},
    "torch nf4": {"scheme": "nf4"},
}
_ONNX = ("float32", "int8_dynamic", "int8_static", "int4", "nf4")


def make(size: Size, maker: Maker) -> Inputs:
    """An initialised model, as its weights do not change its speed; a source of S tokens, a target of P + T."""
    from neural_layers.models.cvm import CVMConfig, CVMForConditionalGeneration

    torch.manual_seed(0)
    config = CVMConfig.student(
        vocab_size=size["V"], hidden_size=size["D"], intermediate_size=size["F"], num_attention_heads=size["H"],
        num_hidden_layers=size["layers"], max_position_embeddings=1024,
    )  # fmt: skip
    model = CVMForConditionalGeneration(config).eval().to(maker.device, maker.dtype)
    source = maker.integers(size["V"] - 3, size["B"], size["S"]) + 3
    target = maker.integers(size["V"] - 3, size["B"], size["P"] + size["T"]) + 3
    return {"model": model, "source": source, "target": target, "past": size["P"]}


def quantized(inputs: Inputs, options: dict[str, Any] | None) -> Any:
    """A copy of the model, quantized; calibrated, where that is asked for, on the very inputs."""
    from neural_layers.wrappers.quantization import quantize

    if options is None:
        return inputs["model"]
    model = copy.deepcopy(inputs["model"])
    if options["scheme"] == "int8_static":
        options = options | {"calibration": [(inputs["source"], None, inputs["target"])]}
    quantize(model, **options)
    return model


def sentences(model: Any, inputs: Inputs) -> Call:
    """Sources and targets at once, as in training: the logits of every position."""

    def run() -> Tensor:
        logits: Tensor = model(input_ids=inputs["source"], decoder_input_ids=inputs["target"]).logits
        return logits

    return Call(run)


def steps(model: Any, inputs: Inputs) -> Call:
    """The last T tokens of the target one by one behind the first P, with the cache: their logits."""
    past = inputs["past"]
    mask = torch.ones_like(inputs["source"])
    with torch.no_grad():
        encoded = model.encoder(inputs["source"])
        read = model(encoder_outputs=encoded, decoder_input_ids=inputs["target"][:, :past], use_cache=True)
    cache = read.past_key_values
    layers = cache.self_attention_cache.layers
    held = [(layer.keys, layer.values) for layer in layers]

    def run() -> Tensor:
        for layer, (keys, values) in zip(layers, held, strict=True):
            layer.keys, layer.values = keys, values
        made = [
            model(
                encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=inputs["target"][:, i : i + 1],
                past_key_values=cache, use_cache=True,
            ).logits
            for i in range(past, inputs["target"].shape[1])
        ]  # fmt: skip
        return torch.cat(made, dim=1)

    return Call(run)


def onnx(prepare: Callable[[Any, Inputs], Call], inputs: Inputs, scheme: str) -> Call:
    """The exported translator in ONNX Runtime."""
    from neural_layers.models.export import OnnxTranslator, export_onnx

    model = quantized(inputs, None if scheme == "float32" else {"scheme": scheme})
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, folder, verify=False)
        served = OnnxTranslator(folder, threads=torch.get_num_threads())
    return prepare(served, inputs)


def onnx_sentences(served: Any, inputs: Inputs) -> Call:
    """As `sentences`."""
    source, target = inputs["source"].numpy(), inputs["target"].numpy()
    rows, length = target.shape

    def run() -> Tensor:
        context = served.encoder.run(source, _ones(source))
        logits, _ = served.decoder.run(target, _ones(target), served.decoder.start(rows), length, **context)
        return torch.from_numpy(logits)

    return Call(run)


def onnx_steps(served: Any, inputs: Inputs) -> Call:
    """As `steps`."""
    from neural_layers.models.export.stepper import Stepper

    source, target, past = inputs["source"].numpy(), inputs["target"].numpy(), inputs["past"]
    context = served.encoder.run(source, _ones(source))
    begin = target[:, :past]
    _, state = served.decoder.run(begin, _ones(begin), served.decoder.start(len(target)), 1, **context)

    def run() -> Tensor:
        step = Stepper(served.decoder, state, **context)
        made = [torch.from_numpy(step(target[:, i : i + 1]).copy()) for i in range(past, target.shape[1])]
        return torch.stack(made, dim=1)

    return Call(run)


def _ones(ids: Any) -> Any:
    return ids * 0 + 1


def torch_linear(prepare: Callable[[Any, Inputs], Call], inputs: Inputs) -> Call:
    """The float32 model with torch's own linear layer in the place of ours, which is faster for few rows."""
    call = prepare(inputs["model"], inputs)

    def run() -> Any:
        with neural_layers.use_backend(linear="torch"):
            return call.run()

    return Call(run)


def nf4_int8(prepare: Callable[[Any, Inputs], Call], inputs: Inputs) -> Call:
    """NF4 with the backend that also rounds the inputs to 8 bits."""
    call = prepare(quantized(inputs, {"scheme": "nf4"}), inputs)

    def run() -> Any:
        with neural_layers.use_backend(linear_4bit="native_int8"):
            return call.run()

    return Call(run)


def torchao(prepare: Callable[[Any, Inputs], Call], inputs: Inputs) -> Call:
    """Int8DynamicActivationInt8WeightConfig on the linear layers; the tied head becomes one of them."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = _replaced(inputs["model"], _plain)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return prepare(model, inputs)


def bitsandbytes(prepare: Callable[[Any, Inputs], Call], inputs: Inputs) -> Call:
    """Linear4bit (NF4) in the place of the linear layers, the head too."""
    import bitsandbytes.nn

    layers: Any = bitsandbytes.nn

    def of(layer: nn.Linear) -> nn.Module:
        made = layers.Linear4bit(
            layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=torch.float32,
            quant_type="nf4",
        )  # fmt: skip
        made.weight = layers.Params4bit(layer.weight.detach().clone(), requires_grad=False, quant_type="nf4")
        return made.to("cpu")

    return prepare(_replaced(inputs["model"], of), inputs)


def _plain(layer: nn.Linear) -> nn.Linear:
    made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    made.load_state_dict(layer.state_dict())
    return made


def _replaced(model: Any, of: Callable[[nn.Linear], nn.Module]) -> Any:
    from neural_layers.wrappers.modules import replace_module

    made = copy.deepcopy(model)
    for name, module in list(made.named_modules()):
        if isinstance(module, nn.Linear):
            replace_module(made, name, of(module))
    return made.eval()


def _case(
    name: str, about: str, prepare: Any, prepare_onnx: Any, tiny: tuple[Size, ...], quick: tuple[Size, ...],
    full: tuple[Size, ...],
) -> Case:  # fmt: skip
    def in_torch(options: dict[str, Any] | None) -> Callable[[Inputs], Call]:
        return lambda inputs: prepare(quantized(inputs, options), inputs)

    return Case(
        name=name,
        op="quantized_models",
        about=about,
        axis="T",
        make=make,
        leaves=(),
        tiny=tiny,
        quick=quick,
        full=full,
        ours=(
            *(Peer(contender, in_torch(options), "transformers", MODELS) for contender, options in _TORCH.items()),
            Peer("torch nf4, inputs in 8 bits", partial(nf4_int8, prepare), "transformers", MODELS, "cpu"),
            *(
                Peer(f"ONNX Runtime {scheme}", partial(onnx, prepare_onnx, scheme=scheme), "onnxruntime", ONNX, "cpu")
                for scheme in _ONNX
            ),
        ),
        peers=(
            Peer("torch.nn.Linear float32", partial(torch_linear, prepare), call="our model on torch's linear layer"),
            Peer("torchao int8 dynamic", partial(torchao, prepare), "torchao", "pip install torchao", "cpu",
                 call="our model after torchao's quantize_"),
            Peer("bitsandbytes NF4", partial(bitsandbytes, prepare), "bitsandbytes", "pip install bitsandbytes", "cpu",
                 call="our model on bitsandbytes.nn.Linear4bit"),
        ),
        dtypes={"cpu": torch.float32, "cuda": torch.float32},
        # Weights at random are the worst case of 4 bits; other weights or other tokens would differ by more than 1.
        largest_difference={"cpu": 0.6, "cuda": 0.6},
        no_memory="each of many contenders would build the model in a process of its own; sizes are in docs/results.md",
    )  # fmt: skip


_SHAPE = {"V": 32000, "D": 512, "F": 2048, "H": 8, "layers": 6}
_TINY = {"V": 64, "D": 128, "F": 128, "H": 4, "layers": 1}

CASES = (
    _case(
        "quantized_sentences",
        "B sources of S tokens and their targets of T, all logits; the CVM student, 73 M parameters",
        sentences,
        onnx_sentences,
        tiny=sweep(T=(2, 3), B=2, S=5, P=0, **_TINY),
        quick=sweep(T=(128,), B=4, S=128, P=0, **_SHAPE),
        full=sweep(T=(128,), B=4, S=128, P=0, **_SHAPE),
    ),
    _case(
        "quantized_steps",
        "T target tokens one by one behind P, with the cache, the source of S read before; the CVM student",
        steps,
        onnx_steps,
        tiny=sweep(T=(2, 3), B=2, S=5, P=3, **_TINY),
        quick=sweep(T=(8,), B=1, S=32, P=32, **_SHAPE),
        full=sweep(T=(8, 64), B=1, S=32, P=32, **_SHAPE),
    ),
)
