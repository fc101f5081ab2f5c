"""PyTorch, eager and compiled, beside protohead: the same ops at the same shapes, taking turns on the same machine.

    make bench-torch                                  # in a virtual environment of its own, in target/peers
    make bench-torch TORCH_BENCH="--device cuda"      # with Liger and CCE

Prints a table of medians (milliseconds) and of ratios to ours, and writes it with --out. The two take turns.
`cosine_cross_entropy_margin` is the step with ArcFace's margin.

On the CPU a turn is a call with fresh random inputs, made outside of the time, after one that does not count. Other dtypes are
measured of the whole step only; shares of the machine are of f32's multiply-adds. Memory is what a step of ours needs beside its
inputs, and how much of that are the gradients.

On CUDA (--device cuda) a turn is CALLS calls one after another on random inputs that lie on the device, and a wait at the end, the
same for all; the time is that of a call. Shares are of PyTorch's own product of two 8192² matrices in the same dtype. `graph` is
PyTorch's compiled step as a CUDA graph, head by head or with all heads in one, beside our `captured`. Liger and CCE join in where
they are installed, on inputs that are normalised already, which spares them the normalisation and its backward. CCE by default leaves
out blocks of gradients that are small (`filter_eps`); `cce, all gradients` does not. Memory is what a step needs beside its inputs, its
gradients included; of a graph, which holds all of it, it is not known.
"""

import argparse
import functools
import gc
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

SCALE = 16.0
MARGIN = 0.5  # radians, as ArcFace has it
CALLS = 10
PAUSE = 0.1  # seconds before our turn: OpenMP's threads spin on for a while after PyTorch is done


DTYPES = {  # PyTorch's, and how our cases are named
    "float32": (torch.float32, ""),
    "tf32": (torch.float32, "_tf32"),
    "bfloat16": (torch.bfloat16, "_bf16"),
    "float16": (torch.float16, "_f16"),
}


def with_margin(cosines, labels, margin):
    """ArcFace's margin on each row's own class, as its users write it."""
    if not margin:
        return cosines
    own = cosines.gather(1, labels[:, None])
    return cosines.scatter(1, labels[:, None], torch.cos(torch.acos(own) + margin))


def loss_of(x, w, labels, active, margin=0.0):
    """The three-head loss: one cosine head after another, as the model's forward has them."""
    total = 0.0
    # By unbind, whose backward stacks the heads' gradients: that of an index fills as many zeros for each head.
    for of_rows, of_classes in zip(x.unbind(0), w[:, :active].unbind(0)):
        cosines = F.linear(F.normalize(of_rows), F.normalize(of_classes))
        z = SCALE * with_margin(cosines, labels, margin)
        total = total + F.cross_entropy(z, labels)
    return total


def batched_loss_of(x, w, labels, active, margin=0.0):
    """The same with all heads in one product and one cross-entropy."""
    cosines = F.normalize(x, dim=-1) @ F.normalize(w[:, :active], dim=-1).transpose(1, 2)
    labels = labels.repeat(x.shape[0])
    z = SCALE * with_margin(cosines.flatten(0, 1), labels, margin)
    return x.shape[0] * F.cross_entropy(z, labels)


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
    """A function of PyTorch, timed with random inputs."""

    def __init__(self, function, backward, device, dtype):
        self.function, self.backward, self.device, self.dtype = function, backward, device, dtype

    def inputs(self, shape, seed):
        heads, rows, dim, classes, active = shape
        g = torch.Generator(device=self.device).manual_seed(seed)
        make = lambda *s: torch.randn(*s, generator=g, device=self.device).to(self.dtype)
        x, w = make(heads, rows, dim), make(heads, classes, dim)
        labels = torch.randint(0, active, (rows,), generator=g, device=self.device)
        if self.backward:
            x.requires_grad_(), w.requires_grad_()
        return x, w, labels, active

    def __call__(self, shape, seed):
        inputs = self.inputs(shape, seed)
        start = time.perf_counter()
        self.run(*inputs)
        return 1e3 * (time.perf_counter() - start)

    def repeat(self, inputs):
        """Milliseconds of a call, of CALLS of them, after two that find the device awake, as ours do."""
        for _ in range(2):
            self.run(*inputs)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            self.run(*inputs)
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / CALLS

    def run(self, x, w, labels, active):
        if self.backward:
            x.grad = w.grad = None
            self.function(x, w, labels, active).backward()
        else:
            with torch.no_grad():
                self.function(x, w, labels, active)


class Normalised(Torch):
    """The same on rows that are normalised already."""

    def inputs(self, shape, seed):
        x, w, labels, active = super().inputs(shape, seed)
        unit = lambda rows: F.normalize(rows.detach(), dim=-1).requires_grad_(self.backward)
        return unit(x), unit(w), labels, active


