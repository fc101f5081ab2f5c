#!/usr/bin/env bash
# What a build needs beside Rust: a C++ compiler, and LLVM for CubeCL's CPU and CUDA compilers. With --tests also what the
# tests need: espeak-ng, which speaks the keywords that a test trains on; a software Vulkan driver, on which they run the
# GPU-shaped kernels; and NVIDIA's assembler and device library, with which they compile every kernel for GPUs that are not there.
# With --peers what a virtual environment of Python needs, for the benches beside PyTorch.
# Installs what is missing, says what, and does nothing the second time.
set -euo pipefail

llvm_version=23.1.0-4 # of tracel-llvm-bundler in Cargo.lock
llvm_dir="${XDG_DATA_HOME:-$HOME/.local/share}/tracel/tracel-llvm-$llvm_version"
debian_llvm=/usr/lib/llvm-22
cuda_version=13.0.88 # of the PyPI packages nvidia-cuda-nvcc and nvidia-nvvm
cuda_dir="${XDG_DATA_HOME:-$HOME/.local/share}/protohead/cuda"

fail() {
  echo "setup: $1" >&2
  exit 1
}

apt_install() {
  command -v apt-get >/dev/null || return 1
  local sudo=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || return 1
    sudo=(sudo)
  fi
  echo "setup: installing with apt-get: $*"
  "${sudo[@]}" apt-get update -qq
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# The archive that CubeCL's build script would download, to where it would put it: here there is another way if that fails.
download_llvm() {
  local arch=x64 url sum tool
  [ "$(uname -m)" = aarch64 ] && arch=AArch64
  url="https://github.com/tracel-ai/tracel-llvm/releases/download/v$llvm_version/linux-$arch"
  for tool in curl xz sha256sum; do
    command -v "$tool" >/dev/null || apt_install ca-certificates coreutils curl xz-utils || return 1
  done
  mkdir -p "${llvm_dir%/*}" && download=$(mktemp -d "${llvm_dir%/*}/download.XXXXXX") || return 1
  trap 'rm -rf "$download"' EXIT
  curl --silent --fail --location --connect-timeout 10 --max-time 30 --output "$download/checksums.json" "$url.checksums.json" &&
    sum=$(grep -oE '"archive_sha256": *"[0-9a-f]{64}"' "$download/checksums.json" | grep -oE '[0-9a-f]{64}') || return 1
  echo "setup: downloading LLVM from GitHub into $llvm_dir"
  if curl --fail --location --progress-bar --connect-timeout 10 --retry 3 --speed-limit 10000 --speed-time 60 \
    --output "$download/llvm.tar.xz" "$url.tar.xz" &&
    echo "$sum  $download/llvm.tar.xz" | sha256sum --check --status - &&
    tar --no-same-owner -xJf "$download/llvm.tar.xz" -C "$download" &&
    touch "$download/${llvm_dir##*/}/.tracel-llvm-installed"; then
    rm -rf "$llvm_dir" && mv "$download/${llvm_dir##*/}" "$llvm_dir"
  else
    echo "setup: that failed, trying Debian's" >&2
    return 1
  fi
}

wanted="${1:-}"
case "$wanted" in
'' | --tests | --peers) ;;
*)
  echo "usage: scripts/setup.sh [--tests | --peers]" >&2
  exit 2
  ;;
esac

command -v cargo >/dev/null || fail "Rust is missing: install Rust 1.95 or newer with rustup, then run this again"

if ! command -v c++ >/dev/null; then
  apt_install g++ || fail "no C++ compiler: install one (Debian's g++), then run this again"
fi

# Whether the LLVM that is marked as installed is there, too: Debian's can be removed behind it.
has_llvm() {
  [ -e "$llvm_dir/.tracel-llvm-installed" ] && "$llvm_dir/bin/llvm-config" --version 2>/dev/null | grep -q .
}

# Elsewhere than on Linux it is left to CubeCL's build script.
if [ "$(uname -s)" = Linux ] && ! has_llvm; then
  if ! download_llvm; then
    debian=(llvm-22-dev libpolly-22-dev libzstd-dev libz3-dev zlib1g-dev libxml2-dev)
    if ! dpkg -s "${debian[@]}" >/dev/null 2>&1; then
      apt_install "${debian[@]}" ||
        fail "no LLVM: neither GitHub (with curl and xz) nor apt-get (as root or with sudo) could provide it, so nothing can be built here"
    fi
    echo "setup: using Debian's LLVM 22 for CubeCL, through $llvm_dir"
    mkdir -p "$llvm_dir/bin"
    cat >"$llvm_dir/bin/llvm-config" <<WRAPPER
#!/bin/sh
# Debian's llvm-config; CubeCL's bundler expects -lz3, not a path.
$debian_llvm/bin/llvm-config "\$@" | sed -E 's#/[^ ]*/libz3\\.so#-lz3#g'
WRAPPER
    chmod +x "$llvm_dir/bin/llvm-config"
    touch "$llvm_dir/.tracel-llvm-installed"
  fi
fi

if [ "$wanted" = "--tests" ] && ! command -v espeak-ng >/dev/null; then
  apt_install espeak-ng ||
    echo "setup: espeak-ng could not be installed: the tests will not train on speech, and say so" >&2
fi
if [ "$wanted" = "--tests" ] && ! ls /usr/share/vulkan/icd.d/*.json >/dev/null 2>&1; then
  apt_install mesa-vulkan-drivers libvulkan1 ||
    echo "setup: no Vulkan driver could be installed: the tests will skip wgpu and say so" >&2
fi
if [ "$wanted" = "--tests" ] && [ "$(cat "$cuda_dir/version" 2>/dev/null)" != "$cuda_version" ]; then
  python3 -m pip --version >/dev/null 2>&1 || apt_install python3-pip || true
  echo "setup: installing NVIDIA's assembler $cuda_version from PyPI into $cuda_dir"
  rm -rf "$cuda_dir"
  if python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --target "$cuda_dir" \
    "nvidia-cuda-nvcc==$cuda_version" "nvidia-nvvm==$cuda_version"; then
    echo "$cuda_version" >"$cuda_dir/version"
  else
    echo "setup: it could not be installed: the tests will not compile kernels for NVIDIA GPUs, and say so" >&2
  fi
fi
if [ "$wanted" = "--peers" ] && ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
  apt_install python3-venv || fail "no Python with virtual environments: install one (Debian's python3-venv), then run this again"
fi
