# Two images from one file:
#     docker build --target train -t ddpm-foundry-train .
#     docker build --target eval  -t ddpm-foundry-eval  .
# PYTHON_IMAGE may be any Debian or Ubuntu image with Python >= 3.11, venv and Python's headers.
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

# --- base: data pipeline and evaluation -------------------------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS base
# tini: process 1 must pass signals on and reap orphans, or TERM would never reach the supervisor.
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --create-home ddpm \
    && python3 -m venv /opt/venv
ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    HOME=/home/ddpm \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /opt/ddpm-foundry
# Dependencies first: their layer lasts until setup.cfg changes.
COPY setup.cfg pyproject.toml LICENSE ./
RUN touch README.md && pip install --no-cache-dir .

# --- train: adds DeepSpeed, with its CPU operator built -----------------------------------------------------------------
FROM base AS train
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir '.[train]'
COPY data_pipeline data_pipeline
COPY trainer trainer
COPY eval eval
COPY launch launch
RUN pip install --no-cache-dir --no-deps --editable . \
    && python -m trainer.extensions
USER 10001:10001
ENTRYPOINT ["/usr/bin/tini", "--", "/opt/ddpm-foundry/launch/train.sh"]

# --- eval: no DeepSpeed, no compiler --------------------------------------------------------------------------------------
FROM base AS eval
COPY data_pipeline data_pipeline
COPY trainer trainer
COPY eval eval
COPY launch launch
RUN pip install --no-cache-dir --no-deps --editable .
USER 10001:10001
ENTRYPOINT ["/usr/bin/tini", "--", "/opt/ddpm-foundry/launch/eval.sh"]
