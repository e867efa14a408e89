# syntax=docker/dockerfile:1
# An image with the binary, the C library that it needs, and certificates. No shell, no package
# manager.
#
#   docker build -t prompt-service .
#   docker run --read-only --cap-drop ALL -p 8000:8000 -v prompt-data:/data -e REGISTRATION=open prompt-service

FROM rust:1.95.0-slim-bookworm AS build
WORKDIR /src
# The files that .dockerignore allows: sources, assets, migrations, the lock file.
# rust-toolchain.toml is left out, because the image's own toolchain is used.
COPY . .
# Dependencies and compiled code stay in the builder's cache between builds, so only changes are
# compiled again. The cache is not part of the layer, so the image's root is built in the same step.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target,sharing=locked \
    cargo build --release --locked --bin prompt-service \
    && deploy/image/make_root.sh target/release/prompt-service /image

FROM scratch
LABEL org.opencontainers.image.title="prompt-service" \
      org.opencontainers.image.description="Accounts, an LLM, durable history, semantic search and push in one process." \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /image/root/ /
# A new volume takes its owner and mode from here.
COPY --from=build --chown=65532:65532 /image/data/ /data/
# SQLITE_TMPDIR: SQLite writes temporary files for large statements. The root may be read-only, and
# there is no /tmp.
ENV BIND_ADDR=0.0.0.0:8000 \
    DATA_DIR=/data \
    SQLITE_TMPDIR=/data \
    SHUTDOWN_DELAY=5s \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
USER 65532:65532
# A writable folder, for settings with a relative path.
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 CMD ["/prompt-service", "health"]
ENTRYPOINT ["/prompt-service"]
