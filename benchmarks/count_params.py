"""`tlkit count-params` against fvcore, ptflops and torchinfo: time, memory, and what each takes for a MAC.

    python -m venv PEERS && PEERS/bin/pip install torch torchvision fvcore ptflops torchinfo
    python benchmarks/count_params.py --peers PEERS/bin/python [--rounds 3]

Counted are 21 networks at 224 px (AlexNet, VGG, ResNet, ResNeXt, DenseNet), all in one process: timm's by tlkit, the
same of torchvision by the peers. Each peer is called as its README says, on the CPU with random weights, printing
included; and tuned: without printing and gradients, on networks of the meta device where it takes them. fvcore does not
(the reason is printed): its tuned networks are made there, and then given memory on the CPU without values. ptflops
imports timm where it is installed; it is kept from that, which is quicker. Every process has one thread; they take
turns, and ratios are of each round. tlkit's time after imports has reading its options and writing its JSON in it.

What each tool reports is compared with sums of what its source counts, made here by hooks on the modules.
"""

import argparse
import contextlib
import io
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__)
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
RESNEXTS = ("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d")
DENSENETS = ("densenet121", "densenet161", "densenet169", "densenet201")
VGGS = tuple(f"vgg{depth}{end}" for depth in (11, 13, 16, 19) for end in ("", "_bn"))
NAMES = ("alexnet_torchvision", *VGGS, *RESNETS, *RESNEXTS, *DENSENETS)
EXPLAINED = ("resnet18", "vgg11_bn")
PEERS = ("fvcore", "ptflops pytorch", "ptflops aten", "torchinfo")
USES = {f"{tool}, {way}": (tool, way) for way in ("as documented", "tuned") for tool in PEERS}
COUNTS = {  # which of `sizes` each use adds up, and how often; read in the tools' sources, versions as printed
    "tlkit": {"products": 1},
    "fvcore, as documented": {"products": 1, "norm": 2, "adaptive pool": 1},
    "ptflops pytorch, as documented": {
        **{"products": 1, "conv bias": 1, "linear bias": 1, "norm": 2},
        # the module's hook, and again F.relu or F.max_pool2d that the module calls; of bare calls the second alone
        **{"relu, module": 1, "relu, call": 1, "pool, module": 1, "pool, call": 1},
    },
    "ptflops pytorch, tuned": {
        **{"products": 1, "conv bias": 1, "linear bias": 1, "norm": 2, "relu, module": 1, "pool, module": 1},
    },
    "ptflops aten, as documented": {"products": 1, "conv bias": 1, "linear bias": 1},
    "torchinfo, as documented": {"products": 1, "conv bias": 1, "linear bias": 1, "norm's parameters": 1},
}
for _tool in ("fvcore", "ptflops aten", "torchinfo"):
    COUNTS[f"{_tool}, tuned"] = COUNTS[f"{_tool}, as documented"]


# What runs in processes of its own, under the interpreter of the peers or under ours; torch is imported there only.


def made(name, device="cpu"):
    """torchvision's network of that name and an image."""
    import torch
    from torchvision import models

    with torch.device(device):
        return getattr(models, name.partition("_torchvision")[0])(weights=None), torch.zeros(1, 3, 224, 224)


