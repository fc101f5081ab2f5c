"""Where a step on the CPU spends its time: samples of `serve`, by what the loop that they fall in does.

    python3 benches/peers/cpu_profile.py target/release/serve cosine_cross_entropy/mid/protohead [more cases]

Needs Linux on x86-64, its perf and binutils' objdump, and may need `sysctl kernel.perf_event_paranoid=1`. Kernels are compiled
while the program runs and have no names, so their machine code is read from its memory, cut into the smallest loops, and each is named by its
instructions.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter

SECONDS = 8
RATE = 2000


def code(pid):
    """The addresses and bytes of what was compiled while the program ran."""
    found = []
    with open(f"/proc/{pid}/mem", "rb") as memory:
        for line in open(f"/proc/{pid}/maps"):
            span, rights, _, _, _, *path = line.split()
            if "x" in rights and not path:
                start, end = (int(part, 16) for part in span.split("-"))
                memory.seek(start)
                found.append((start, memory.read(end - start)))
    return found


def instructions(start, data, folder):
    """Address, mnemonic and operands, one by one."""
    path = f"{folder}/code"
    with open(path, "wb") as file:
        file.write(data)
    command = ["objdump", "-D", "-b", "binary", "-m", "i386:x86-64", f"--adjust-vma={start:#x}", "--no-show-raw-insn", path]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for line in text.splitlines():
        match = re.match(r"\s*([0-9a-f]+):\s+(\S+)\s*(.*)", line)
        if match:
            yield int(match[1], 16), match[2], match[3]


def loops(listing):
    """From where to where each jump back goes, the smallest first."""
    found = []
    for address, name, operands in listing:
        target = re.match(r"0x([0-9a-f]+)", operands)
        if name.startswith("j") and target and 0 < address - int(target[1], 16) < 1 << 14:
            found.append((int(target[1], 16), address))
    return sorted(found, key=lambda span: span[1] - span[0])


def kind(names):
    """What a loop of these instructions does."""
    count = Counter()
    for name in names:
        count["fma"] += name.startswith("vfm") or name.startswith("vfnm")
        count["exp"] += name.startswith(("vscalef", "vrndscale", "vpslld", "vcvttps2dq", "vcvtps2dq", "vmaxp"))
        count["pause"] += name.startswith("pause")
    if count["pause"]:
        return "waiting at barriers"
    if count["exp"] >= 2 and count["fma"] >= 4:
        return "exponentials"
    if count["fma"] >= 16 and count["fma"] >= len(names) / 3:
        return "products' multiply-adds"
    return "loading and storing"


def profile(serve, case, folder):
    process = subprocess.Popen([serve], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(line):
        process.stdin.write(line + "\n")
        process.stdin.flush()
        answer = process.stdout.readline().split()
        if not answer:
            sys.exit(f"serve ended with {process.wait()} at {line}")
        return int(answer[0])

    one = min(ask(f"{case} 4") for _ in range(4)) / 4
    data = f"{folder}/perf"
    perf = subprocess.Popen(
        ["perf", "record", "-q", "-F", str(RATE), "-e", "cpu-clock", "-p", str(process.pid), "-o", data, "--", "sleep", str(SECONDS)]
    )
    while perf.poll() is None:
        ask(f"{case} {max(1, int(2e8 / one))}")
    if perf.returncode:
        sys.exit("perf could not record")
    jit = code(process.pid)
    process.stdin.close()
    process.wait()
    script = ["perf", "script", "-i", data, "-F", "ip,dso"]
    samples = Counter()
    elsewhere = Counter()
    for line in subprocess.run(script, check=True, capture_output=True, text=True).stdout.splitlines():
        address, _, place = line.strip().partition(" ")
        place = place.strip(" ()")
        if "[kernel" in place or "[guest.kernel" in place:
            elsewhere["operating system"] += 1
        elif "/serve" in place or "/lib" in place or "vdso" in place:
            elsewhere["host program"] += 1
        else:
            samples[int(address, 16)] += 1
    for start, bytes_ in jit:
        here = {address: count for address, count in samples.items() if start <= address < start + len(bytes_)}
        if not here:
            continue
        for address in here:
            del samples[address]
        listing = list(instructions(start, bytes_, folder))
        spans = loops(listing)
        names = {}
        for address, count in here.items():
            span = next((span for span in spans if span[0] <= address <= span[1]), None)
            if span is None:
                elsewhere["outside of loops"] += count
                continue
            if span not in names:
                names[span] = kind([name for at, name, _ in listing if span[0] <= at <= span[1]])
            elsewhere[names[span]] += count
    elsewhere["code that is gone"] += sum(samples.values())
    return one, elsewhere


def main():
    serve, *cases = sys.argv[1:]
    print("| case | a step | samples | where |\n|---|---|---|---|")
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            one, places = profile(serve, case, folder)
        total = sum(places.values())
        where = ", ".join(f"{100 * count / total:.0f} % {place}" for place, count in places.most_common() if count >= total / 200)
        print(f"| {case} | {one / 1e6:.3g} ms | {total} | {where} |", flush=True)


if __name__ == "__main__":
    main()
