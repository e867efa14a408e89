# syntax=docker/dockerfile:1
# The service in an image of its own: the binary, the C library it runs on, certificates. No shell, no package manager.
#
#   docker build -t prompt-service .
#   docker run --read-only --cap-drop ALL -p 8000:8000 -v prompt-data:/data -e REGISTRATION=open prompt-service

FROM rust:1.95.0-slim-bookworm AS build
WORKDIR /src
# What .dockerignore lets through: sources, assets, migrations, the lock file. Not rust-toolchain.toml: the image's toolchain is the one.
COPY . .
# Dependencies and what was compiled stay in the builder's cache between builds, so only what changed is compiled anew. The cache is
# no part of the layer: the image's root is put together in the same step.
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
# SQLite keeps large statements' temporary files there: the root may be read-only, and there is no /tmp.
ENV BIND_ADDR=0.0.0.0:8000 \
    DATA_DIR=/data \
    SQLITE_TMPDIR=/data \
    SHUTDOWN_DELAY=5s \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
USER 65532:65532
# A place that can be written, for whatever is given as a relative path.
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 CMD ["/prompt-service", "health"]
ENTRYPOINT ["/prompt-service"]
