# One static binary from scratch: no shell, no libc, no package to patch.
#
#     docker build .                            for this machine's processor
#     docker build --platform linux/arm64 .     for another one, compiled here: amd64 or arm64
# The compiler that recorded the profile of hot code, of amd64 and arm64. To change it: `docker buildx imagetools inspect
# rust:VERSION-slim-bookworm` shows the digest of the next one, `benches/release learn` records the profile with it.
FROM --platform=$BUILDPLATFORM rust:1.95.0-slim-bookworm@sha256:d7482085ff5b415f84dba5647ae71606650bdef00db7aeb69f4b3d170c3e4082 AS build
ARG TARGETARCH
# To build for another architecture than the build machine's: its linker, its libc, and Rust's library for it.
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
# The modification time of all files of the image, for reproducible builds.
ARG SOURCE_DATE_EPOCH=0
# Statically linked glibc, and the profile of hot code (benches/release) if this compiler can read it. The target is named so that
# the flags do not apply to build scripts and macros. Cached objects of this crate may be newer than the sources and yet come from
# others, hence `touch`; those of dependencies may come from another profile, hence its checksum in the file name.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/build/target \
    target="$(cat /target)" \
    && touch src/lib.rs src/main.rs \
    && profile="/tmp/hot-$(cksum <benches/hot.profdata | tr ' ' -).profdata" \
    && cp benches/hot.profdata "$profile" \
    && hot="-C profile-use=$profile" \
    && if ! echo 'fn main() {}' | rustc $hot --emit obj -o /tmp/hot.o -; then hot=; fi \
    && RUSTC_WRAPPER=/build/benches/stable-names RUSTFLAGS="-C target-feature=+crt-static $hot" \
       cargo build --profile dist --locked --bin outrigger --target "$target" \
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