class Graph(Torch):
    """The same as a CUDA graph, recorded when its inputs are made."""

    def inputs(self, shape, seed):
        inputs = super().inputs(shape, seed)
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):
                super().run(*inputs)
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            super().run(*inputs)
        return inputs

    def run(self, *inputs):
        self.graph.replay()


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

    def repeat(self, case):
        return int(self.ask(f"{case} {CALLS}")[0]) / CALLS / 1e6

    def shape(self, name):
        """Heads, rows, dim, classes, active classes of a shape that our benches have, of the op that it is for."""
        op = "class_means" if name.startswith("proto") else "cosine_cross_entropy"
        return tuple(int(size) for size in self.ask(f"{op}/{name}/protohead shape"))

    def end(self):
        self.process.stdin.close()
        self.process.wait()

    def ceiling(self, kind):
        """Operations or bytes a second, in 1e9, the best of nine."""
        answers = [self.ask(f"ceiling/{kind}") for _ in range(9)]
        return max(int(work) / int(time) for time, work in answers)


def memory_of(options, case):
    """MiB that a step of ours reserves beside its operands, in a process that did nothing before."""
    fresh = Serve(options.serve)
    memory = int(fresh.ask(f"{case} memory")[1]) >> 20
    fresh.end()
    return memory


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

        peers["liger"] = Normalised(liger, True, device, dtype)
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy

        def cce(x, w, labels, active, **how):
            return sum(
                linear_cross_entropy(SCALE * x[h], w[h, :active], labels, **how)
                for h in range(x.shape[0])
            )

        peers["cce"] = Normalised(cce, True, device, dtype)
        unfiltered = functools.partial(cce, filter_eps=None)
        peers["cce, all gradients"] = Normalised(unfiltered, True, device, dtype)
    except ImportError:
        pass
    return peers


def losses_of(op):
    """An op's loss, head by head and with all heads in one product."""
    margin = MARGIN if op.endswith("margin") else 0.0
    return [functools.partial(loss, margin=margin) for loss in (loss_of, batched_loss_of)]


def cuda_peers(op, backward, heads, dtype):
    """Who is measured beside us on CUDA."""
    make = lambda function: Torch(function, backward, "cuda", dtype)
    if op == "class_means":
        return {"index_add": make(index_means)}
    torch._dynamo.reset()
    by_head, in_one = losses_of(op)
    compiled = torch.compile(by_head)
    peers = {"eager": make(by_head), "compile": make(compiled)}
    batched = torch.compile(in_one)
    if heads > 1:
        peers["eager, heads batched"] = make(in_one)
        peers["compile, heads batched"] = make(batched)
    if backward:
        peers["graph"] = Graph(compiled, backward, "cuda", dtype)
        if heads > 1:
            peers["graph, heads batched"] = Graph(batched, backward, "cuda", dtype)
        if op == "cosine_cross_entropy":  # the others know no margin
            peers.update(normalised_peers("cuda", dtype))
    return peers


