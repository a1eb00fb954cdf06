# An image to develop in: Python 3.11, the packages of requirements/lock.txt, and the programs that the tests call.
#
#   docker build --file scripts/containers/dev.Dockerfile --tag umbrella-jax:dev .
#   docker run --rm --interactive --tty --volume "$PWD:/src" --volume /src/.venv umbrella-jax:dev
#
# The first volume is your checkout. The second keeps the image's .venv visible in it.
ARG BASE=docker.io/library/python:3.11.15-slim-bookworm
FROM $BASE

# Debian deletes old versions, so pinned ones would soon not install.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends chromium-headless-shell fonts-dejavu-core git \
    && rm -rf /var/lib/apt/lists/* \
    && git config --system --add safe.directory /src

WORKDIR /src
COPY . .
# PyTorch from PyPI brings gigabytes for CUDA. To install a CPU build instead, name a folder or page of wheels:
# --build-arg PIP_FIND_LINKS=...
ARG PIP_FIND_LINKS=
RUN bash scripts/install.sh dev && rm -rf /root/.cache

CMD ["bash"]