def counter(tool, way):
    """Import a tool, and return what maps a name to MACs and parameters."""
    import torch
    from torchvision import models  # noqa: F401

    tuned = way == "tuned"
    torch.set_grad_enabled(not tuned)
    if tool == "fvcore":
        from fvcore.nn import FlopCountAnalysis, parameter_count

        def count(name):
            network, image = made(name, "meta" if tuned else "cpu")
            if tuned:
                network, image = network.to_empty(device="cpu"), torch.zeros(image.shape)
            analysis = FlopCountAnalysis(network.eval(), image)
            if tuned:
                analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            return analysis.total(), parameter_count(network)[""]
    elif tool == "torchinfo":
        from torchinfo import summary

        def count(name):
            network, image = made(name, "meta" if tuned else "cpu")
            if tuned:
                found = summary(network, input_data=image, device="meta", verbose=0)
            else:
                found = summary(network, input_size=(1, 3, 224, 224))
            return found.total_mult_adds, found.total_params
    else:
        sys.modules["timm"] = None
        from ptflops import get_model_complexity_info

        backend = tool.split()[1]
        # with what it replaces in torch.nn.functional and torch, linear layers on the meta device are counted twice
        settings = {"backend_specific_config": {"count_functional": False}} if tuned else {}

        def count(name):
            network, _ = made(name, "meta" if tuned else "cpu")
            shown = {"print_per_layer_stat": not tuned, "verbose": not tuned, "as_strings": False}
            return get_model_complexity_info(network, (3, 224, 224), backend=backend, **shown, **settings)

    return count


def count_as(tool, way):
    """Count all networks; seconds and peak memory after the imports and at the end."""
    if tool == "tlkit":
        import tlkit.commands.count_params  # noqa: F401
        from tlkit.cli import console  # noqa: F401
        from tlkit.cli.app import run

        def count():
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                run(["count-params", *NAMES, "--json", "--quiet"])
            found = {model["model"]: model for model in json.loads(said.getvalue())["models"]}
            return {name: (found[name]["macs"], found[name]["params"], found[name]["activations"]) for name in NAMES}
    else:
        one = counter(tool, way)

        def count():
            return {name: one(name) for name in NAMES}

    imports = peak()
    started = time.perf_counter()
    counts = count()
    return {"seconds": time.perf_counter() - started, "imports": imports, "peak": peak(), "counts": counts}


def peak():
    """Most memory that this process held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def facts():
    """What torchvision says of its networks, and what there is in them that may be counted."""
    from fvcore.nn import ActivationCountAnalysis
    from torchvision import models

    found = {}
    for name in NAMES:
        meta = models.get_model_weights(name.partition("_torchvision")[0]).DEFAULT.meta
        network, image = made(name, "meta")
        network = network.to_empty(device="cpu").eval()
        activations = ActivationCountAnalysis(network, image.new_zeros(image.shape, device="cpu"))
        activations = activations.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()
        found[name] = {"gmacs": meta["_ops"], "params": meta["num_params"], "activations": activations, **sizes(name)}
    return found


def sizes(name):
    """Products of convolutions and linear layers, and the numbers that tools count besides."""
    import torch
    from torch import nn
    from torch.utils._python_dispatch import TorchDispatchMode

    found = Counter()
    pools = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)

    def hook(module, given, result):
        if isinstance(module, nn.Conv2d | nn.Linear):
            found["products"] += result.numel() * math.prod(module.weight.shape[1:])
            kind = "conv bias" if isinstance(module, nn.Conv2d) else "linear bias"
            found[kind] += result.numel() if module.bias is not None else 0
        elif isinstance(module, nn.BatchNorm2d):
            found["norm"] += given[0].numel()
            found["norm's parameters"] += module.weight.numel() + module.bias.numel()
        elif isinstance(module, nn.ReLU):
            found["relu, module"] += result.numel()
        elif isinstance(module, pools):
            found["pool, module"] += given[0].numel()

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            match func._schema.name:
                case "aten::relu" | "aten::relu_":
                    found["relu, call"] += args[0].numel()
                case "aten::max_pool2d_with_indices" | "aten::avg_pool2d":
                    found["pool, call"] += args[0].numel()
                case "aten::_adaptive_avg_pool2d" | "aten::mean":  # the mean is the adaptive pool to one position
                    found["pool, call"] += args[0].numel()
                    found["adaptive pool"] += args[0].numel()
            return func(*args, **(kwargs or {}))

    network, image = made(name, "meta")
    for module in network.eval().modules():
        module.register_forward_hook(hook)
    with torch.no_grad(), Calls():
        network(image)
    return {"sizes": dict(found)}


def trials():
    """Versions, and what each peer says to a network and an image on the meta device, called as documented."""
    from importlib.metadata import version

    sys.modules["timm"] = None
    from fvcore.nn import FlopCountAnalysis
    from ptflops import get_model_complexity_info as complexity
    from torchinfo import summary

    calls = {
        "fvcore, meta image": lambda net, image: FlopCountAnalysis(net, image).total(),
        "ptflops pytorch": lambda net, image: complexity(
            net, (3, 224, 224), as_strings=False, print_per_layer_stat=False, backend="pytorch"
        )[0],
        "ptflops aten": lambda net, image: complexity(
            net, (3, 224, 224), as_strings=False, print_per_layer_stat=False, backend="aten"
        )[0],
        "torchinfo, input_size": lambda net, image: summary(net, input_size=(1, 3, 224, 224)).total_mult_adds,
        "torchinfo, meta image": lambda net, image: summary(net, input_data=image).total_mult_adds,
    }
    said = {}
    for tool, call in calls.items():
        try:
            said[tool] = f"{call(*made('resnet18', 'meta')):,} MACs of resnet18"
        except Exception as error:  # whatever it is, it is what a person would see
            error = error.__cause__ or error
            said[tool] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    packages = ("torch", "torchvision", "fvcore", "ptflops", "torchinfo")
    return {"versions": {name: version(name) for name in packages}, "said": said}


# What runs here.


def process(command):
    """Run a command; its seconds, its peak memory in MB and what it printed."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as complaints:
        started = time.perf_counter()
        # the child's peak begins with that of this process, which therefore imports nothing large
        child = subprocess.Popen(
            command,
            stdout=out,
            stderr=complaints,
            cwd=HERE.parents[1],
            env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        _, status, usage = os.wait4(child.pid, 0)
        took = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, complaints):
            file.seek(0)
        if child.returncode:
            sys.exit(f"{' '.join(map(str, command))} failed:\n{complaints.read()[-2000:]}")
        cpu = usage.ru_utime + usage.ru_stime
        return {"whole": took, "cpu": cpu, "whole peak": usage.ru_maxrss * 1024 / 1e6, "printed": out.read()}


