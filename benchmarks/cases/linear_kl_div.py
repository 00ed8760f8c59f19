"""The divergence of a student from its teacher, from the hidden states of both."""

import torch
import torch.nn.functional as tf
from torch import Tensor

from neural_layers.benchmarks.case import Call, Case, Inputs, Maker, Peer, Size, sweep
from neural_layers.benchmarks.limits import product_limit

TEMPERATURE = 2.0


def make(size: Size, maker: Maker) -> Inputs:
    """A student of width D and a wider teacher."""
    rows, V = size["rows"], size["V"]
    student, teacher = size["D"], size["teacher"]
    return {
        "student_hidden": maker.normal(rows, student),
        "student_weight": maker.normal(V, student) / student**0.5,
        "teacher_hidden": maker.normal(rows, teacher),
        "teacher_weight": maker.normal(V, teacher) / teacher**0.5,
        "temperature": TEMPERATURE,
    }


def kl_of_logits(student: Tensor, teacher: Tensor) -> Tensor:
    """T² · KL(teacher ‖ student), the mean over rows."""
    student, teacher = (tf.log_softmax(logits / TEMPERATURE, dim=-1) for logits in (student, teacher))
    return tf.kl_div(student, teacher, reduction="batchmean", log_target=True) * TEMPERATURE**2


def _full_logits(inputs: Inputs, *, compiled: bool) -> Call:
    hidden, weight = inputs["student_hidden"], inputs["student_weight"]
    teacher_hidden, teacher_weight = inputs["teacher_hidden"], inputs["teacher_weight"]

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = tf.linear(teacher_hidden, teacher_weight)
        return kl_of_logits(tf.linear(hidden, weight), teacher)

    called = torch.compile(loss, dynamic=False) if compiled else loss
    return Call(lambda: called(hidden, weight), (hidden, weight))


def full_logits(inputs: Inputs) -> Call:
    """All the logits of both."""
    return _full_logits(inputs, compiled=False)


def compiled(inputs: Inputs) -> Call:
    """All the logits, the loss fused by inductor."""
    return _full_logits(inputs, compiled=True)


def products(inputs: Inputs) -> float:
    """The logits of both."""
    student = float(inputs["student_hidden"].numel()) * inputs["student_weight"].shape[0]
    return student + float(inputs["teacher_hidden"].numel()) * inputs["teacher_weight"].shape[0]


def products_both(inputs: Inputs) -> float:
    """And two more of the student's size for its gradients."""
    return products(inputs) + 2.0 * inputs["student_hidden"].numel() * inputs["student_weight"].shape[0]


def long(size: Size, effort: str) -> str | None:
    """Only in a recording; memory is measured all the same."""
    return "takes half a minute: not with --quick" if effort == "quick" and size["rows"] > 512 else None


def _case(
    name: str,
    about: str,
    *,
    V: int,
    D: int,
    teacher: int,
    quick: tuple[int, ...],
    full: tuple[int, ...],
    cuda: tuple[Size, ...] = (),
) -> Case:
    return Case(
        name=name,
        op="linear_kl_div",
        about=about,
        axis="rows",
        make=make,
        leaves=("student_hidden", "student_weight"),
        tiny=sweep(rows=(3, 5), D=8, teacher=12, V=11),
        quick=sweep(rows=quick, D=D, teacher=teacher, V=V),
        full=sweep(rows=full, D=D, teacher=teacher, V=V),
        cuda=cuda,
        peers=(
            Peer("full logits", full_logits, call="kl_div of the two log_softmax of all the logits"),
            Peer(
                "torch.compile",
                compiled,
                only_full="takes 15 s to compile: not with --quick",
                call="the same, compiled by inductor",
            ),
        ),
        limit=product_limit(products, products_both),
        untimed=long,
    )


CASES = (
    _case("linear_kl_div", "KL of a student to its teacher, rows × D over V words", V=32000, D=512, teacher=768,
          quick=(512, 1024), full=(128, 512, 2048, 8192),
          cuda=sweep(rows=(2048, 8192), D=2048, teacher=4096, V=128256)),
    _case("linear_kl_div_152k", "the same over the vocabulary of Qwen2", V=151936, D=896, teacher=1536, quick=(),
          full=(256, 2048)),
)  # fmt: skip
