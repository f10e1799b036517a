#!/bin/bash
# Builds the probe and prints the path of the image.
# Output goes to probe/ in cargo's target folder (CARGO_TARGET_DIR, which the scripts put outside of
# the checkout; else target/ at the top), so that a clean clone builds nothing twice.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
target=${CARGO_TARGET_DIR:-$here/../../target}/probe
# The flags are those of .cargo/config.toml; the environment's would replace them.
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS CARGO_BUILD_RUSTFLAGS CARGO_BUILD_TARGET
cd "$here"
cargo build --quiet --release --locked --target-dir "$target" >&2
realpath "$target/x86_64-unknown-linux-gnu/release/fractus-probe"
