# The actor on NVIDIA GPUs: Outrider on top of vLLM's own image. From the root of the repository:
#   docker build -f deploy/images/actor.Dockerfile -t outrider-actor:0.1.0 .
FROM vllm/vllm-openai:v0.32.0
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY common ./common
COPY learner ./learner
COPY actor ./actor
# vLLM, torch and most of the rest are those of the image, which pyproject.toml's exact vLLM belongs to.
# hadolint ignore=DL3013
RUN python3 -m pip install ".[gpu]" \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /cache --shell /usr/sbin/nologin outrider
WORKDIR /app
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
ENTRYPOINT []
CMD ["outrider-actor", "--help"]
