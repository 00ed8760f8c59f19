"""How much memory a training takes: `python -m neural_layers.benchmarks.training_memory [PRESET]`.

Each way of training runs in a process of its own: all weights in float32, LoRA, and LoRA over NF4 weights (QLoRA,
arXiv 2305.14314) with gradient checkpointing; AdamW and the same batch for all. Counted is the most that the process
held during its training steps, as Linux keeps it, with Python and its libraries; loading the weights comes before.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WAYS = ("full", "lora", "qlora")
MEGA = 1e6


def main() -> None:
    """Measure every way and print a table; `--way` measures one, in this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("preset", nargs="?", default="slm-130m")
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--r", type=int, default=4)
    options = parser.parse_args()
    if options.way is not None:
        print(json.dumps(measure(options)))
        return
    sizes = ("--batch", options.batch, "--length", options.length, "--steps", options.steps, "--r", options.r)
    found = {}
    for way in WAYS:
        command = [sys.executable, "-m", __spec__.name, options.preset, "--way", way, *map(str, sizes)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
    print(f"{options.preset}, {options.batch} × {options.length} tokens a step, AdamW, adapters of rank {options.r}")
    print("way    trained      share   peak MB  of full  above the imports  of full  seconds a step")
    full = found["full"]
    for way, own in found.items():
        above, all_above = own["peak"] - own["imports"], full["peak"] - full["imports"]
        print(
            f"{way:5}  {own['trainable']:11,}  {own['trainable'] / own['total']:6.2%}  {own['peak']:7,.0f}  "
            f"{own['peak'] / full['peak']:7.3f}  {above:17,.0f}  {above / all_above:7.3f}  {own['seconds']:.1f}"
        )


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Train a few steps in this process: peak memory in MB, parameters, seconds."""
    import torch

    from neural_layers.models.hybrid import HybridConfig, HybridForCausalLM
    from neural_layers.wrappers import LoRAConfig, apply_lora, quantize

    imports = resident()
    torch.manual_seed(0)
    model = HybridForCausalLM(HybridConfig.preset(options.preset)).train()
    total = trainable = model.num_parameters()
    if options.way == "qlora":
        quantize(model, "nf4", double_quant=True)
        model.activation_checkpointing_enable({"use_reentrant": False})
    if options.way != "full":
        report = apply_lora(model, LoRAConfig(r=options.r, target_modules="all-linear"))
        total, trainable = report.total, report.trainable
    tokens = torch.randint(model.config.vocab_size, (options.batch, options.length))
    reset_peak()
    started = time.perf_counter()
    train(model, tokens, options.steps)
    seconds = (time.perf_counter() - started) / options.steps
    return {"peak": peak(), "imports": imports, "total": total, "trainable": trainable, "seconds": seconds}


def train(model: Any, tokens: Any, steps: int) -> None:
    """AdamW on one batch."""
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def reset_peak() -> None:
    """Give freed memory back to the system, and count the peak from here on."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """The most since `reset_peak`, in MB."""
    return _status("VmHWM")


def resident() -> float:
    """What the process holds now, in MB."""
    return _status("VmRSS")


def _status(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / MEGA


if __name__ == "__main__":
    main()
