"""An exported translator that is asked as a transformers model is."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from neural_layers.models.export import OnnxTranslator


class ServedTranslator:
    """`OnnxTranslator` behind the few names that `translate` asks a model for.

    folder: of an export. It runs on as many threads as torch does, for a fair comparison.
    """

    training = False
    device = torch.device("cpu")

    def __init__(self, folder: Path) -> None:
        self.served = OnnxTranslator(folder, threads=torch.get_num_threads())
        self.config = SimpleNamespace(max_position_embeddings=self.served.context)

    def eval(self) -> "ServedTranslator":
        return self

    def train(self, mode: bool = True) -> "ServedTranslator":
        """Refuses mode=True: a graph has no training mode."""
        if mode:
            raise ValueError("an exported model cannot be trained")
        return self

    def generate(self, source: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """Token ids (B, 1 + T) for sources (B, S); options as `GenerationOptions` names them."""
        found = self.served.generate(source.numpy(), attention_mask=attention_mask.numpy(), **options)
        return torch.from_numpy(found)


def weight_bytes(folder: Path) -> int:
    """Bytes of the weights of every graph in a folder; each graph holds its own."""
    import onnx

    total = 0
    for path in folder.glob("*.onnx"):
        graph = onnx.load(str(path)).graph
        total += sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer)
    return total
