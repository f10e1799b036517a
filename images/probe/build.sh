#!/bin/bash
# Builds the probe and prints the path of the image. Usage: build.sh [--quiet]
# Output goes to $FRACTUS_CACHE/probe (default: the workspace's target/probe), so that a clean
# checkout that shares a cache builds nothing twice.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
target=${FRACTUS_CACHE:-$here/../../target}/probe
# The flags are those of .cargo/config.toml; the environment's would replace them.
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS CARGO_BUILD_RUSTFLAGS CARGO_BUILD_TARGET
cd "$here"
cargo build --quiet --release --locked --target-dir "$target" >&2
realpath "$target/x86_64-unknown-linux-gnu/release/fractus-probe"
