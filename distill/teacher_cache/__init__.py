"""A teacher's largest logits on disk: made once, and trained from as often as wanted."""

from neural_layers.distill.losses.top_k import TopK
from neural_layers.distill.teacher_cache.build import build_cache
from neural_layers.distill.teacher_cache.store import TeacherCache

__all__ = ["TeacherCache", "TopK", "build_cache"]
