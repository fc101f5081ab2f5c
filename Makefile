# Where Vulkan's drivers keep their sockets: without it they complain on every start.
export XDG_RUNTIME_DIR ?= /tmp
# What is used is built in one profile with one set of features (the tests' included), so that nothing is compiled twice.
cargo_flags := --release --workspace

cpu = $(shell sed -n 's/^model name.*: //p' /proc/cpuinfo 2>/dev/null | head -1)

gpu = $(shell nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1)

# On a CPU whatever there is: on a GPU, compiling and tuning so small a network takes longer than training it.
demo_flags := --synthetic --device cpu --keywords 21 --voices 30 --tau 1 --epochs 20 --batch 24 --out runs/demo

.PHONY: demo step help setup setup-tests build test check bench bench-table bench-torch kernel-table clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## install what a build needs
	@scripts/setup.sh

setup-tests:
	@scripts/setup.sh --tests

build: setup ## the program, in target/release/protohead, and the tests
	cargo build $(cargo_flags) --bins --tests

demo: build ## train on synthesised keywords and print the table of accuracies
	rm -rf runs/demo
	"$${CARGO_TARGET_DIR:-target}"/release/protohead train $(demo_flags)

step: setup ## the kernels alone: trains cosine heads on the CPU with plain CubeCL
	cargo run --release -p protohead --features cpu --example step

test: setup-tests ## all tests, on the CPU, on whatever Vulkan driver there is, and on a CUDA GPU if there is one
	cargo test $(cargo_flags)

check: setup-tests ## formatting, lints, documentation, combinations of features, tests: what CI runs
	cargo fmt --all --check
	cargo clippy $(cargo_flags) --all-targets -- --deny warnings
	RUSTDOCFLAGS="--deny warnings" cargo doc $(cargo_flags) --no-deps
	cargo clippy --release -p protohead -- --deny warnings
	cargo clippy --release -p protohead --features burn-unfused,cpu -- --deny warnings
	cargo clippy $(cargo_flags) --features protohead-harness/wgpu -- --deny warnings
	cargo test $(cargo_flags)
	cargo test --profile once -p protohead-tests --no-default-features --features cpu --test suite burn_tensors # with Burn's fusion off

bench: setup ## throughput of every op at every shape beside its peers: about a quarter of an hour
	rm -rf "$${CARGO_TARGET_DIR:-target}"/criterion
	cargo bench --workspace --bench heads

bench-table: build ## the last bench as a table in benches/results
	@mkdir -p benches/results
	@set -e; target="$${CARGO_TARGET_DIR:-target}"; table="$$target/release/table"; device=$$("$$table" device); \
	if [ $$device = cuda ]; then name="$(gpu)"; else name="$(cpu), $$(nproc) cores"; fi; \
	"$$table" "$$target" "$$name, $$(date +%F)" > bench-table.tmp; \
	mv bench-table.tmp benches/results/$$(date +%F)-$$device.md; cat benches/results/$$(date +%F)-$$device.md

bench-torch: build ## the fused op and class means beside PyTorch, taking turns (TORCH_BENCH="--device cuda" on a GPU)
	@scripts/setup.sh --peers
	@set -e; target="$${CARGO_TARGET_DIR:-target}"; \
	[ -x "$$target/peers/bin/pip" ] || python3 -m venv "$$target/peers"; \
	"$$target/peers/bin/pip" install --quiet --disable-pip-version-check \
	  -r benches/peers/$(if $(findstring cuda,$(TORCH_BENCH)),requirements-cuda,requirements).txt; \
	"$$target/peers/bin/python" benches/peers/torch_bench.py --serve "$$target/release/serve" $(TORCH_BENCH)

kernel-table: setup-tests ## registers, shared memory and instructions of every kernel on NVIDIA GPUs, in benches/results
	cargo build $(cargo_flags) --bins --tests
	"$${CARGO_TARGET_DIR:-target}"/release/kernels > kernel-table.tmp
	@mv kernel-table.tmp benches/results/$$(date +%F)-nvidia-kernels.md
	@cat benches/results/$$(date +%F)-nvidia-kernels.md

clean: ## remove build outputs
	cargo clean
