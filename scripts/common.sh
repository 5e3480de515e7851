# shellcheck shell=bash
# Functions and variables of all scripts. Source it: `. "$(dirname "$0")/common.sh"`.
set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$top"
target=${CARGO_TARGET_DIR:-$top/target}
export CARGO_TARGET_DIR=$target CARGO_INCREMENTAL=0
export PATH=$target/tools/bin:$PATH

say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
# finds PATTERN: whether standard input has it; takes grep's options. It reads to the end, because `grep -q` exits at the first
# match, and the writer of the pipe then fails.
finds() { local text; text=$(cat); grep -q "$@" <<<"$text"; }

# sudo and cron keep neither the caller's PATH nor HOME, and rustup lives in both.
if ! command -v cargo >/dev/null; then
  for home in "$HOME" "$(getent passwd "${SUDO_USER:-root}" | cut -d: -f6)"; do
    if [ -x "$home/.cargo/bin/cargo" ]; then
      export PATH=$home/.cargo/bin:$PATH RUSTUP_HOME=${RUSTUP_HOME:-$home/.rustup} CARGO_HOME=${CARGO_HOME:-$home/.cargo}
      break
    fi
  done
fi

need_rust() {
  local least have cure='install it with rustup (Debian 13, Ubuntu 24.04: apt-get install rustup; others: https://rustup.rs), then: rustup default stable'
  least=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
  command -v cargo >/dev/null || die "cargo is missing, Rust $least or newer is needed: $cure"
  have=$(rustc --version | cut -d' ' -f2)
  [ "$(printf '%s\n' "$least" "$have" | sort -V | head -1)" = "$least" ] || die "Rust $have is too old, $least or newer is needed: $cure"
}

need_root() {
  [ "$(id -u)" = 0 ] || die "$1 loads BPF programs and so needs root: run it again as root (sudo make ${1#make })"
}

# Exits with one line and the cure where BPF cannot work; mounts tracefs if it is missing.
need_kernel() {
  [ "$(uname -s)" = Linux ] || die "Gannet runs on Linux, this is $(uname -s)"
  [ -r /sys/kernel/btf/vmlinux ] || die "this kernel ($(uname -r)) has no BTF (/sys/kernel/btf/vmlinux): boot one that is built with CONFIG_DEBUG_INFO_BTF=y, as all distributions' kernels since 5.10 are"
  if grep -qs '\[confidentiality\]' /sys/kernel/security/lockdown; then
    die "the kernel is locked down (lockdown=confidentiality), which forbids reading stacks by BPF: boot with lockdown=integrity or none"
  fi
  if [ ! -e /sys/kernel/tracing/events ] && [ ! -e /sys/kernel/debug/tracing/events ]; then
    mount -t tracefs nodev /sys/kernel/tracing 2>/dev/null || die "tracefs is not mounted and cannot be: mount -t tracefs nodev /sys/kernel/tracing"
    say "mounted tracefs on /sys/kernel/tracing, where the agent finds the tracepoints"
  fi
}

# free_port N: prints the first free port from N upwards.
free_port() {
  local port=$1
  while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
  echo "$port"
}