def child(python, *arguments):
    measured = process([python, str(HERE), "--child", *arguments])
    return measured | json.loads(measured.pop("printed"))


def round_of(peers):
    """Each program once; tlkit's time after imports is of a second process, which has them behind it."""
    found = {use: child(peers, *how) for use, how in USES.items()}
    found["tlkit"] = child(sys.executable, "tlkit", "")
    found["tlkit"] |= process([sys.executable, "-m", "tlkit", "count-params", *NAMES, "--json"])
    return found


def table(head, rows):
    print()
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def spread(numbers):
    return f"{statistics.median(numbers):.1f} ({min(numbers):.1f} to {max(numbers):.1f})"


def ratios(rounds, use, key):
    return [measured[use][key] / measured["tlkit"][key] for measured in rounds]


def print_measured(rounds):
    head = ["use"]
    for what in ("whole process, s", "its CPU time, s", "after imports, s"):
        head += [what, "its / tlkit's"]
    rows = []
    for use in ("tlkit", *USES):
        row = [use]
        for key in ("whole", "cpu", "seconds"):
            row += [f"{statistics.median(measured[use][key] for measured in rounds):.1f}"]
            row += [spread(ratios(rounds, use, key)) if use != "tlkit" else ""]
        rows.append(row)
    table(head, rows)
    memory = []
    for use in ("tlkit", *USES):
        keys = ("imports", "peak", "whole peak")  # the last has the interpreter's end in it, which takes memory too
        bare, counted, most = (statistics.median(measured[use][key] for measured in rounds) for key in keys)
        memory.append([use, *(f"{mb:.0f}" for mb in (bare, counted, counted - bare, most, most - bare))])
    head = ["use", "bare imports, peak MB", "when all is counted", "above", "when the process has ended", "above"]
    table(head, memory)
    for way in ("as documented", "tuned"):
        for key, what, target in (("whole", "whole process", 3), ("seconds", "after imports", 5)):
            each = {use: statistics.median(ratios(rounds, use, key)) for use in USES if use.endswith(way)}
            least = min(each, key=each.get)
            aim = f"; target {target}: {verdict(each[least] >= target)}" if way != "tuned" else ""
            print(f"\nAgainst the fastest ({least}), {what}: {each[least]:.1f} times as fast{aim}", end="")
    above = float(memory[0][-1])
    print(f"\n\ntlkit's peak above its imports: {above:.0f} MB; target 300: {verdict(above <= 300)}")


