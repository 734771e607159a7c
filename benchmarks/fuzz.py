"""Broken image files, each decoded as Pillow decodes it or refused with a reason, in a process with 4 GiB of memory.

    python benchmarks/fuzz.py [--count 100000] [--seed 1]

The files are mutations of one of each format and mode (tests/data/corpus.py): bits flipped, parts cut, repeated, taken
from other files, lengths set to extremes, checksums of PNG mended. A file that crashes the decoder or takes longer than
20 s ends the process; the file is then left where the last line says.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CORPUS = Path(__file__).parents[1] / "tests" / "data" / "corpus.py"
MEMORY = 4 * 2**30


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    folder, began = tempfile.mkdtemp(), time.monotonic()
    done = subprocess.run(
        [sys.executable, str(CORPUS), str(arguments.seed), str(arguments.count), folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # libtiff's own complaints
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
    )
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    if done.stdout:
        told = json.loads(done.stdout)
        for kind, count in told["tally"].items():
            print(f"{kind}: {count}")
        for line in told["wrong"]:
            print(line)
        read = sum(count for kind, count in told["tally"].items() if kind.endswith("read"))
        print(f"{told['files']} files of seed {told['seed']}: {read} read, {told['files'] - read} refused,")
        print(f"{len(told['wrong'])} otherwise than Pillow; slowest {told['slowest'][0]} s ({told['slowest'][1]})")
    print(f"exit code {done.returncode}, {seconds:.0f} s, peak memory {peak:.0f} MB; files that went wrong: {folder}")


if __name__ == "__main__":
    main()
