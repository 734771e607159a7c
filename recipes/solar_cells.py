"""Photographs of solar cells as class folders: functional and defective ones, mono- and polycrystalline.

command   pip install elpv-dataset     (the images, 90 MB)
          python recipes/solar_cells.py solar
expected  2,624 cells: solar/mono with 705 functional and 369 defective ones, solar/poly with 1,098 and 452;
          solar/cells.csv names all of them
time      a second
source    Buerhop-Lutz et al. 2018, A Benchmark for Visual Identification of Defective Solar Cells in
          Electroluminescence Imagery, doi:10.4229/35thEUPVSEC20182018-5CV.3.15: https://github.com/zae-bayern/elpv-dataset
licence   of the images: CC BY-NC-SA 4.0, so not for commercial use. They come with elpv-dataset, not with tlkit

An expert judged each cell functional or defective, and was sure of it or not. The data set has that as a probability of
a defect: 0 and 1 where sure, 1/3 for "functional, not sure", 2/3 for "defective, not sure" (Deitsch et al. 2019,
Automatic classification of defective photovoltaic module cells in electroluminescence images, Solar Energy 185,
arXiv:1807.02894). What becomes of the 401 that the expert was not sure of is said by --unsure:

judged      as the expert judged: functional at 1/3, defective at 2/3 (the default)
defective   any doubt is a defect, as Deitsch et al. 2019 have it (they let such cells count less)
leave-out   only cells that the expert was sure of

The data set does not say which cells are of one module, so some may stand on both sides of a split.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

LEAST_DEFECTIVE = {"judged": 0.5, "defective": 0.1, "leave-out": 0.5}


def cells(package: Path) -> Iterator[tuple[Path, float, str]]:
    """The image of each cell, the probability of a defect, and ``mono`` or ``poly``."""
    for line in (package / "data" / "labels.csv").read_text(encoding="utf-8").splitlines():
        path, probability, kind = line.split()
        yield package / "data" / path, float(probability), kind


def write(package: Path, out: Path, unsure: str) -> Counter[tuple[str, str]]:
    """Write ``KIND/LABEL/NAME.png`` and ``cells.csv``; returns how many cells there are of each kind and label."""
    written = Counter[tuple[str, str]]()
    out.mkdir()
    with (out / "cells.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "kind", "probability"])
        for image, probability, kind in cells(package):
            if unsure == "leave-out" and 0 < probability < 1:
                continue
            label = "defective" if probability > LEAST_DEFECTIVE[unsure] else "functional"
            written[kind, label] += 1
            copy = out / kind / label / image.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, copy)
            rows.writerow([copy.relative_to(out).as_posix(), label, kind, f"{probability:.2f}"])
    return written


def main() -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write; never overwritten")
    parser.add_argument(
        "--unsure", choices=LEAST_DEFECTIVE, default="judged", help="cells that the expert was not sure of"
    )
    options = parser.parse_args()
    found = importlib.util.find_spec("elpv_dataset")
    if found is None or found.origin is None:
        sys.exit("solar_cells.py: error: elpv_dataset: not installed; pip install elpv-dataset")
    if options.out.exists():
        sys.exit(f"solar_cells.py: error: {options.out}: exists and is never overwritten; choose another folder")
    for (kind, label), count in sorted(write(Path(found.origin).parent, options.out, options.unsure).items()):
        print(f"{count:5} {kind}/{label}")
    print("Buerhop-Lutz et al. 2018, licence CC BY-NC-SA 4.0: not for commercial use")


if __name__ == "__main__":
    main()
