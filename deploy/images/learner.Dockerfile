# The learner: torch and transformers, no vLLM. From the root of the repository:
#   docker build -f deploy/images/learner.Dockerfile -t outrider-learner:0.1.0 .
# For CPUs: --build-arg TORCH=torch==2.13.0+cpu --build-arg TORCH_INDEX=<the address of PyTorch's CPU index>
ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# In a layer of its own: it is large, and changes rarely. Its version is in the argument.
# hadolint ignore=DL3013
RUN pip install ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} "${TORCH}"
WORKDIR /src
COPY pyproject.toml README.md LICENSE deploy/images/constraints.txt ./
COPY common ./common
COPY learner ./learner
COPY actor ./actor
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} "${TORCH}" ".[math,otel]"

FROM python:${PYTHON}
# torch.compile (model.use_torch_compile) calls a C compiler, on CPUs one of C++. The release of Debian that the tag above
# names fixes their versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /cache --shell /usr/sbin/nologin outrider
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
COPY examples ./examples
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
ENTRYPOINT []
CMD ["outrider-learner", "--help"]
