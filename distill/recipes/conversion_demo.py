"""What converting half of a transformer's layers costs, and what distillation brings back: docs/conversion.md.

`python -m neural_layers.distill.recipes.conversion_demo --data DIR --out DIR`, where the data folder holds train.txt
and valid.txt, trains a small Llama of transformers on their characters, converts every second layer, and trains the
hybrid in three ways with the same steps on the same batches: distilled from the original; on the text alone; distilled,
but with the replaced layers initialised at random. Written are results.json and conversion.png.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from neural_layers.distill.files import save_json
from neural_layers.distill.recipes.conversion_report import plot, table
from neural_layers.errors import InputError
from neural_layers.functional import linear_cross_entropy, linear_kl_div
from neural_layers.models.conversion import convert_to_hybrid, from_transformers
from neural_layers.models.hybrid import HybridForCausalLM
from neural_layers.models.hybrid.layers import build_mixer

LossOf = Callable[[HybridForCausalLM, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DemoOptions:
    """data: a folder with train.txt and valid.txt. Sizes are those of the Llama; steps, those of each hybrid."""

    data: Path
    out: Path
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    context: int = 96
    batch: int = 12
    teacher_steps: int = 1200
    teacher_rate: float = 2e-3
    calibration_steps: int = 200
    steps: int = 300
    rate: float = 5e-4
    eval_every: int = 50
    eval_windows: int = 96
    seed: int = 0


class Characters:
    """A text as the ids of its characters, in training windows at random and validation windows at fixed places.

    Raises InputError for a missing file and for a text that is shorter than a window.
    """

    def __init__(self, options: DemoOptions) -> None:
        texts = {}
        for name in ("train", "valid"):
            path = options.data / f"{name}.txt"
            if not path.is_file():
                raise InputError(f"{options.data} holds no {path.name}")
            texts[name] = path.read_text(encoding="utf-8")
            if len(texts[name]) < 2 * options.context:
                raise InputError(f"{path} has {len(texts[name])} characters; {2 * options.context} are needed")
        self.alphabet = sorted(set(texts["train"] + texts["valid"]))
        index = {character: i for i, character in enumerate(self.alphabet)}
        train, valid = (torch.tensor([index[c] for c in texts[name]]) for name in ("train", "valid"))
        self.windows_NT = train.unfold(0, options.context + 1, 1)
        held_NT = valid.unfold(0, options.context + 1, 1)
        self.valid_NT = held_NT[torch.linspace(0, len(held_NT) - 1, options.eval_windows).long()]

    def batches(self, count: int, size: int, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            yield self.windows_NT[torch.randint(len(self.windows_NT), (size,), generator=generator)]


@torch.no_grad()
def validation_loss(model: Any, data: Characters) -> float:
    """The mean cross-entropy of a character of the validation windows, in nats."""
    model.eval()
    losses = [
        torch.nn.functional.cross_entropy(model(part[:, :-1]).logits.flatten(0, 1), part[:, 1:].flatten())
        for part in data.valid_NT.split(16)
    ]
    return float(torch.stack(losses).mean())


def train(
    model: Any, loss_of: LossOf, data: Characters, options: DemoOptions, steps: int, rate: float, name: str, seed: int
) -> list[tuple[int, float]]:
    """AdamW with warmup and a cosine to a tenth; returns (step, validation loss), the first before any step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    curve, started = [(0, validation_loss(model, data))], time.perf_counter()
    for step, ids_BT in enumerate(data.batches(steps, options.batch, seed), start=1):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(step / 40, 0.55 + 0.45 * math.cos(math.pi * step / steps))
        loss_of(model, ids_BT[:, :-1], ids_BT[:, 1:].contiguous()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % options.eval_every == 0 or step == steps:
            curve.append((step, validation_loss(model, data)))
            seconds = time.perf_counter() - started
            print(f"{name}: step {step}/{steps}, validation loss {curve[-1][1]:.3f}, {seconds:.0f} s", flush=True)
    return curve


def text_loss(model: Any, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """The cross-entropy with the text."""
    states_BTD = model.model(input_ids=inputs_BT, use_cache=False).last_hidden_state
    return linear_cross_entropy(states_BTD, model.lm_head.weight, targets_BT)


def distillation_loss(original: HybridForCausalLM) -> LossOf:
    """KL(original ‖ model) of the next characters."""

    def loss(model: HybridForCausalLM, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        with torch.no_grad():
            taught_BTD = original.model(input_ids=inputs_BT, use_cache=False).last_hidden_state
        states_BTD = model.model(input_ids=inputs_BT, use_cache=False).last_hidden_state
        return linear_kl_div(states_BTD, model.lm_head.weight, taught_BTD, original.lm_head.weight)

    return loss


def forget_replaced(model: HybridForCausalLM, layers: list[int], seed: int) -> None:
    """Give the mixers of the `layers` new random weights: the same shapes, and nothing of the attention."""
    torch.manual_seed(seed)
    for layer in layers:
        config: Any = model.config
        mixer: Any = build_mixer(config, layer, model.model.rotary)
        model.model.layers[layer].mixer.inner = mixer


def train_llama(data: Characters, options: DemoOptions) -> LlamaForCausalLM:
    """The transformers model that is converted."""
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=len(data.alphabet),
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=2 * options.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    llama = LlamaForCausalLM(config)
    train(llama, text_loss, data, options, options.teacher_steps, options.teacher_rate, "llama", options.seed)
    return llama


def run(options: DemoOptions) -> dict[str, Any]:
    """Train, convert, distil; return the content of results.json, which is written with the plot.

    Raises InputError for data that is missing or too short.
    """
    started, data = time.perf_counter(), Characters(options)
    llama = train_llama(data, options)
    original = from_transformers(llama)
    replaced = list(range(1, options.layers, 2))
    before = validation_loss(original, data)
    errors: list[tuple[int, float, float]] = []
    converting = time.perf_counter()
    carried = convert_to_hybrid(original, replaced, calibration_steps=0)
    distilled = convert_to_hybrid(
        original,
        replaced,
        calibration_steps=options.calibration_steps,
        seed=options.seed,
        tell=lambda *heard: errors.append(heard),
    )
    converting = time.perf_counter() - converting
    plain = copy.deepcopy(distilled)
    random = convert_to_hybrid(original, replaced, calibration_steps=0)
    forget_replaced(random, replaced, options.seed)
    taught = distillation_loss(original)
    curves = {}
    for name, model, loss in (
        ("distilled", distilled, taught),
        ("text alone", plain, text_loss),
        ("random", random, taught),
    ):
        curves[name] = train(model, loss, data, options, options.steps, options.rate, name, options.seed + 1)
    result = {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()},
        "replaced": replaced,
        "parameters": {"original": original.num_parameters(), "hybrid": distilled.num_parameters()},
        "transformers": validation_loss(llama, data),
        "original": before,
        "carried": validation_loss(carried, data),
        "fitted": curves["distilled"][0][1],
        "errors": errors,
        "curves": curves,
        "seconds": {"converting": converting, "all": time.perf_counter() - started},
        "threads": torch.get_num_threads(),
    }
    write(result, options.out)
    return result


def write(result: dict[str, Any], out: Path) -> None:
    """results.json and conversion.png."""
    save_json(out / "results.json", result)
    plot(result).savefig(out / "conversion.png", dpi=110)


def main(arguments: list[str] | None = None) -> int:
    """Run with the options of the command line; 2 for bad input."""
    parser = argparse.ArgumentParser(description="Convert half of a small transformer's layers, and distil it.")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder with train.txt and valid.txt")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results.json and the plot go")
    for name in ("steps", "teacher_steps", "seed"):
        default = DemoOptions.__dataclass_fields__[name].default
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; default: 1")
    given = vars(parser.parse_args(arguments))
    torch.set_num_threads(given.pop("threads"))
    try:
        result = run(DemoOptions(**given))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
