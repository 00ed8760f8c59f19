"""Colours and layout of the page. The plots are drawn in the light colours; in the page CSS variables replace them."""

# name: (on a light page, on a dark page). The light ones differ from each other, because `svg.py` finds them by value.
PALETTE: dict[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#14171d"),
    "panel": ("#f4f6f9", "#1d222b"),
    "ink": ("#1c2230", "#e8ebf1"),
    "muted": ("#566072", "#a3adbd"),
    "line": ("#d5dae3", "#394150"),
    "teacher": ("#6a3fa0", "#c0a4f5"),
    "student": ("#0b5cad", "#74b6ff"),
    "baseline": ("#a34a00", "#f5a862"),
    "kl": ("#00706b", "#4fd0c7"),
    "hard": ("#9c1f4b", "#ff92b4"),
    "cosine": ("#5c6300", "#cdd45a"),
    "mse": ("#7d4e57", "#d9b0b8"),
    "good": ("#0f6b33", "#6fdc97"),
    "bad": ("#a61b1b", "#ff9a92"),
}


def light(name: str) -> str:
    """The colour of that name on a light page."""
    return PALETTE[name][0]


def _variables(which: int) -> str:
    return " ".join(f"--{name}: {pair[which]};" for name, pair in PALETTE.items())


_LAYOUT = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.5rem 0 .75rem; }
p { margin: .4rem 0; max-width: 90ch; }
.verdict { font-size: 1.35rem; line-height: 1.35; font-weight: 600; margin: 1rem 0 .6rem; }
.mark { display: inline-block; padding: .15rem .6rem; border: 1.5px solid currentColor; border-radius: .4rem;
  font-weight: 600; }
.better, .kept { color: var(--good); } .lost { color: var(--bad); } .unknown { color: var(--muted); }
.note, figcaption { color: var(--muted); font-size: .875rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .45rem .55rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
thead th { vertical-align: bottom; font-size: .8rem; line-height: 1.3; color: var(--muted); font-weight: 600;
  overflow-wrap: normal; }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
.numbers th[scope=row] { min-width: 7.5rem; overflow-wrap: normal; }
.numbers th[scope=row] small { display: block; color: var(--muted); font-weight: 400; }
.sentences thead th:not(:first-child):not(:last-child) { width: 21%; }
h3 { font-size: 1rem; line-height: 1.3; margin: 1.75rem 0 .5rem; }
.plain { margin: .4rem 0 1rem; padding-left: 1.25rem; max-width: 90ch; }
.quality { max-width: 60rem; }
.matrices { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 32rem), 1fr)); gap: 1.5rem; }
.scroll { overflow-x: auto; min-width: 0; }
.confusion { width: auto; font-size: .8rem; font-variant-numeric: tabular-nums; }
.matrix { font-size: .85rem; font-weight: 600; } .matrices > div { min-width: 0; }
.confusion td, .confusion thead th {
  text-align: center; padding: .3rem .35rem; min-width: 1.9rem; overflow-wrap: normal; }
.confusion th[scope=row] { font-weight: 400; padding: .3rem .5rem .3rem 0; max-width: 12rem; overflow-wrap: anywhere; }
.confusion tbody td { background: color-mix(in srgb, var(--student) calc(var(--share) * .35), transparent); }
.confusion .right { font-weight: 700; outline: 1.5px solid var(--ink); outline-offset: -2px; }
.key { display: none; font-size: .875rem; }
.confusion .none { color: var(--muted); }
.kind { white-space: nowrap; }
.kind.worst { font-weight: 600; color: var(--bad); }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.25rem; align-items: start; }
figure { margin: 0; padding: .9rem; background: var(--panel); border-radius: .6rem; min-width: 0; }
figure.tall { grid-row: span 2; }
figure svg { display: block; width: 100%; height: auto; margin: 0 auto; max-width: 600px; }
pre { background: var(--panel); padding: .7rem .9rem; border-radius: .4rem; margin: 0 0 1rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .875rem; }
.facts { max-width: 60rem; } .facts th[scope=row] { width: 34%; font-weight: 600; }
details { margin-top: 1rem; } summary { cursor: pointer; font-weight: 600; padding: .4rem 0; }
@media (max-width: 1060px) {
  .cards, .cards tr, .cards th, .cards td { display: block; width: 100%; }
  .cards thead { display: none; }
  .cards tbody { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: .9rem; }
  .cards tr { padding: .5rem .8rem; background: var(--panel); border-radius: .6rem; min-width: 0; }
  .cards th, .cards td { border-bottom: 0; padding: .25rem 0; }
  .cards td[data-label]::before { content: attr(data-label); color: var(--muted); font-size: .8rem; }
  .cards.numbers td { display: flex; justify-content: space-between; gap: 1rem; }
  .cards.numbers td::before { text-align: left; }
  .cards.sentences td::before { display: block; }
}
@media (max-width: 860px) { .plots { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 560px) {
  .key { display: block; } .confusion th span { display: none; }
  .confusion td, .confusion thead th { padding: .3rem .15rem; min-width: 1.6rem; }
}
@media (max-width: 480px) {
  main { padding: 1.25rem .9rem 3rem; }
  figure { padding: .6rem .4rem; } figcaption { padding: 0 .4rem; }
}
@media print { figure, tr { break-inside: avoid; } }
"""

CSS = (
    f":root {{ color-scheme: light dark; {_variables(0)} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(1)} }} }}{_LAYOUT}"
)
