"""Write the measured tables into docs/performance.md and docs/scaling.md.

    python -m benchmarks --keep_ratios --output docs/results/performance-cpu.json
    python -m docs.make_performance

The GPU tables come from docs/results/performance-gpu.json, if it exists.
"""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.results import markdown
from benchmarks.scaling_model import GPUS, Cluster, efficiency

HERE = Path(__file__).parent
PAGES = (HERE / "performance.md", HERE / "scaling.md")
RESULTS = {device: HERE / "results" / f"performance-{device}.json" for device in ("cpu", "gpu")}
BLOCK = re.compile(r"(<!-- (cpu|gpu|model): ([^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
# If no GPU has been measured, the model assumes this share of an H200's dense bfloat16 rate.
ASSUMED_RATE, ASSUMED_SHARE = 989e12, 0.25
MODELLED = {"preact_resnet_18": (512, 10, 0.5554e9, 11_172_170), "wrn_32_10": (256, 7, 6.630e9, 45_901_914)}
BUCKET_BYTES = 25 * 2**20


def filled(page: str, results: dict[str, dict[str, Any]]) -> str:
    """The page with every marked block regenerated."""

    def block(found: re.Match[str]) -> str:
        begin, source, name, end = found.groups()
        return f"{begin}{content(source, name, results)}\n{end}"

    return BLOCK.sub(block, page)


def content(source: str, name: str, results: dict[str, dict[str, Any]]) -> str:
    """Content of a block."""
    if source == "model":
        return model(results)
    found = results.get(source)
    if found is None or (name not in found["tables"] and name not in ("facts", "bars")):
        return "*Not measured yet.*"
    if name == "facts":
        return facts(found["facts"])
    if name == "bars":
        return bars(found["ratios"])
    table = found["tables"][name]
    return "\n".join(markdown(table["columns"], table["rows"]))


def facts(found: dict[str, Any]) -> str:
    """Origin of the figures."""
    load = max(found["load before"], found.get("load after", 0))
    again = "".join(
        f" Stage {stage}: `{run['command']}` at {run['commit']}, {run['device']}."
        for stage, run in found.get("again", {}).items()
    )
    return (
        f"`{found['command']}`, seed 0, at {found['commit']}: {found['device']}, torch "
        f"{found['torch']}, Python {found['python']}; {found.get('seconds', '?')} s, load average up to {load:.1f}."
        f"{again}"
    )


def bars(ratios: dict[str, dict[str, float | None]]) -> str:
    """Ratios that have a threshold, and whether they meet it."""
    rows = []
    for name, ratio in ratios.items():
        if ratio["bar"] is None:
            continue
        missed = 100 * (ratio["median"] / (ratio["bar"] or 1) - bool(ratio["bar"]))  # type: ignore[operator]
        verdict = "met" if missed <= 0 else f"missed by {missed:.0f} %"
        rows.append([name, f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"])
        rows[-1] += [f"{ratio['bar']:.2f}", verdict]
    return "\n".join(markdown(["ratio (lower is better)", "median (quartiles)", "threshold", ""], rows))


def model(results: dict[str, dict[str, Any]]) -> str:
    """Modelled weak scaling."""
    measured = results.get("gpu", {}).get("raw", {})
    rows = []
    for name, (batch, steps, multiply_adds, parameters) in MODELLED.items():
        passes = 2 * steps + 6
        seconds = measured.get(f"step seconds {name}", {}).get("TLA, pool: batch")
        origin = "measured"
        if seconds is None:
            seconds = passes * 2 * multiply_adds * batch / (ASSUMED_RATE * ASSUMED_SHARE)
            origin = "assumed"
        num_bytes = 4 * parameters
        buckets = -(-num_bytes // BUCKET_BYTES) + 1
        shares = [efficiency(seconds, 4 / passes * seconds, num_bytes, buckets, count, Cluster()) for count in GPUS]
        rows.append([f"`{name}`, K = {steps}, {batch} per GPU", f"{1000 * seconds:.0f} ({origin})"])
        rows[-1] += [f"{num_bytes / 1e6:.0f}", *(f"{100 * share:.1f} %" for share in shares)]
    return "\n".join(markdown(["run", "step, ms", "MB reduced", *(f"{count} GPUs" for count in GPUS)], rows))


def load() -> dict[str, dict[str, Any]]:
    """The available results."""
    return {device: json.loads(path.read_text()) for device, path in RESULTS.items() if path.exists()}


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), load()), encoding="utf-8")
