"""How large a report is, and how long Chromium without a window takes to open it.

python bench/report_page.py PAGE --json FILE [--rounds 9]

Milliseconds from the start of the navigation to the end of the ``load`` event and of the first paint, each round in a
new context without a cache. Needs the extra ``browser`` and Chromium (VLAQUANT_CHROMIUM=PATH, or on the PATH).
"""

import argparse
import json
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

_TIMES = """() => new Promise(done => requestAnimationFrame(() => setTimeout(() => done({
    load: performance.getEntriesByType('navigation')[0].loadEventEnd,
    paint: performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? performance.now(),
    elements: document.querySelectorAll('*').length,
}))))"""


def open_page(page: Path, rounds: int) -> dict[str, Any]:
    executable = os.environ.get("VLAQUANT_CHROMIUM") or shutil.which("chromium")
    found = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        for _ in range(rounds + 1):
            context = browser.new_context(viewport={"width": 1280, "height": 900})
            tab = context.new_page()
            tab.goto(page.resolve().as_uri())
            found.append(tab.evaluate(_TIMES))
            context.close()
        version = browser.version
        browser.close()
    measured = found[1:]  # the first one also starts the browser's processes
    return {
        "page": page.name,
        "bytes": page.stat().st_size,
        "elements": measured[0]["elements"],
        "browser": f"Chromium {version}",
        "rounds": rounds,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        **{
            f"{name}_ms": {"median": statistics.median(times), "max": max(times)}
            for name in ("load", "paint")
            for times in [[one[name] for one in measured]]
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    result = open_page(args.page, args.rounds)
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
