"""A result as `run_benchmarks` gives it, small and made up."""

from typing import Any

Result = dict[str, Any]


def times(median: float, lower: float | None = None, upper: float | None = None, count: int = 9) -> Result:
    return {"median": median, "lower": lower or median, "upper": upper or median, "count": count}


def sample(op: str = "selective_scan", threads: int = 1) -> Result:
    """Two sizes; of the peers one fails, one has no backward, one is absent; the limit is measured forward only."""
    ours = {"notes": [], "memory": {"forward": 10.0, "both": 20.0}, "difference": 0.0}
    peer = {"notes": [], "memory": {"forward": 100.0, "both": 260.0}, "difference": 1e-7}
    rows = []
    for T, scale in ((512, 1.0), (2048, 4.0)):
        contenders = {
            "neural_layers native": {
                **ours,
                "forward": times(scale * 0.01, scale * 0.0095, scale * 0.0105),
                "both": times(scale * 0.05),
            },
            "neural_layers torch": {**ours, "forward": times(scale * 0.1), "both": times(scale * 0.4)},
            "mambapy": {**peer, "forward": times(scale * 0.62, count=1), "both": times(scale * 4.0)},
            "transformers": {
                **peer,
                "forward": times(scale * 0.5),
                "memory": {"forward": 90.0},
                "notes": ["quadratic in T"],
            },
            "fragile": {"notes": [], "failed": "RuntimeError: no kernel"}
            if T == 2048
            else {**peer, "forward": times(0.02), "both": times(0.06)},
        }
        rows.append(
            {
                "size": {"B": 1, "T": T, "E": 8},
                "auto": "neural_layers native",
                "contenders": contenders,
                "limit": {"forward": times(scale * 0.007)},
            }
        )
    case = {
        "name": op,
        "about": "a scan",
        "axis": "T",
        "constants": {"B": 1, "E": 8},
        "dtype": "float32",
        "backward": True,
        "rows": rows,
        "failed": {},
        "backends": {"triton": "needs a GPU"},
        "by_name_only": {"torch": "rounds"},
        "absent": {"mamba_ssm": "runs on cuda only"},
        "calls": {"mambapy": "pscan", "transformers": "slow | path"},
        "limit": "the exponentials alone",
    }
    environment = {
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "abcdef123456",
        "device": "Some CPU",
        "kind": "cpu",
        "cpu": {"name": "Some CPU", "flags": ["avx2", "fma"], "cores": 2},
        "threads": threads,
        "load": [0.1, 0.2, 0.3],
        "native": "avx2",
        "platform": "Linux",
        "versions": {"python": "3.11", "torch": "2.13"},
        "variables": {},
    }
    return {"format": 1, "op": op, "effort": "full", "environment": environment, "cases": [case]}  # fmt: skip
