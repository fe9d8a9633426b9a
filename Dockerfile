# One static binary on nothing: no shell, no libc, no package to patch.
#
#     docker build .                            for this machine's processor
#     docker build --platform linux/arm64 .     for another one, compiled here: amd64 or arm64
FROM --platform=$BUILDPLATFORM rust:1-slim-bookworm AS build
ARG TARGETARCH
# For another processor than that of the machine which builds: its linker, its libc, and Rust's library for it.
RUN case "${TARGETARCH:=$(dpkg --print-architecture)}" in \
      amd64) machine=x86_64 compiler=gcc-x86-64-linux-gnu ;; \
      arm64) machine=aarch64 compiler=gcc-aarch64-linux-gnu ;; \
      *) echo "TARGETARCH is amd64 or arm64, not '$TARGETARCH'" >&2; exit 1 ;; \
    esac \
    && target="$machine-unknown-linux-gnu" \
    && echo "$target" >/target \
    && if ! command -v "$machine-linux-gnu-gcc"; then \
         apt-get update && apt-get install -y --no-install-recommends "$compiler" "libc6-dev-$TARGETARCH-cross"; \
       fi \
    && if [ ! -d "$(rustc --print target-libdir --target "$target")" ]; then rustup target add "$target"; fi
ENV CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER=x86_64-linux-gnu-gcc \
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
WORKDIR /build
COPY . .
# The time that all files of the image bear, so that what is built twice is the same twice.
ARG SOURCE_DATE_EPOCH=0
# glibc linked in, and compiled by what is known of which code is hot (benches/release), where this compiler can read that; the
# target is named so that the flags do not reach build scripts and macros. What the cache holds of this crate may be younger
# than the sources and yet made from others; what it holds of dependencies may be made by another profile, so its name says which.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/build/target \
    target="$(cat /target)" \
    && touch src/lib.rs src/main.rs \
    && profile="/tmp/hot-$(cksum <benches/hot.profdata | tr ' ' -).profdata" \
    && cp benches/hot.profdata "$profile" \
    && hot="-C profile-use=$profile" \
    && if ! echo 'fn main() {}' | rustc $hot --emit obj -o /tmp/hot.o -; then hot=; fi \
    && RUSTFLAGS="-C target-feature=+crt-static $hot" cargo build --profile dist --locked --bin outrigger --target "$target" \
    && mkdir -p /rootfs/tmp /rootfs/etc \
    && chmod 1777 /rootfs/tmp \
    && echo 'outrigger:x:4140:4140::/:/sbin/nologin' >/rootfs/etc/passwd \
    && cp "target/$target/dist/outrigger" LICENSE /rootfs/ \
    && find /rootfs -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +

FROM scratch
COPY --from=build /rootfs /
USER 4140:4140
# Outbound, inbound, admin, probes.
EXPOSE 4140 4143 4191 4192
ENTRYPOINT ["/outrigger"]
CMD ["run"]
