# One static binary on nothing: no shell, no libc, no package to patch.
FROM rust:1-slim-bookworm AS build
WORKDIR /build
COPY . .
# glibc linked in; the target is named so that the flag does not reach build scripts and macros.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/build/target \
    target="$(uname -m)-unknown-linux-gnu" \
    && RUSTFLAGS="-C target-feature=+crt-static" cargo build --release --locked --bin outrigger --target "$target" \
    && cp "target/$target/release/outrigger" /outrigger \
    && mkdir -p /rootfs/tmp /rootfs/etc \
    && chmod 1777 /rootfs/tmp \
    && echo 'outrigger:x:4140:4140::/:/sbin/nologin' >/rootfs/etc/passwd

FROM scratch
COPY --from=build /rootfs /
COPY --from=build /outrigger /outrigger
COPY LICENSE /LICENSE
USER 4140:4140
# Outbound, inbound, admin, probes.
EXPOSE 4140 4143 4191 4192
ENTRYPOINT ["/outrigger"]
CMD ["run"]