def on_cuda(options):
    """The table of a CUDA device."""
    dtype, suffix = DTYPES[options.dtype]
    torch.backends.cuda.matmul.allow_tf32 = options.dtype == "tf32"
    serve = Serve(options.serve)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    product_rate = 2 * 8192**3 / statistics.median(times)
    del a, b
    copy = serve.ceiling("copy")
    lines = [
        f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}, {options.dtype}; medians in ms of a call (ratio to protohead)",
        "",
        f"machine: {product_rate / 1e12:.0f} TFLOP/s of PyTorch's product of 8192² matrices, {copy:.0f} GB/s of copying",
        "",
        "| op | shape | protohead | share of the machine | beside the inputs, MiB | peers |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name in options.shapes.split(","):
        shape = serve.shape(name)
        heads, rows, dim, _, active = shape
        product = 2 * heads * rows * dim * active
        ops = [("class_means", False, None)] if name.startswith("proto") else [
            ("cosine_cross_entropy_forward", False, product),
            ("cosine_cross_entropy", True, 3 * product),
            ("cosine_cross_entropy_margin", True, 3 * product),
        ]
        for op, backward, work in ops:
            if suffix and not backward:
                continue  # `serve` has only the whole step in other dtypes than f32
            case = f"{op}/{name}/protohead{suffix}"
            memory = memory_of(options, case)
            ours = {"protohead": case}
            if op == "cosine_cross_entropy" and not suffix:
                ours["captured"] = f"{op}/{name}/protohead_captured"
            used = {"protohead": memory}
            calls = {who: functools.partial(serve.repeat, case) for who, case in ours.items()}
            for who, peer in cuda_peers(op, backward, heads, dtype).items():
                try:
                    inputs = peer.inputs(shape, 1)
                    peer.repeat(inputs)
                    torch.cuda.synchronize()
                    inputs[0].grad = inputs[1].grad = None
                    before = torch.cuda.memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                    peer.repeat(inputs)
                    used[who] = (torch.cuda.max_memory_allocated() - before) >> 20
                    if isinstance(peer, Graph):
                        used[who] = "–"
                    calls[who] = functools.partial(peer.repeat, inputs)
                except Exception as error:  # a peer that cannot is named, not hidden
                    print(f"{who} at {name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            times = {who: [] for who in calls}
            for turn in range(options.turns + 1):
                for who, call in calls.items():
                    time_of_call = call()
                    if turn:
                        times[who].append(time_of_call)
            medians = {who: statistics.median(of) for who, of in times.items()}
            calls = peer = inputs = None
            gc.collect()
            torch.cuda.empty_cache()
            mine = medians["protohead"]
            if work:
                share = f"{work / mine / 1e-3 / product_rate:.0%} of the product"
            else:
                share = f"{4 * heads * (rows + active) * dim / mine / 1e6 / copy:.0%} of copying"
            others = ", ".join(f"{w} {t:.3g} ({t / mine:.2f}×)" for w, t in medians.items() if w != "protohead")
            memory = ", ".join(f"{w} {m}" for w, m in used.items())
            line = f"| {op} | {name} | {mine:.3g} | {share} | {memory} | {others} |"
            lines.append(line)
            print(line, flush=True)
    return lines


def on_cpu(options):
    """The table of the CPU."""
    dtype, suffix = DTYPES[options.dtype]
    serve = Serve(options.serve)

    lines = [
        f"PyTorch {torch.__version__}, cpu, {options.dtype}, {torch.get_num_threads()} threads; "
        f"medians in ms, (ratio to protohead)",
        "",
    ]
    time.sleep(1.0)
    fma, copy = serve.ceiling("fma"), serve.ceiling("copy")
    lines += [f"machine: {fma:.0f} GFLOP/s of multiply-adds, {copy:.1f} GB/s of copying", ""]
    a = torch.randn(2048, 2048, dtype=dtype)
    sgemm = []
    for _ in range(10):
        start = time.perf_counter()
        (a @ a).sum().item()
        sgemm.append(time.perf_counter() - start)
    lines += [f"torch matmul of 2048³: {2 * 2048**3 / min(sgemm) / 1e9:.0f} GFLOP/s", ""]
    lines += ["| op | shape | protohead | share of the machine | MiB | peers |", "|---|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)

    for name in options.shapes.split(","):
        shape = serve.shape(name)
        heads, rows, dim, classes, active = shape
        product = 2 * heads * rows * dim * active
        if name.startswith("proto"):
            peers = {"index_add": Torch(index_means, False, "cpu", dtype)}
            if active < 100:  # a step of the loop for each class
                peers["loop"] = Torch(class_means, False, "cpu", dtype)
            ops = {"class_means": (peers, False, None)}
        else:
            ops = {}
            for op, backward, work in [
                ("cosine_cross_entropy_forward", False, product),
                ("cosine_cross_entropy", True, 3 * product),
                ("cosine_cross_entropy_margin", True, 3 * product),
            ]:
                torch._dynamo.reset()
                by_head, in_one = losses_of(op)
                peers = {
                    "eager": Torch(by_head, backward, "cpu", dtype),
                    "compile": Torch(torch.compile(by_head), backward, "cpu", dtype),
                }
                if heads > 1:
                    batched = torch.compile(in_one)
                    peers["eager, heads batched"] = Torch(in_one, backward, "cpu", dtype)
                    peers["compile, heads batched"] = Torch(batched, backward, "cpu", dtype)
                ops[op] = (peers, backward, work)
        for op, (peers, backward, work) in ops.items():
            if suffix and not backward:
                continue  # `serve` has only the whole step in other dtypes than f32
            case = f"{op}/{name}/protohead{suffix}"
            memory = f"{memory_of(options, case)}"
            if backward:
                gradients = heads * (rows + classes) * dim * dtype.itemsize >> 20
                memory += f", gradients {gradients}"
            times = {"protohead": []} | {peer: [] for peer in peers}
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
            line = f"| {op} | {name} | {ours:.3g} | {share} | {memory} | {others} |"
            lines.append(line)
            print(line, flush=True)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--serve", required=True, help="the program `serve` of protohead-benches")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--shapes", default="seed,mid,large,wide,proto,proto_many")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each line, on the CPU")
    parser.add_argument("--turns", type=int, default=9, help="for each line, on CUDA")
    parser.add_argument("--out", help="also write the table here")
    options = parser.parse_args()
    if options.device == "cpu" and options.dtype == "tf32":
        parser.error("a CPU has no TF32")
    lines = on_cuda(options) if options.device == "cuda" else on_cpu(options)
    if options.out:
        with open(options.out, "w") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
