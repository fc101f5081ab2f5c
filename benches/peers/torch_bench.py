"""PyTorch, eager and compiled, beside protohead: the same ops at the same shapes, taking turns on the same machine.

    cargo build --release -p protohead-benches --bin serve
    python3 -m venv /tmp/peers && /tmp/peers/bin/pip install -r benches/peers/requirements.txt
    /tmp/peers/bin/python benches/peers/torch_bench.py --serve target/release/serve

Prints a table of medians (milliseconds) and of ratios to ours, and writes it with --out. On the CPU the two take turns, call by
call. Every call has fresh random inputs, made outside of the time;
before each that counts comes one that does not, on either side. Other dtypes are measured of the whole step only; shares of the
machine are of f32's multiply-adds. On CUDA (--device cuda) times are of CUDA events for
PyTorch, of a waited call for ours; Liger and CCE join in where they are installed, on inputs that are normalised already,
which spares them the normalisation and its backward.
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

SCALE = 16.0
PAUSE = 0.1  # seconds before our turn: OpenMP's threads spin on for a while after PyTorch is done
SHAPES = {  # heads, rows, dim, classes, active
    "seed": (3, 128, 256, 35, 20),
    "mid": (3, 1024, 256, 1000, 1000),
    "large": (3, 1024, 512, 10_000, 10_000),
    "wide": (1, 512, 512, 100_000, 100_000),
    "proto": (3, 20_000, 256, 20, 20),
    "proto_many": (1, 200_000, 256, 20_000, 20_000),
}


def loss_of(x, w, labels, active):
    """The three-head loss: one cosine head after another, as the model's forward has them."""
    total = 0.0
    for head in range(x.shape[0]):
        z = SCALE * F.linear(F.normalize(x[head]), F.normalize(w[head, :active]))
        total = total + F.cross_entropy(z, labels)
    return total


def batched_loss_of(x, w, labels, active):
    """The same with all heads in one product and one cross-entropy."""
    z = SCALE * F.normalize(x, dim=-1) @ F.normalize(w[:, :active], dim=-1).transpose(1, 2)
    return x.shape[0] * F.cross_entropy(z.flatten(0, 1), labels.repeat(x.shape[0]))


def class_means(x, w, labels, active):
    """The usual loop over the classes."""
    out = w.clone()
    for head in range(x.shape[0]):
        for k in range(active):
            rows = x[head][labels == k]
            if len(rows):
                out[head, k] = rows.mean(0)
    return out


def index_means(x, w, labels, active):
    """Without the loop: what one writes for many classes."""
    out = w.clone()
    counts = torch.bincount(labels, minlength=active).clamp(min=1).unsqueeze(1)
    for head in range(x.shape[0]):
        sums = torch.zeros(active, x.shape[2], device=x.device, dtype=x.dtype)
        out[head, :active] = sums.index_add_(0, labels, x[head]) / counts
    return out


class Torch:
    """A function of PyTorch, timed with fresh inputs."""

    def __init__(self, function, backward, device, dtype):
        self.function, self.backward, self.device, self.dtype = function, backward, device, dtype

    def __call__(self, shape, seed):
        heads, rows, dim, classes, active = shape
        g = torch.Generator(device=self.device).manual_seed(seed)
        make = lambda *s: torch.randn(*s, generator=g, device=self.device).to(self.dtype)
        x, w = make(heads, rows, dim), make(heads, classes, dim)
        labels = torch.randint(0, active, (rows,), generator=g, device=self.device)
        if self.backward:
            x.requires_grad_(), w.requires_grad_()
        if self.device == "cuda":
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self.run(x, w, labels, active)
            end.record()
            torch.cuda.synchronize()
            return begin.elapsed_time(end)
        start = time.perf_counter()
        self.run(x, w, labels, active)
        return 1e3 * (time.perf_counter() - start)

    def run(self, x, w, labels, active):
        if self.backward:
            self.function(x, w, labels, active).backward()
        else:
            with torch.no_grad():
                self.function(x, w, labels, active)