def verdict(reached):
    return "reached" if reached else "not reached"


def print_disagreements(counts, known):
    def macs(use, name):
        return counts[use][name][0]

    columns = ["tlkit", *(use for use in USES if use.endswith("documented")), "ptflops pytorch, tuned"]
    rows = [
        [name, f"{known[name]['gmacs']:.3f}", *(f"{macs(use, name) / 1e9:.3f}" for use in columns)] for name in NAMES
    ]
    table(["GMACs of", "torchvision's metadata", *columns], rows)
    rows = []
    for use, parts in COUNTS.items():
        deviations = [macs(use, name) / known[name]["sizes"]["products"] - 1 for name in NAMES]
        rounded = sum(round(macs(use, name) / 1e9, 3) == known[name]["gmacs"] for name in NAMES)
        expected = {n: sum(t * known[n]["sizes"].get(part, 0) for part, t in parts.items()) for n in NAMES}
        explained = sum(expected[name] == macs(use, name) for name in NAMES)
        formula = " + ".join(part if times == 1 else f"{times} x {part}" for part, times in parts.items())
        row = [use, f"{min(deviations):.3%} to {max(deviations):.3%}"]
        rows.append([*row, *(f"{number} of {len(NAMES)}" for number in (rounded, explained)), formula])
    head = ["use", "above the products alone", "as in the metadata", "exactly the sum of ...", "... these"]
    table(head, rows)
    for name in EXPLAINED:
        print(f"\n{name}: {', '.join(f'{part} {size:,}' for part, size in known[name]['sizes'].items() if size)}")
        for use, parts in COUNTS.items():
            terms = {part: times * known[name]["sizes"].get(part, 0) for part, times in parts.items()}
            more = {part: size for part, size in terms.items() if part != "products" and size}
            said = " + ".join(f"{size:,} {part}" for part, size in more.items()) or "0"
            difference = macs(use, name) - terms["products"]
            print(f"  {use}: {macs(use, name):,} - products = {difference:,}; expected {said} = {sum(more.values()):,}")
    for use in counts:
        same = sum(counts[use][name][1] == known[name]["params"] for name in NAMES)
        print(f"\nparameters as in the metadata: {use}, {same} of {len(NAMES)}", end="")
    same = sum(counts["tlkit"][name][2] == known[name]["activations"] for name in NAMES)
    print(f"\n\nactivations: tlkit's are those of fvcore's ActivationCountAnalysis for {same} of {len(NAMES)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=sys.executable, help="interpreter that has the peers; default: this one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        tool, *way = arguments.child
        # what the peers print; ptflops keeps the stream that it finds on its import
        with open(os.devnull, "w") as sys.stdout:
            result = {"facts": facts, "trials": trials}[tool]() if not way else count_as(tool, *way)
        json.dump(result, sys.__stdout__)
        return
    tried = child(arguments.peers, "trials")
    print(f"Python {platform.python_version()}, " + ", ".join(map(" ".join, tried["versions"].items())))
    for tool, said in tried["said"].items():
        print(f"on the meta device, {tool}: {said}")
    process([sys.executable, "-m", "tlkit", "count-params", "resnet18", "--json"])  # warms up the disk
    rounds = []
    for number in range(arguments.rounds):
        rounds.append(round_of(arguments.peers))
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    print_measured(rounds)
    print_disagreements(
        {use: measured["counts"] for use, measured in rounds[-1].items()}, child(arguments.peers, "facts")
    )


if __name__ == "__main__":
    main()
