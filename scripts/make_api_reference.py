"""Build the API reference of everything public as HTML; any warning is an error.

python scripts/make_api_reference.py DIRECTORY
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

#: What users may import. Of a package with ``__all__`` these names (``vlaquant`` brings its ``plan``), else all without
#: an underscore.
MODULES = (
    "vlaquant",
    "vlaquant.calibrate",
    "vlaquant.errors",
    "vlaquant.evaluate.environment",
    "vlaquant.evaluate.results",
    "vlaquant.families",
    "vlaquant.families.base",
    "vlaquant.families.data",
    "vlaquant.numerics",
    "vlaquant.passes.awq",
    "vlaquant.passes.gptq",
    "vlaquant.passes.loss",
    "vlaquant.passes.rtn",
    "vlaquant.passes.smoothquant",
    "vlaquant.recipe",
    "vlaquant.report",
    "vlaquant.scheme",
)


def build(directory: Path, modules: Sequence[str] = MODULES) -> list[str]:
    """Write a page for each module; returns what pdoc warned about."""
    import pdoc

    pdoc.render.configure(docformat="google", footer_text="vlaquant")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pdoc.pdoc(*modules, output_directory=directory)
    return [str(warning.message) for warning in caught]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    import_all()
    complaints = build(args.directory)
    for complaint in complaints:
        print(f"warning: {complaint}", file=sys.stderr)
    sys.exit(bool(complaints))


def import_all() -> None:
    """Before warnings count: those of other packages while they are imported are not ours."""
    for module in MODULES:
        __import__(module)


if __name__ == "__main__":
    main()
