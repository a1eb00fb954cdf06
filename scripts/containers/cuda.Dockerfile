# The command `umbrella-jax` for NVIDIA GPUs, with the versions of requirements/lock.txt.
#
#   docker build --file scripts/containers/cuda.Dockerfile --tag umbrella-jax:cuda .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" --volume "$PWD:/work" --volume umbrella-cache:/cache \
#     umbrella-jax:cuda train --config run.yaml
#
# Docker 23 or newer, Podman and Buildah build it. CUDA comes with the Python packages; the host has
# the driver and the NVIDIA Container Toolkit. --build-arg EXTRAS=cuda13,report is for drivers of version 580 or newer.
#
# BASE has a full version but no digest, so that a build gets Debian's security updates. It may also name a mirror.
ARG BASE=docker.io/library/python:3.11.15-slim-bookworm
FROM $BASE
LABEL org.opencontainers.image.title="umbrella-jax" \
      org.opencontainers.image.description="Vision-language models for brain MRI on JAX, for NVIDIA GPUs" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"

# The checkout and the downloads are mounted for this step, so the image does not contain them.
ARG EXTRAS=cuda12,report
RUN --mount=type=bind,source=.,target=/src \
    --mount=type=cache,target=/root/.cache \
    bash /src/scripts/install.sh "$EXTRAS" /opt/umbrella \
    && useradd --uid 1000 --create-home umbrella \
    && mkdir --mode=1777 /cache

# `docker run --user` may name a user whom the image does not know, so nothing depends on a home directory.
ENV PATH=/opt/umbrella/bin:$PATH \
    HF_HOME=/cache/huggingface \
    JAX_COMPILATION_CACHE_DIR=/cache/compiled \
    MPLCONFIGDIR=/cache/matplotlib \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /work
ENTRYPOINT ["umbrella-jax"]
CMD ["--help"]
