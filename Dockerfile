# The images of agent and collector: `docker build --target agent .`, `docker build --target collector .`.
# `make image` builds the same images without Docker, by the same script.
#
# The base is Debian 12, because its C library and libelf can be linked statically. With SOURCE_DATE_EPOCH (the time of the
# commit) the files have the same times in each build: --build-arg SOURCE_DATE_EPOCH=$(git log -1 --format=%ct).
ARG BASE=rust:1.95-slim-bookworm
FROM ${BASE} AS build
ARG SOURCE_DATE_EPOCH=0
ENV SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH} CARGO_TARGET_DIR=/target
WORKDIR /gannet
COPY scripts/common.sh scripts/install-packages scripts/
COPY Cargo.toml ./
RUN scripts/install-packages build image && rm -rf /var/lib/apt/lists/*
COPY . .
RUN scripts/image roots

# Only the program and the files that it reads: no shell, no package manager. It runs as root, because BPF needs capabilities;
# the chart drops all others.
FROM scratch AS agent
COPY --from=build /target/image/agent/ /
USER 0:0
WORKDIR /
ENTRYPOINT ["/gannet-agent"]
CMD ["run"]

# User 65532 owns no file in the image, and needs to write only to --data.
FROM scratch AS collector
COPY --from=build /target/image/collector/ /
USER 65532:65532
WORKDIR /
ENTRYPOINT ["/gannet-collector"]
