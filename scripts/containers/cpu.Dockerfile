# The command `umbrella-jax` for CPUs, with the versions of requirements/lock.txt.
#
#   docker build --file scripts/containers/cpu.Dockerfile --tag umbrella-jax:cpu .
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" --volume umbrella-cache:/cache \
#     umbrella-jax:cpu train --config run.yaml
#
# Docker 23 or newer, Podman and Buildah build it. --build-arg EXTRAS=report,torch
# adds extras.
#
# BASE has a full version but no digest, so that a build gets Debian's security updates. It may also name a mirror.
ARG BASE=docker.io/library/python:3.11.15-slim-bookworm
FROM $BASE
LABEL org.opencontainers.image.title="umbrella-jax" \
      org.opencontainers.image.description="Vision-language models for brain MRI on JAX, for CPUs" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"

# The checkout and the downloads are mounted for this step, so the image does not contain them.
ARG EXTRAS=report
RUN --mount=type=bind,source=.,target=/src \
    --mount=type=cache,target=/root/.cache \
    bash /src/scripts/install.sh "$EXTRAS" /opt/umbrella \
    && useradd --uid 1000 --create-home umbrella \
    && mkdir --mode=1777 /cache

# `docker run --user` may name a user whom the image does not know, so nothing depends on a home directory.
ENV PATH=/opt/umbrella/bin:$PATH \
    HF_HOME=/cache/huggingface \
    JAX_COMPILATION_CACHE_DIR=/cache/compiled \
    MPLCONFIGDIR=/cache/matplotlib
USER 1000
WORKDIR /work
ENTRYPOINT ["umbrella-jax"]
CMD ["--help"]