class Serve:
    """Our benches' program, which runs a case at a time."""

    def __init__(self, path):
        self.process = subprocess.Popen(
            [path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, case):
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().split()
        if not answer:
            sys.exit(f"serve ended with {self.process.wait()} at {case}")
        return answer

    def __call__(self, case):
        return int(self.ask(case)[0]) / 1e6

    def ceiling(self, kind):
        """Operations or bytes a second, in 1e9, the best of nine."""
        answers = [self.ask(f"ceiling/{kind}") for _ in range(9)]
        return max(int(work) / int(time) for time, work in answers)


def normalised_peers(device, dtype):
    """Linear cross-entropies for CUDA, where installed; their inputs come normalised."""
    peers = {}
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        def liger(x, w, labels, active):
            return sum(
                liger_fused_linear_cross_entropy(SCALE * x[h], w[h, :active], labels)
                for h in range(x.shape[0])
            )

        peers["liger"] = Torch(liger, True, device, dtype)
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy

        def cce(x, w, labels, active):
            return sum(
                linear_cross_entropy(SCALE * x[h], w[h, :active], labels)
                for h in range(x.shape[0])
            )

        peers["cce"] = Torch(cce, True, device, dtype)
    except ImportError:
        pass
    return peers


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--serve", required=True, help="the program `serve` of protohead-benches")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--shapes", default="seed,mid,large,wide,proto,proto_many")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each line")
    parser.add_argument("--out", help="also write the table here")
    options = parser.parse_args()
    device, dtype = options.device, getattr(torch, options.dtype)
    suffix = {"float32": "", "bfloat16": "_bf16", "float16": "_f16"}[options.dtype]
    serve = Serve(options.serve)

    lines = [
        f"PyTorch {torch.__version__}, {device}, {options.dtype}, {torch.get_num_threads()} threads; "
        f"medians in ms, (ratio to protohead)",
        "",
    ]
    time.sleep(1.0)
    fma, copy = serve.ceiling("fma"), serve.ceiling("copy")
    lines += [f"machine: {fma:.0f} GFLOP/s of multiply-adds, {copy:.1f} GB/s of copying", ""]
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    sgemm = []
    for _ in range(10):
        start = time.perf_counter()
        (a @ a).sum().item()
        sgemm.append(time.perf_counter() - start)
    lines += [f"torch matmul of 2048³: {2 * 2048**3 / min(sgemm) / 1e9:.0f} GFLOP/s", ""]
    lines += ["| op | shape | protohead | share of the machine | peers |", "|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)

    for name in options.shapes.split(","):
        shape = SHAPES[name]
        heads, rows, dim, _, active = shape
        product = 2 * heads * rows * dim * active
        if name.startswith("proto"):
            peers = {"index_add": Torch(index_means, False, device, dtype)}
            if active < 100:  # a step of the loop for each class
                peers["loop"] = Torch(class_means, False, device, dtype)
            ops = {"class_means": (peers, None)}
        else:
            ops = {}
            for op, backward, work in [
                ("cosine_cross_entropy_forward", False, product),
                ("cosine_cross_entropy", True, 3 * product),
            ]:
                torch._dynamo.reset()
                peers = {
                    "eager": Torch(loss_of, backward, device, dtype),
                    "compile": Torch(torch.compile(loss_of), backward, device, dtype),
                }
                if heads > 1:
                    batched = torch.compile(batched_loss_of)
                    peers["compile, heads batched"] = Torch(batched, backward, device, dtype)
                if backward and device == "cuda":
                    peers.update(normalised_peers(device, dtype))
                ops[op] = (peers, work)
        for op, (peers, work) in ops.items():
            if suffix and op != "cosine_cross_entropy":
                continue  # `serve` has only the whole step in other dtypes than f32
            case = f"{op}/{name}/protohead{suffix}"
            times = {"protohead": []} | {peer: [] for peer in peers}
            captured = None
            if op == "cosine_cross_entropy" and device == "cuda" and options.dtype == "float32":
                captured = f"{op}/{name}/protohead_captured"
                times["captured"] = []
            serve(case)  # compiles
            for peer in peers.values():
                peer(shape, 0), peer(shape, 1)
            start, turn = time.time(), 0
            while turn < 5 or (time.time() - start < options.seconds and turn < 200):
                turn += 1
                # A call that does not count comes first, on either side: the pause and the other's work empty the caches.
                time.sleep(PAUSE)
                serve(case)
                times["protohead"].append(serve(case))
                if captured:
                    serve(captured)
                    times["captured"].append(serve(captured))
                for peer, function in peers.items():
                    function(shape, 2 * turn)
                    times[peer].append(function(shape, 2 * turn + 1))
            median = {who: statistics.median(t) for who, t in times.items()}
            ours = median["protohead"]
            if work:
                share = f"{work / ours / 1e6 / fma:.0%} of multiply-adds"
            else:
                moved = 4 * heads * (rows + active) * dim
                share = f"{moved / ours / 1e6 / copy:.0%} of copying"
            others = ", ".join(f"{w} {t:.3g} ({t / ours:.2f}×)" for w, t in median.items() if w != "protohead")
            line = f"| {op} | {name} | {ours:.3g} | {share} | {others} |"
            lines.append(line)
            print(line, flush=True)

    if options.out:
        with open(options.out, "w") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
