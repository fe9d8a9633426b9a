# The five things people do daily. `just` lists them.

_default:
    @just --list

# Run the demo
demo:
    cargo run --release -- demo

# Format, lint, test
check:
    cargo fmt --check
    cargo clippy --all-targets -- -D warnings
    cargo test

# One test, with its output: just test smuggling
test NAME:
    cargo test {{NAME}} -- --nocapture

# All that CI does, tools installed included
ci:
    bash .ci/run

# CPU per request beside nginx and HAProxy
bench:
    cargo build --release
    python3 benches/peers/first.py
