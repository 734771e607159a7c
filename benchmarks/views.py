"""What test-time views gain and cost: accuracy with its interval, predictions put right and wrong, the network's time.

    python benchmarks/views.py MODEL|RUN DATA [VIEWS ...]

One `tlkit evaluate` for each of VIEWS (default: center flip five-crop ten-crop multi-scale); times are ratios to that
of the first. For hymenoptera_256 give a run of `tlkit finetune DATA --strategy probe`.
"""

import json
import subprocess
import sys

DEFAULT = ("center", "flip", "five-crop", "ten-crop", "multi-scale")


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    model, data, *views = sys.argv[1:]
    print("| views | top-1 (95 %) | loss | ECE | put right | put wrong | p | network time / center's |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    least = None
    for name in views or DEFAULT:
        command = [sys.executable, "-m", "tlkit", "evaluate", model, data, "--tta", name, "--json", "--quiet"]
        told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        metrics, audit = told["metrics"], told.get("tta_audit", {})
        least = told["network_seconds"] if least is None else least
        low, high = metrics["top1_ci95"]
        cells = [
            name,
            f"{metrics['top1']:.3f} ({low:.3f} to {high:.3f})",
            f"{metrics['loss']:.3f}",
            f"{metrics['ece']:.3f}",
            audit.get("fixed", ""),
            audit.get("broken", ""),
            f"{audit['p']:.2g}" if audit else "",
            f"{told['network_seconds'] / least:.2f}",
        ]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
